"""What the operators of this folder have in common beside their kernels."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor


def _contiguous_like(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def operator(name: str) -> Callable[[Callable], Callable]:
    """Make a function ``torch.ops.mambavc.<name>``, for tensors of CPUs and GPUs.

    It changes none of its arguments; their annotations become the operator's. What
    `torch.library.custom_op` makes would import PyTorch's compiler at its first call: seconds.
    """

    def define(function: Callable) -> Callable:
        qualified = f"mambavc::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, ("cpu", "cuda"), function)
        return getattr(torch.ops.mambavc, name)

    return define


def make_differentiable(
    name: str,
    result: Callable[..., Tensor | tuple[Tensor, ...]] = _contiguous_like,
    without_gradient: Callable[..., Collection[int]] = lambda *numbers: (),
    kept: int = 0,
) -> None:
    """Let ``torch.ops.mambavc.<name>`` differentiate by ``<name>_backward``.

    The first takes tensors, then perhaps numbers. The second takes the gradient by its result, then
    the same, and returns the gradients by the tensors. It recomputes what it needs: only the inputs
    are kept between the passes. The compiler gets to know the shapes of both.

    Args:
        result: makes the result's like from the arguments; by default it is like the first.
        without_gradient: tells from the numbers which tensors, by place, have no gradient; the
            second operator returns empty tensors, of shape (0,), for these.
        kept: number of tensors that the first returns behind its result for the second, which takes
            them behind the other tensors. They have no gradient.
    """
    forward, backward = f"mambavc::{name}", f"mambavc::{name}_backward"

    torch.library.register_fake(forward, result)

    @torch.library.register_fake(backward)
    def gradients(dout, *inputs):
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        missing = without_gradient(*inputs[len(tensors) :])
        return tuple(
            each.new_empty(0) if i in missing else _contiguous_like(each)
            for i, each in enumerate(tensors[: len(tensors) - kept])
        )

    def save_inputs(ctx, inputs, output) -> None:
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        ctx.numbers = inputs[len(tensors) :]
        others = output[1:] if kept else ()
        ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(*tensors, *others)

    def differentiate(ctx, dout, *others):
        operator = getattr(torch.ops.mambavc, f"{name}_backward")
        gradients = list(operator(dout.contiguous(), *ctx.saved_tensors, *ctx.numbers))
        for i in without_gradient(*ctx.numbers):
            gradients[i] = None
        return *gradients, *[None] * len(ctx.numbers)

    def refuse(ctx, *gradients):
        raise RuntimeError(f"{name}_backward has no gradients of its own")

    torch.library.register_autograd(forward, differentiate, setup_context=save_inputs)
    torch.library.register_autograd(backward, refuse)
