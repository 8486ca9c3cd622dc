"""Convolutions with kernels of 3x3 for processors on which products are what takes the time."""

from collections.abc import Sequence

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
        """Map (batch, in, height, width) to (batch, out, height, width), without gradients."""
        batch, channels, height, width = x.shape
        rows, columns = -(-height // 2), -(-width // 2)  # of tiles, which overlap by two pixels
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        # Even and odd columns are taken apart once; all sums then run along lines.
        halves = [x[..., i::2].contiguous() for i in range(2)]
        halves = [_to_tile([h[:, :, i : i + 2 * rows - 1 : 2] for i in range(4)]) for h in halves]
        tiles = x.new_empty(batch, 4, 4, channels, rows, columns)
        for line, even, odd in zip(tiles.unbind(1), *halves, strict=True):
            pixels = even[..., :-1], odd[..., :-1], even[..., 1:], odd[..., 1:]
            _to_tile(pixels, out=line.unbind(1))
        products = self.weight @ tiles.flatten(1, 2).flatten(3)
        products = products.reshape(batch, 4, 4, -1, rows, columns)
        products[:, 1, 1] += self.bias  # each pixel of a tile takes this one once
        y = x.new_empty(batch, products.shape[3], rows, 2, columns, 2)
        for i, line in enumerate(_to_pixels(products.unbind(1))):
            _to_pixels(line.unbind(1), out=y[:, :, :, i].unbind(-1))
        return y.reshape(batch, -1, 2 * rows, 2 * columns)[..., :height, :width]


def _to_tile(values: Sequence[Tensor], out: Sequence[Tensor | None] = 4 * (None,)) -> list[Tensor]:
    a, b, c, d = values
    return [
        torch.sub(a, c, out=out[0]),
        torch.add(b, c, out=out[1]),
        torch.sub(c, b, out=out[2]),
        torch.sub(b, d, out=out[3]),
    ]


def _to_pixels(
    values: Sequence[Tensor], out: Sequence[Tensor | None] = 2 * (None,)
) -> list[Tensor]:
    a, b, c, d = values
    return [torch.add(a + b, c, out=out[0]), torch.sub(b - c, d, out=out[1])]
