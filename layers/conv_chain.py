"""Convolutions one after the other, without a change of the map's size."""

import torch.nn as nn
from torch import Tensor

import kernels

_NAMES = {nn.ReLU: "relu", nn.GELU: "gelu"}


class ConvChain(nn.Sequential):
    """Convolutions of stride 1 with kernels of 1x1 or 3x3, and perhaps a ReLU or GELU behind each.

    In half precision on a GPU they run as `kernels.conv_chain`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to other channels."""
        return self.fused(x) if kernels.fuses_convolutions(x) else super().forward(x)

    def fused(self, x: Tensor, last: str | None = None, residual: bool = False) -> Tensor:
        """The same by kernels, with x added if asked for and, if given, one more activation."""
        weights, biases, activations = [], [], []
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                weights.append(layer.weight)
                biases.append(layer.bias)
                activations.append(None)
            else:
                activations[-1] = _NAMES[type(layer)]
        activations[-1] = last or activations[-1]
        return kernels.conv_chain(x, weights, biases, activations, residual)
