"""Convolutions and linear layers one after the other, without a change of the map's size."""

from collections.abc import Iterable, Mapping

import torch.nn as nn
from torch import Tensor

import kernels

_NAMES = {nn.ReLU: "relu", nn.GELU: "gelu"}


class ConvChain(nn.Sequential):
    """Convolutions of stride 1 with kernels of 1x1 or 3x3, and perhaps a ReLU or GELU behind each.

    Where `kernels.fuses_convolutions` holds they run as `kernels.conv_chain`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to other channels."""
        return fused(self, x) if kernels.fuses_convolutions(x) else super().forward(x)


class Conv1x1(nn.Conv2d):
    """Convolution with a kernel of 1x1, on few pixels by `kernels.conv_chain` where that is faster.

    In half precision the gradient of its bias is then made beside that of its weight. PyTorch takes
    one more launch for it, of the longest.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to other channels."""
        return fused([self], x) if kernels.fuses_products(x) else super().forward(x)


def at_each_pixel(layers: Iterable[nn.Module], x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Linear layers, perhaps with a GELU behind each, as `Conv1x1` does convolutions.

    Args:
        layers: `torch.nn.Linear` with bias and `torch.nn.GELU`.
        x: (batch, height, width, channels).
        residual: of the result's shape, added to it.
    """
    image = x.permute(0, 3, 1, 2)
    if kernels.fuses_products(image):
        residual = None if residual is None else residual.permute(0, 3, 1, 2)
        return fused(layers, image, residual).permute(0, 2, 3, 1)
    for layer in layers:
        x = layer(x)
    return x if residual is None else residual + x


def fused(
    layers: Iterable[nn.Module],
    x: Tensor,
    residual: Tensor | None = None,
    skips: Mapping[int, int] | None = None,
) -> Tensor:
    """`kernels.conv_chain` of layers, of which activations belong to what is before them.

    Args:
        layers: convolutions, or linear layers in place of kernels of 1x1; `torch.nn.ReLU` and
            `torch.nn.GELU`.
        x, residual: (batch, channels, height, width).
        skips: see there.
    """
    weights, biases, activations = [], [], []
    for layer in layers:
        if type(layer) in _NAMES:
            activations[-1] = _NAMES[type(layer)]
            continue
        is_linear = isinstance(layer, nn.Linear)
        weights.append(layer.weight[:, :, None, None] if is_linear else layer.weight)
        biases.append(layer.bias)
        activations.append(None)
    return kernels.conv_chain(x, weights, biases, activations, residual, skips)
