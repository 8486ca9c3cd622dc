"""Convolutions with kernels of 3x3 for processors on which products are what takes the time."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class WinogradConv2d(nn.Module):
    """A convolution of stride 1 and padding 1 that takes 16 products for four pixels, not 36.

    Each tile of 4x4 pixels is transformed, multiplied by the transformed kernels, and transformed
    back to 2x2 pixels: F(2x2, 3x3) of Lavin and Gray (arXiv:1509.09308, section 4.1). In float64 a
    CPU takes half the time of one product with all patches. Rounding errors are several times
    those of a plain sum.

    Args:
        convolution: with a bias; its values and dtype are taken over.

    Raises:
        ValueError: it has another kernel, padding or stride.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        c = convolution
        sizes = c.kernel_size, c.padding, c.stride, c.dilation, c.groups
        if sizes != ((3, 3), (1, 1), (1, 1), (1, 1), 1):
            raise ValueError(f"expected a kernel of 3x3, padding and stride of 1, got {c}")
        weight = convolution.weight
        transform = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
        tiles = torch.einsum("ai,oqij,bj->aboq", transform, weight, transform)
        self.register_buffer("weight", tiles.flatten(0, 1).contiguous())  # (16, out, in)
        self.register_buffer("bias", convolution.bias[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, height, width) to (batch, out, height, width)."""
        height, width = x.shape[-2:]
        rows, columns = -(-height // 2), -(-width // 2)  # of tiles, which overlap by two pixels
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        tiles = []
        for line in _to_tile([x[:, :, i : i + 2 * rows - 1 : 2] for i in range(4)]):
            tiles += _to_tile([line[..., j : j + 2 * columns - 1 : 2] for j in range(4)])
        tiles = torch.stack(tiles, dim=1)  # (batch, 16, in, rows, columns)
        products = (self.weight @ tiles.flatten(3)).unflatten(1, (4, 4))
        lines = [_to_pixels(line.unbind(1)) for line in _to_pixels(products.unbind(1))]
        y = torch.stack([torch.stack(line, dim=-1) for line in lines], dim=2)
        # (batch, out, 2, rows * columns, 2) to (batch, out, rows, 2, columns, 2)
        y = y.unflatten(3, (rows, columns)).transpose(2, 3).flatten(4, 5).flatten(2, 3)
        return y[..., :height, :width] + self.bias


def _to_tile(values: list[Tensor]) -> list[Tensor]:
    a, b, c, d = values
    return [a - c, b + c, c - b, b - d]


def _to_pixels(values: tuple[Tensor, ...]) -> list[Tensor]:
    a, b, c, d = values
    return [a + b + c, b - c - d]
