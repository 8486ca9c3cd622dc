"""Products of all pixels of a map with one matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backends


def project(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.linear` without bias, on channels-last maps.

    On a CPU, float32 maps are convolved with kernels of 1x1: PyTorch gives these to oneDNN, which
    took 0.45 to 0.9 of the time of MKL's product on an AMD EPYC, for maps from 64x96 on. The last
    bits may depend on the number of threads.

    Args:
        x: (batch, height, width, dim), not empty.
        weight: (out, dim), in x's dtype.

    Returns:
        (batch, height, width, out).
    """
    if backends.runs_onednn(x):
        return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None]).permute(0, 2, 3, 1)
    return F.linear(x, weight)


def project_halves(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`project` by both halves of a matrix, into two maps.

    Where layers run fused kernels the gradients by x are added inside the second product.
    """
    dtype = backends.fused_precision(x)
    if dtype is None or torch.compiler.is_compiling():
        first, second = weight.chunk(2)
        return project(x, first), project(x, second)
    return _Halves.apply(x.to(dtype), weight.to(dtype))


def _turned(weight: Tensor) -> Tensor:
    """The same, in float32 with its columns contiguous, for the gradient by a map.

    The units that multiply TF32 read both factors along the channels that are summed over.
    """
    return weight.mT.contiguous().mT if weight.dtype == torch.float32 else weight


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return tuple(F.linear(x, half) for half in weight.chunk(2))

    @staticmethod
    def backward(ctx, *douts):
        x, weight = ctx.saved_tensors
        pixels = x.flatten(0, -2)
        first, second = (dout.flatten(0, -2) for dout in douts)
        upper, lower = weight.chunk(2)
        dx = (first @ _turned(upper)).addmm_(second, _turned(lower))
        dweight = torch.empty_like(weight)
        for dout, half in zip((first, second), dweight.chunk(2), strict=True):
            torch.mm(dout.mT, pixels, out=half)
        return dx.view_as(x), dweight


def fork_project(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x itself and its `project`.

    Where layers run fused kernels, the product that makes the gradient by x adds the gradient by
    the first result, in its memory: that has to be an operation's argument, one that returns a new
    gradient which nothing else refers to.
    """
    if backends.fused_precision(x) != x.dtype or torch.compiler.is_compiling():
        return x, project(x, weight)
    return _Fork.apply(x, weight)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x, F.linear(x, weight)

    @staticmethod
    def backward(ctx, dx, dout):
        x, weight = ctx.saved_tensors
        dout = dout.flatten(0, -2)
        dx = dx.contiguous()
        dx.view(-1, dx.shape[-1]).addmm_(dout, _turned(weight))
        return dx, dout.mT @ x.flatten(0, -2)
