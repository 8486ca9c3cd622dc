"""The stages around the scan, each as one operator.

`depthwise_conv_silu` comes before the scan, `norm_gate` after it. On a CUDA device with Triton
they run `triton_conv_silu` and `triton_norm_gate`; anywhere else, or with the environment variable
``MAMBAVC_SCAN_BACKEND=reference``, they are the same formulas in plain PyTorch. The operators
(`torch.ops.mambavc`) exist on every device, so that they can be checked without a GPU.
"""

import functools
import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of a depthwise 3x3 convolution with zero padding 1, channels last.

    Sums are float32 (float64 for float64 maps). Differentiable once in all three arguments, and
    the same input gives the same bits every time.

    Args:
        x: (batch, height, width, dim), float32, bfloat16, float16 or float64.
        weight: (dim, 1, 3, 3), as `torch.nn.Conv2d` with ``groups=dim`` holds it.
        bias: (dim,). The parameters may have another dtype than x.

    Returns:
        (batch, height, width, dim) in x's dtype, contiguous.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    dim = x.shape[-1]
    if x.ndim != 4 or weight.shape != (dim, 1, 3, 3) or bias.shape != (dim,):
        raise ValueError(
            "expected x (batch, height, width, dim), weight (dim, 1, 3, 3) and bias (dim,), got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    _check_dtype("x", x)
    if not _has_kernels(x.device.type) or x.numel() == 0:
        return _conv_silu(x, weight, bias)
    return _conv_silu_op(x.contiguous(), weight.contiguous(), bias.contiguous())


def norm_gate(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm of y over its last axis, times SiLU(z).

    Statistics are float32 (float64 for float64 maps). Differentiable once in y, z, weight and
    bias, and the same input gives the same bits every time.

    Args:
        y, z: (..., dim), both float32, bfloat16, float16 or float64.
        weight, bias: (dim,), scale and offset of the normalised y, of any floating dtype.
        eps: added to the variance.

    Returns:
        (..., dim) in y's dtype, contiguous.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    dim = y.shape[-1]
    if y.shape != z.shape or weight.shape != (dim,) or bias.shape != (dim,):
        raise ValueError(
            "expected y and z (..., dim), weight and bias (dim,), got "
            f"{tuple(y.shape)}, {tuple(z.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    _check_dtype("y", y)
    if z.dtype != y.dtype:
        raise ValueError(f"expected y and z of one dtype, got {y.dtype} and {z.dtype}; cast one")
    if not _has_kernels(y.device.type) or y.numel() == 0:
        return _norm_gate(y, z, weight, bias, eps)
    return _norm_gate_op(
        y.contiguous(), z.contiguous(), weight.contiguous(), bias.contiguous(), eps
    )


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"expected {name} in one of {known}, got {x.dtype}")


def _has_kernels(device_type: str) -> bool:
    return (
        device_type == "cuda"
        and os.environ.get("MAMBAVC_SCAN_BACKEND") != "reference"
        and _HAS_TRITON
    )


def _without_autocast(function):
    """Let the formulas choose their own precision: autocast would lower it."""

    @functools.wraps(function)
    def wrapped(x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return wrapped


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution of x (batch, dim, height, width), all in one dtype."""
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


@_without_autocast
def _conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    pre = _conv(x.to(dtype).permute(0, 3, 1, 2), weight.to(dtype), bias.to(dtype))
    return F.silu(pre, inplace=not pre.requires_grad).permute(0, 2, 3, 1).to(x.dtype).contiguous()


@_without_autocast
def _conv_silu_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    image = x.to(dtype).permute(0, 3, 1, 2)
    weight_, bias_ = weight.to(dtype), bias.to(dtype)
    dpre = torch.ops.aten.silu_backward(
        dy.to(dtype).permute(0, 3, 1, 2), _conv(image, weight_, bias_)
    )
    dim = x.shape[-1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dpre, image, weight_, [dim], [1, 1], [1, 1], [1, 1], False, [0, 0], dim, [True] * 3
    )
    dx = dx.permute(0, 2, 3, 1).to(x.dtype).contiguous()
    return dx, dweight.to(weight.dtype).contiguous(), dbias.to(bias.dtype)


@_without_autocast
def _norm_gate(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(y.dtype, torch.float32)
    norm = F.layer_norm(y.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    gate = F.silu(z.to(dtype))
    if not (norm.requires_grad or gate.requires_grad):  # maps are large
        return gate.mul_(norm).to(y.dtype).contiguous()
    return (norm * gate).to(y.dtype).contiguous()


@_without_autocast
def _norm_gate_gradients(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(y.dtype, torch.float32)
    shape = weight.shape
    dout_, y_, z_, weight_, bias_ = (t.to(dtype) for t in (dout, y, z, weight, bias))
    norm, mean, rstd = torch.native_layer_norm(y_, shape, weight_, bias_, eps)
    dz = torch.ops.aten.silu_backward(dout_ * norm, z_)
    dy, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout_ * F.silu(z_), y_, shape, mean, rstd, weight_, bias_, [True] * 3
    )
    return dy.to(y.dtype), dz.to(z.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)


@torch.library.custom_op("mambavc::depthwise_conv_silu", mutates_args=())
def _conv_silu_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _conv_silu(x, weight, bias)


@_conv_silu_op.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from kernels.conv_silu_triton import depthwise_conv_silu_forward

    return depthwise_conv_silu_forward(x, weight, bias)


@_conv_silu_op.register_fake
def _(x, weight, bias):
    return _empty(x)


@torch.library.custom_op("mambavc::depthwise_conv_silu_backward", mutates_args=())
def _conv_silu_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _conv_silu_gradients(dy, x, weight, bias)


@_conv_silu_backward_op.register_kernel("cuda")
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.conv_silu_triton import depthwise_conv_silu_backward

    return depthwise_conv_silu_backward(dy, x, weight, bias)


@_conv_silu_backward_op.register_fake
def _(dy, x, weight, bias):
    return _empty(x), _empty(weight), _empty(bias)


@torch.library.custom_op("mambavc::norm_gate", mutates_args=())
def _norm_gate_op(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _norm_gate(y, z, weight, bias, eps)


@_norm_gate_op.register_kernel("cuda")
def _(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from kernels.norm_gate_triton import norm_gate_forward

    return norm_gate_forward(y, z, weight, bias, eps)


@_norm_gate_op.register_fake
def _(y, z, weight, bias, eps):
    return _empty(y)


@torch.library.custom_op("mambavc::norm_gate_backward", mutates_args=())
def _norm_gate_backward_op(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm_gate_gradients(dout, y, z, weight, bias, eps)


@_norm_gate_backward_op.register_kernel("cuda")
def _(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from kernels.norm_gate_triton import norm_gate_backward

    return norm_gate_backward(dout, y, z, weight, bias, eps)


@_norm_gate_backward_op.register_fake
def _(dout, y, z, weight, bias, eps):
    return _empty(y), _empty(z), _empty(weight), _empty(bias)


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.scalars = [value for value in inputs if not isinstance(value, Tensor)]


def _conv_silu_autograd(ctx, dy):
    return _conv_silu_backward_op(dy.contiguous(), *ctx.saved_tensors)


def _norm_gate_autograd(ctx, dout):
    gradients = _norm_gate_backward_op(dout.contiguous(), *ctx.saved_tensors, *ctx.scalars)
    return *gradients, None


_conv_silu_op.register_autograd(_conv_silu_autograd, setup_context=_save)
_norm_gate_op.register_autograd(_norm_gate_autograd, setup_context=_save)


# The counter sees PyTorch's own convolution where the kernels do not run, so its own formulas are
# used here too: a network counts the same on every device. LayerNorm and SiLU count as nothing.
def _channels_first(shape):
    batch, height, width, dim = shape
    return batch, dim, height, width


@register_flop_formula(torch.ops.mambavc.depthwise_conv_silu)
def _conv_silu_flops(x_shape, weight_shape, bias_shape, *, out_shape=None, **kwargs) -> int:
    shape = _channels_first(x_shape)
    convolution = flop_registry[torch.ops.aten.convolution]
    return convolution(shape, weight_shape, bias_shape, 1, 1, 1, False, out_val=shape)


@register_flop_formula(torch.ops.mambavc.depthwise_conv_silu_backward)
def _conv_silu_backward_flops(
    dy_shape, x_shape, weight_shape, bias_shape, *, out_shape=None, **kwargs
) -> int:
    shape = _channels_first(x_shape)
    backward = flop_registry[torch.ops.aten.convolution_backward]
    return backward(
        shape, shape, weight_shape, bias_shape, 1, 1, 1, False, 0, shape[1], [True] * 3,
        out_val=(shape, weight_shape, bias_shape),
    )  # fmt: skip
