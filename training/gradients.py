"""The gradients of many parameters as parts of one vector."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

ALIGNMENT = 64  # numbers; a kernel reads 16 bytes at a time of what lies at a multiple of these


class FlatGradients:
    """Gradients in one vector.

    To clip them, or to average them over processes, then takes one kernel or message, and little
    time of the host, where a network of a thousand parameters takes as many.

    Args:
        parameters: dense, of one dtype and on one device.

    Attributes:
        vector: all gradients, and zeros between them.
    """

    def __init__(self, parameters: Sequence[Parameter]):
        sizes = (-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters)
        *starts, size = itertools.accumulate(sizes, initial=0)
        self.parameters = parameters
        self.vector = parameters[0].detach().new_zeros(size)
        # They lie in memory as the parameters do: a convolution's channels last.
        self.parts = [
            self.vector.as_strided(p.shape, p.stride(), start)
            for p, start in zip(parameters, starts, strict=True)
        ]

    def clear(self) -> None:
        """Leave the parameters without gradients, so that a backward pass has none to add to."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def take(self) -> None:
        """Copy the gradients that a backward pass has made, and give the parameters the copies."""
        found = [
            (p, part)
            for p, part in zip(self.parameters, self.parts, strict=True)
            if p.grad is not None
        ]
        self.vector.zero_()  # also what is between them, which a factor that is NaN has reached
        torch._foreach_copy_([part for _, part in found], [p.grad for p, _ in found])
        for parameter, part in found:
            parameter.grad = part

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm is at most ``max_norm``; return it as it was."""
        norm = torch.linalg.vector_norm(self.vector)
        self.vector *= (max_norm / (norm + 1e-6)).clamp(max=1)  # as in PyTorch's `clip_grad_norm_`
        return norm
