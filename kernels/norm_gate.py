"""LayerNorm times a gate: the stage after the scan, as one operator; and LayerNorm alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backends
from kernels.operators import make_differentiable


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
    """LayerNorm over the last axis of a map in half precision, which autocast would make float32.

    As `torch.nn.functional.layer_norm`, but for x in bfloat16 or float16: statistics are float32,
    parameters of any floating dtype, and the result has x's dtype. Differentiable once. For x in
    float64 it is one kernel in place of two where no gradient is recorded.

    Args:
        x: (..., dim), of any floating dtype.
        weight, bias: (dim,).
        eps: added to the variance.
    """
    if x.dtype != torch.float32 and x.numel() > 0 and backends.fused_precision(x) is not None:
        return _norm_operator(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)
    if x.dtype not in (torch.bfloat16, torch.float16):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def _formula(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(y.dtype, torch.float32)
    with torch.autocast(y.device.type, enabled=False):  # it would change the precision
        norm = F.layer_norm(y.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
        gate = F.silu(z.to(dtype))
        needs_both = norm.requires_grad or gate.requires_grad
        out = norm * gate if needs_both else gate.mul_(norm)  # in place, because maps are large
    return out.to(y.dtype).contiguous()


# The operators run Triton kernels on whatever device the tensors are: on a GPU, or, for tests, on
# a CPU in Triton's interpreter. All tensors are contiguous.
@torch.library.custom_op("mambavc::norm_gate", mutates_args=())
def _operator(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from kernels.norm_gate_triton import norm_gate_forward

    return norm_gate_forward(y, z, weight, bias, eps)


@torch.library.custom_op("mambavc::norm_gate_backward", mutates_args=())
def _backward_operator(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from kernels.norm_gate_triton import norm_gate_backward

    return norm_gate_backward(dout, y, z, weight, bias, eps)


@torch.library.custom_op("mambavc::layer_norm", mutates_args=())
def _norm_operator(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from kernels.norm_gate_triton import norm_gate_forward

    return norm_gate_forward(x, None, weight, bias, eps)


@torch.library.custom_op("mambavc::layer_norm_backward", mutates_args=())
def _norm_backward_operator(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.norm_gate_triton import norm_gate_backward

    dx, _, dweight, dbias = norm_gate_backward(dout, x, None, weight, bias, eps)
    return dx, dweight, dbias


make_differentiable("norm_gate")
make_differentiable("layer_norm")
