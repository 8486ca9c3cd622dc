"""A chain of convolutions with activations, on maps of few pixels, as fused kernels."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels import backends

FEW_PIXELS = 1 << 15  # on more a product is long enough for its library to pay


def fuses_convolutions(x: Tensor) -> bool:
    """Whether `conv_chain` takes over from PyTorch's convolutions for a map of any layout.

    See `backends.fused_precision`. Other maps and devices keep PyTorch's kernels, to the last bit.
    """
    return backends.fused_precision(x) is not None and x.numel() > 0


def fuses_products(x: Tensor) -> bool:
    """Whether `conv_chain` also takes over linear layers and kernels of 1x1: on few pixels.

    Args:
        x: (batch, channels, height, width).
    """
    return fuses_convolutions(x) and x.numel() <= FEW_PIXELS * x.shape[1]


def conv_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[str | None],
    residual: Tensor | None = None,
    skips: Mapping[int, int] | None = None,
) -> Tensor:
    """Convolutions of stride 1 with zero padding that keeps the size, each with its activation.

    Sums are float32, or float64; what lies between layers is rounded to half precision where that
    is the precision, as PyTorch does in autocast, and the factors of float32 products to TF32. But
    for float64 it is differentiable once in all tensors. The same input gives the same bits every
    time.

    Args:
        x: (batch, channels, height, width), for which `fuses_convolutions` holds; quickest where
            it lies channels last.
        weights: (out, in, side, side), side 1 or 3.
        biases: (out,).
        activations: ``relu``, ``gelu`` or None.
        residual: (batch, out, height, width), added before the last activation; quickest where it
            lies channels last.
        skips: for layers that add one of the chain's own maps before their activation, its index:
            x is 0, what layer i makes is i + 1. Each map is added once at most, none by a last
            layer that adds the residual.

    Returns:
        (batch, out, height, width) in that precision, channels last.

    Raises:
        ValueError: the last layer is to add a map besides the residual.
    """
    if residual is not None and len(weights) - 1 in (skips or {}):
        raise ValueError("the last layer adds the residual or a map of the chain; leave out one")
    dtype = backends.fused_precision(x)
    parameters = []
    for weight, bias in zip(weights, biases, strict=True):
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        parameters += [weight, bias.to(dtype)]
    residual = None if residual is None else _pixels(residual, dtype)
    out = _ConvChain.apply(
        _pixels(x, dtype), residual, tuple(activations), skips or {}, *parameters
    )
    return out.permute(0, 3, 1, 2)


def _pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).permute(0, 2, 3, 1).contiguous()


class _ConvChain(torch.autograd.Function):
    """Of contiguous maps (batch, height, width, channels)."""

    @staticmethod
    def forward(ctx, x, residual, activations, skips, *parameters):
        from kernels.conv_chain_triton import conv_forward

        weights, biases = parameters[::2], parameters[1::2]
        maps, gates = [x], []
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            added = maps[skips[i]] if i in skips else None
            if i == len(weights) - 1 and residual is not None:
                added = residual
            out, gate = conv_forward(maps[i], weight, bias, activations[i], added)
            maps.append(out)
            gates.append(gate)
        ctx.activations, ctx.skips = activations, skips
        ctx.save_for_backward(*maps[:-1], *gates, *weights)
        return maps[-1]

    @staticmethod
    def backward(ctx, dout):
        from kernels.conv_chain_triton import chain_backward

        count = len(ctx.activations)
        saved = ctx.saved_tensors
        maps, gates, weights = saved[:count], saved[count : 2 * count], saved[2 * count :]
        dout = dout.contiguous()
        if ctx.activations[-1] == "relu":
            dout = torch.ops.aten.threshold_backward(dout, gates[-1], 0)
        elif ctx.activations[-1] == "gelu":
            dout = torch.ops.aten.gelu_backward(dout, gates[-1])
        dx, gradients = chain_backward(
            dout, maps, gates, weights, ctx.activations, ctx.skips, ctx.needs_input_grad[0]
        )
        parameters = [gradient for pair in gradients for gradient in pair]
        dresidual = dout if ctx.needs_input_grad[1] else None
        return dx, dresidual, None, None, *parameters
