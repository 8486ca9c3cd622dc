"""What the operators of this folder have in common beside their kernels."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor


def make_differentiable(
    name: str, without_gradient: Callable[..., Collection[int]] = lambda *numbers: ()
) -> None:
    """Let ``torch.ops.mambavc.<name>`` differentiate by ``<name>_backward``.

    The first takes tensors, then perhaps numbers; its result is like the first tensor. The second
    takes the gradient by that result, then the same, and returns the gradients by the tensors. It
    recomputes what it needs: only the inputs are kept between the passes. The compiler gets to
    know the shapes of both.

    Args:
        without_gradient: tells from the numbers which tensors, by place, have no gradient; the
            second operator returns empty tensors, of shape (0,), for these.
    """
    forward, backward = f"mambavc::{name}", f"mambavc::{name}_backward"

    @torch.library.register_fake(forward)
    def result(x, *others):
        return _contiguous_like(x)

    @torch.library.register_fake(backward)
    def gradients(dout, *inputs):
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        missing = without_gradient(*inputs[len(tensors) :])
        return tuple(
            each.new_empty(0) if i in missing else _contiguous_like(each)
            for i, each in enumerate(tensors)
        )

    def save_inputs(ctx, inputs, output) -> None:
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.numbers = inputs[len(tensors) :]

    def differentiate(ctx, dout):
        operator = getattr(torch.ops.mambavc, f"{name}_backward")
        gradients = list(operator(dout.contiguous(), *ctx.saved_tensors, *ctx.numbers))
        for i in without_gradient(*ctx.numbers):
            gradients[i] = None
        return *gradients, *[None] * len(ctx.numbers)

    def refuse(ctx, *gradients):
        raise RuntimeError(f"{name}_backward has no gradients of its own")

    torch.library.register_autograd(forward, differentiate, setup_context=save_inputs)
    torch.library.register_autograd(backward, refuse)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
