"""A chain of convolutions with activations, on maps of few pixels, in half precision or float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import backends


def fuses_convolutions(x: Tensor) -> bool:
    """Whether `conv_chain` takes over from PyTorch's convolutions for a map of any layout.

    It does so on a GPU, in half precision, which autocast may bring, and in float64 where no
    gradient is recorded. Other maps and devices keep PyTorch's kernels, to the last bit.
    """
    return backends.fused_precision(x) is not None and x.numel() > 0


def conv_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[str | None],
    residual: bool = False,
) -> Tensor:
    """Convolutions of stride 1 with zero padding that keeps the size, each with its activation.

    Sums are float32, or float64; what lies between layers is rounded to half precision, as PyTorch
    does in autocast. In half precision it is differentiable once in all tensors. The same input
    gives the same bits every time.

    Args:
        x: (batch, channels, height, width), for which `fuses_convolutions` holds; quickest where
            it lies channels last.
        weights: (out, in, side, side), side 1 or 3.
        biases: (out,).
        activations: ``relu``, ``gelu`` or None.
        residual: add x before the last activation.

    Returns:
        (batch, out, height, width) in half precision or float64, channels last.
    """
    dtype = backends.fused_precision(x)
    parameters = []
    for weight, bias in zip(weights, biases, strict=True):
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        parameters += [weight, bias.to(dtype)]
    x = x.to(dtype).permute(0, 2, 3, 1).contiguous()
    out = _ConvChain.apply(x, tuple(activations), residual, *parameters)
    return out.permute(0, 3, 1, 2)


class _ConvChain(torch.autograd.Function):
    """Of a contiguous map (batch, height, width, channels)."""

    @staticmethod
    def forward(ctx, x, activations, residual, *parameters):
        from kernels.conv_chain_triton import conv_forward

        weights, biases = parameters[::2], parameters[1::2]
        maps, gates = [x], []
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
            added = x if residual and i == len(weights) else None
            out, gate = conv_forward(maps[-1], weight, bias, activations[i - 1], added)
            maps.append(out)
            gates.append(gate)
        ctx.activations, ctx.residual = activations, residual
        ctx.save_for_backward(*maps[:-1], *gates, *weights)
        return maps[-1]

    @staticmethod
    def backward(ctx, dout):
        from kernels.conv_chain_triton import conv_backward_map, conv_backward_parameters

        count = len(ctx.activations)
        saved = ctx.saved_tensors
        maps, gates, weights = saved[:count], saved[count : 2 * count], saved[2 * count :]
        dout = dout.contiguous()
        if ctx.activations[-1] == "relu":
            dout = torch.ops.aten.threshold_backward(dout, gates[-1], 0)
        elif ctx.activations[-1] == "gelu":
            dout = torch.ops.aten.gelu_backward(dout, gates[-1])
        douts = [dout]
        for i in reversed(range(1, count)):
            douts.append(
                conv_backward_map(douts[-1], weights[i], ctx.activations[i - 1], gates[i - 1], None)
            )
        dx = None
        if ctx.needs_input_grad[0]:
            added = dout if ctx.residual else None
            dx = conv_backward_map(douts[-1], weights[0], None, None, added)
        pairs = list(zip(reversed(douts), maps, strict=True))
        parameters = [g for pair in conv_backward_parameters(pairs, weights) for g in pair]
        return dx, None, None, *parameters
