"""The compiled scan as PyTorch operators: `torch.ops.mambavc.scan_2d` and its backward.

Their tensors are those of `ScanInputs`, contiguous on a GPU. CPU tensors run `kernels.scan_cpu`,
CUDA tensors `kernels.scan_triton`; each is imported at its first call. Where A is fixed (see
`kernels.selective_scan_2d`), A_logs has no gradient, and the backward operator returns an empty
tensor, of shape (0,), in its place.

`scan_2d_and_states`, on a GPU and where A is fixed, also gives the states that its backward pass,
`scan_2d_and_states_backward`, then need not compute again.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.operators import make_differentiable
from kernels.scan_reference import ScanInputs

_INPUTS = ", ".join(f"Tensor {name}" for name in ScanInputs._fields)
_GRADIENTS = ", ".join(["Tensor"] * len(ScanInputs._fields))


torch.library.define("mambavc::scan_2d", f"({_INPUTS}, bool fixed_A) -> Tensor")
torch.library.define(
    "mambavc::scan_2d_backward", f"(Tensor dy, {_INPUTS}, bool fixed_A) -> ({_GRADIENTS})"
)
torch.library.define("mambavc::scan_2d_and_states", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "mambavc::scan_2d_and_states_backward",
    f"(Tensor dy, {_INPUTS}, Tensor states) -> ({_GRADIENTS})",
)
scan_2d = torch.ops.mambavc.scan_2d
scan_2d_backward = torch.ops.mambavc.scan_2d_backward
scan_2d_and_states = torch.ops.mambavc.scan_2d_and_states


def _unpack(inputs: tuple) -> tuple[ScanInputs, bool]:
    *tensors, fixed_A = inputs
    return ScanInputs(*tensors), fixed_A


@torch.library.impl("mambavc::scan_2d", "cpu")
def _forward_on_cpu(*inputs) -> Tensor:
    from kernels import scan_cpu

    return scan_cpu.scan_2d_forward(*_unpack(inputs))


@torch.library.impl("mambavc::scan_2d", "cuda")
def _forward_on_cuda(*inputs) -> Tensor:
    from kernels import scan_triton

    return scan_triton.scan_2d_forward(*_unpack(inputs))


@torch.library.impl("mambavc::scan_2d_backward", "cpu")
def _backward_on_cpu(dy: Tensor, *inputs) -> tuple[Tensor, ...]:
    from kernels import scan_cpu

    return tuple(scan_cpu.scan_2d_backward(dy, *_unpack(inputs)))


@torch.library.impl("mambavc::scan_2d_backward", "cuda")
def _backward_on_cuda(dy: Tensor, *inputs) -> tuple[Tensor, ...]:
    from kernels import scan_triton

    return tuple(scan_triton.scan_2d_backward(dy, *_unpack(inputs)))


@torch.library.impl("mambavc::scan_2d_and_states", "cuda")
def _forward_with_states(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    from kernels import scan_triton

    _, states = _result_and_states(*inputs)
    return scan_triton.scan_2d_forward(ScanInputs(*inputs), True, states), states


@torch.library.impl("mambavc::scan_2d_and_states_backward", "cuda")
def _backward_from_states(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    from kernels import scan_triton

    *inputs, states = inputs
    return tuple(scan_triton.scan_2d_backward(dy, ScanInputs(*inputs), True, states))


def _without_gradient(fixed_A: bool) -> tuple[int, ...]:
    return (ScanInputs._fields.index("A_logs"),) if fixed_A else ()


def _result_and_states(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    from kernels import scan_triton

    inputs = ScanInputs(*inputs)
    shape = scan_triton.kept_shape(inputs)
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    return y, y.new_empty(shape, dtype=inputs.dtype)


make_differentiable("scan_2d", without_gradient=_without_gradient)
make_differentiable(
    "scan_2d_and_states", _result_and_states, lambda: _without_gradient(fixed_A=True), kept=1
)


def scan_macs(batch: int, height: int, width: int, dim: int, dstate: int, dt_rank: int) -> int:
    """Multiply-accumulates of one forward scan over all four directions.

    One step of one channel has ``dt_rank`` for delta, two for each of its ``dstate`` states (the
    update of h and the product with C), and one for D x. As for other layers, products that are
    not added to a sum (delta A, delta x B) and functions of one number are not among them. The
    product that makes x_dbl is a matrix product of its own.
    """
    return 4 * batch * height * width * dim * (dt_rank + 2 * dstate + 1)


def scan_flops(batch: int, height: int, width: int, dim: int, dstate: int, dt_rank: int) -> int:
    """Floating-point operations of the same; a function of one number counts as one.

    Two for each multiply-accumulate; for each state three more: delta A, its exponential, and
    delta x times B; for each channel three more: the bias of delta, softplus, and delta x.
    """
    others = 4 * batch * height * width * dim * (3 * dstate + 3)
    return 2 * scan_macs(batch, height, width, dim, dstate, dt_rank) + others


# A count is of what the recurrence asks for: a fixed A, which saves exponentials, counts the same.
@register_flop_formula([torch.ops.mambavc.scan_2d, torch.ops.mambavc.scan_2d_and_states])
def _forward_flops(*inputs, out_shape=None, **kwargs) -> int:
    shapes = ScanInputs(*inputs[: len(ScanInputs._fields)])
    return scan_flops(*shapes.x, shapes.A_logs[1], shapes.dt_projs_weight[2])


@register_flop_formula(
    [torch.ops.mambavc.scan_2d_backward, torch.ops.mambavc.scan_2d_and_states_backward]
)
def _backward_flops(dy_shape, *inputs, out_shape=None, **kwargs) -> int:
    """As for matrix products: the gradients by both factors cost twice the forward pass."""
    return 2 * _forward_flops(*inputs)
