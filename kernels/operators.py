"""What the operators of this folder have in common beside their kernels."""

import torch
from torch import Tensor
from torch.library import CustomOpDef


def make_differentiable(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Let an operator differentiate by another, and let the compiler know the shapes of both.

    Args:
        forward: takes tensors, then perhaps numbers; its result is like the first tensor.
        backward: takes the gradient by that result, then the same; returns the gradients by the
            tensors. It recomputes what it needs, so only the inputs are kept between the passes.
    """

    @forward.register_fake
    def _(x, *others):
        return _contiguous_like(x)

    @backward.register_fake
    def _(dout, *inputs):
        return tuple(_contiguous_like(each) for each in inputs if isinstance(each, Tensor))

    def save_inputs(ctx, inputs, output) -> None:
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.numbers = inputs[len(tensors) :]

    def gradients(ctx, dout):
        by_tensors = backward(dout.contiguous(), *ctx.saved_tensors, *ctx.numbers)
        return *by_tensors, *[None] * len(ctx.numbers)

    forward.register_autograd(gradients, setup_context=save_inputs)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
