"""LayerNorm times a gate: the stage after the scan, as one operator; and LayerNorm alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backends
from kernels.operators import make_differentiable, operator

PART = 1 << 19  # numbers of a map that a CPU takes at once, so that they stay in its caches


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
    backends.check_dtype("y", y)
    if z.dtype != y.dtype:
        raise ValueError(f"expected y and z of one dtype, got {y.dtype} and {z.dtype}; cast one")
    if y.numel() > 0 and backends.runs_stage_kernels(y.device.type):
        return _operator(*(t.contiguous() for t in (y, z, weight, bias)), eps)
    return _formula(y, z, weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis of a map, in the dtype of what follows.

    As `torch.nn.functional.layer_norm`, but for x in bfloat16 or float16, which autocast would make
    float32, and for float32 x in autocast the result has that half precision
    (`backends.working_dtype`); statistics are float32 and parameters of any floating dtype. Where
    layers run fused kernels (`backends.fused_precision`) it is one of them, differentiable once.

    Args:
        x: (..., dim), of any floating dtype.
        weight, bias: (dim,).
        eps: added to the variance.
    """
    dtype = backends.working_dtype(x)
    if _runs_own_norm(x):
        return _norm_operator(x.contiguous(), weight.contiguous(), bias.contiguous(), eps, dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(dtype)


def fork_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x itself and its `layer_norm`: where a residual branch begins.

    Where it is a fused kernel, that of its gradient adds the gradient by the first to it.
    """
    # A compiler joins sums with kernels by itself.
    if _runs_own_norm(x) and not torch.compiler.is_compiling():
        return _Fork.apply(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)
    return x, layer_norm(x, weight, bias, eps)


def _runs_own_norm(x: Tensor) -> bool:
    return x.numel() > 0 and backends.fused_precision(x) is not None


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        from kernels.norm_gate_triton import norm_gate_forward

        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return x, norm_gate_forward(x, None, weight, bias, eps, backends.working_dtype(x))

    @staticmethod
    def backward(ctx, dx, dout):
        from kernels.norm_gate_triton import norm_gate_backward

        x, weight, bias = ctx.saved_tensors
        dx, _, dweight, dbias = norm_gate_backward(
            dout.contiguous(), x, None, weight, bias, ctx.eps, dx.contiguous()
        )
        return dx, dweight, dbias, None


def _formula(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    tensors = (y, z, weight, bias)
    wants_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if wants_gradients or y.device.type != "cpu" or torch.compiler.is_compiling():
        norm, gate = _norm_and_gate(*tensors, eps)
        return (norm * gate).to(y.dtype).contiguous()
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    rows = max(PART // y.shape[-1], 1)
    maps = (t.flatten(0, -2).split(rows) for t in (out, y, z))
    for part, y_part, z_part in zip(*maps, strict=True):
        torch.mul(*_norm_and_gate(y_part, z_part, weight, bias, eps), out=part)
    return out


def _norm_and_gate(
    y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(y.dtype, torch.float32)
    with torch.autocast(y.device.type, enabled=False):  # it would change the precision
        norm = F.layer_norm(y.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
        return norm, F.silu(z.to(dtype))


# The operators run Triton kernels on whatever device the tensors are: on a GPU, or, for tests, on
# a CPU in Triton's interpreter. All tensors are contiguous.
@operator("norm_gate")
def _operator(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from kernels.norm_gate_triton import norm_gate_forward

    return norm_gate_forward(y, z, weight, bias, eps)


@operator("norm_gate_backward")
def _backward_operator(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from kernels.norm_gate_triton import norm_gate_backward

    return norm_gate_backward(dout, y, z, weight, bias, eps)


@operator("layer_norm")
def _norm_operator(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    from kernels.norm_gate_triton import norm_gate_forward

    return norm_gate_forward(x, None, weight, bias, eps, dtype)


@operator("layer_norm_backward")
def _norm_backward_operator(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.norm_gate_triton import norm_gate_backward

    dx, _, dweight, dbias = norm_gate_backward(dout, x, None, weight, bias, eps)
    return dx, dweight, dbias


make_differentiable("norm_gate")
make_differentiable(
    "layer_norm",
    lambda x, weight, bias, eps, dtype: torch.empty_like(
        x, dtype=dtype, memory_format=torch.contiguous_format
    ),
)
