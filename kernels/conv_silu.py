"""SiLU of a depthwise 3x3 convolution: the stage before the scan, as one operator."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from kernels import backends
from kernels.operators import make_differentiable, operator


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
    backends.check_dtype("x", x)
    if x.numel() > 0 and backends.runs_stage_kernels(x.device.type):
        return _operator(x.contiguous(), weight.contiguous(), bias.contiguous())
    return _formula(x, weight, bias)


def _formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # it would lower the precision
        weight, bias = weight.to(dtype), bias.to(dtype)
        if x.dtype == torch.float64 and x.device.type == "cpu":
            pre = _convolve_by_taps(x, weight, bias)
        else:
            image = x.to(dtype).permute(0, 3, 1, 2)
            pre = F.conv2d(image, weight, bias, padding=1, groups=x.shape[3]).permute(0, 2, 3, 1)
        y = F.silu(pre, inplace=not pre.requires_grad)
    return y.to(x.dtype).contiguous()


def _convolve_by_taps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution where oneDNN has none: PyTorch would take one channel after another."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    pre = bias.expand_as(x)
    for i in range(3):
        for j in range(3):
            tap = padded[:, i : i + height, j : j + width]
            pre = torch.addcmul(pre, tap, weight[:, 0, i, j])
    return pre


# The operators run Triton kernels on whatever device the tensors are: on a GPU, or, for tests, on
# a CPU in Triton's interpreter. All tensors are contiguous.
@operator("depthwise_conv_silu")
def _operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from kernels.conv_silu_triton import conv_silu_forward

    return conv_silu_forward(x, weight, bias)


@operator("depthwise_conv_silu_backward")
def _backward_operator(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.conv_silu_triton import conv_silu_backward

    return conv_silu_backward(dy, x, weight, bias)


make_differentiable("depthwise_conv_silu")


# Where the kernels do not run, the counter sees PyTorch's own convolution, so its formulas are
# used here too: a network counts the same on every device. SiLU counts as nothing.
def _channels_first(shape):
    batch, height, width, dim = shape
    return batch, dim, height, width


@register_flop_formula(torch.ops.mambavc.depthwise_conv_silu)
def _flops(x_shape, weight_shape, bias_shape, *, out_shape=None, **kwargs) -> int:
    shape = _channels_first(x_shape)
    convolution = flop_registry[torch.ops.aten.convolution]
    return convolution(shape, weight_shape, bias_shape, 1, 1, 1, False, out_val=shape)


@register_flop_formula(torch.ops.mambavc.depthwise_conv_silu_backward)
def _backward_flops(
    dy_shape, x_shape, weight_shape, bias_shape, *, out_shape=None, **kwargs
) -> int:
    shape = _channels_first(x_shape)
    backward = flop_registry[torch.ops.aten.convolution_backward]
    return backward(
        shape, shape, weight_shape, bias_shape, 1, 1, 1, False, 0, shape[1], [True] * 3,
        out_val=(shape, weight_shape, bias_shape),
    )  # fmt: skip
