"""Window attention and Swin blocks (Liu et al., arXiv:2103.14030)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import kernels

from .compressai import conv1x1, conv3x3
from .conv_chain import Conv1x1, ConvChain, at_each_pixel, fused
from .drop_path import DropPath
from .layer_norm import LayerNorm


def _hidden_pairs(window_size: int, shift: int) -> Tensor:
    """True where two pixels of a shifted window may not see each other: (2, 2, p*p, p*p).

    Only windows of the last row and of the last column wrap around the map's end; the first two
    axes say whether a window is one of the last row, and one of the last column.
    """
    wrapped = torch.arange(window_size) >= window_size - shift
    wrapped = torch.stack((torch.zeros_like(wrapped), wrapped)).int()
    regions = (2 * wrapped[:, None, :, None] + wrapped[None, :, None, :]).flatten(2)
    return regions[:, :, :, None] != regions[:, :, None, :]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` of (..., pixels, head_dim) tensors."""
    if q.is_cuda and q.dtype == torch.float64:
        # For which PyTorch has no fused kernel there, and three times as many others.
        return ((q * scale) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside square windows, with a learned relative position bias.

    It works on channels-last maps. Those whose sides are not multiples of the window are padded
    with zeros at the bottom and the right and cropped again, so any size from 1x1 up works.

    Args:
        dim: channels of the map, a multiple of ``head_dim``.
        head_dim: channels of one head.
        window_size: side of a window in pixels.
        shift: pixels by which the windows are moved up and left (0: not at all). Pixels that
            become neighbours only through the cyclic shift do not see each other.
    """

    def __init__(self, dim: int, head_dim: int, window_size: int, shift: int = 0):
        super().__init__()
        if dim % head_dim:
            raise ValueError(
                f"dim {dim} is not a multiple of head_dim {head_dim}; choose one that divides it"
            )
        self.num_heads = dim // head_dim
        self.window_size = window_size
        self.shift = shift
        self.scale = head_dim**-0.5
        self.embedding_layer = nn.Linear(dim, 3 * dim)
        self.relative_position_params = nn.Parameter(
            torch.empty(self.num_heads, 2 * window_size - 1, 2 * window_size - 1)
        )
        nn.init.trunc_normal_(self.relative_position_params, std=0.02)
        self.linear = nn.Linear(dim, dim)
        self.register_buffer("_hidden", _hidden_pairs(window_size, shift), persistent=False)

    def position_bias(self) -> Tensor:
        """What is added to the logits of each pair of pixels of a window: (heads, p*p, p*p)."""
        p = self.window_size
        # Entry i - j + p - 1 of an axis belongs to pixels i and j: windows on the parameters
        # hold them in rising order of i and falling order of j. Unlike those of an indexed
        # tensor, their gradients are summed without sorting.
        windows = self.relative_position_params.unfold(1, p, 1).unfold(2, p, 1)
        return windows.flip(-2, -1).reshape(self.num_heads, p * p, p * p)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (batch, height, width, dim) to the same shape, and add a residual if there is one."""
        if kernels.fuses_window_attention(x, self.window_size):
            qkv = at_each_pixel([self.embedding_layer], x)
            x = kernels.window_attention(qkv, self.relative_position_params, self.shift)
            return at_each_pixel([self.linear], x, residual)
        height, width = x.shape[1:3]
        p = self.window_size
        is_padded = height % p > 0 or width % p > 0
        if is_padded:
            x = F.pad(x, (0, 0, 0, -width % p, 0, -height % p))
        rows, columns = x.shape[1] // p, x.shape[2] // p
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))

        x = rearrange(x, "b (r p) (c q) d -> b (r c) (p q) d", p=p, q=p)
        q, k, v = rearrange(
            self.embedding_layer(x), "b w n (s h d) -> s (b w) h n d", s=3, h=self.num_heads
        )
        bias = self.position_bias()
        if self.shift:
            bias = bias.masked_fill(self._hidden[:, :, None], -torch.inf)  # (2, 2, heads, ...)
            # All rows and columns of windows but the last get the bias of those that do not wrap.
            bias = torch.cat((bias[:1].expand(rows - 1, -1, -1, -1, -1), bias[1:]))
            bias = torch.cat((bias[:, :1].expand(-1, columns - 1, -1, -1, -1), bias[:, 1:]), dim=1)
            bias = bias.flatten(0, 1).repeat(x.shape[0], 1, 1, 1)  # (batch * windows, heads, ...)
        x = _attend(q, k, v, bias.to(q.dtype), self.scale)
        x = rearrange(x, "(b w) h n d -> b w n (h d)", w=rows * columns)
        x = self.linear(x)
        x = rearrange(x, "b (r c) (p q) d -> b (r p) (c q) d", r=rows, p=p)

        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        if is_padded:
            x = x[:, :height, :width]
        return x if residual is None else residual + x


class SwinBlock(nn.Module):
    """Pre-norm transformer block with window attention on (batch, dim, height, width) maps.

    The hidden layer of its MLP is four times as wide.

    Args:
        dim, head_dim, window_size, shift: see `WindowAttention`.
        drop_path: probability of dropping a residual branch in training.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        window_size: int = 8,
        shift: int = 0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.ln1 = LayerNorm(dim)
        self.msa = WindowAttention(dim, head_dim, window_size, shift)
        self.drop_path = DropPath(drop_path)
        self.ln2 = LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x, norm = self.ln1.fork(x.permute(0, 2, 3, 1))
        if self.drop_path.is_active:
            x, norm = self.ln2.fork(self.drop_path(self.msa(norm), residual=x))
            x = self.drop_path(self.mlp(norm), residual=x)
        else:
            x, norm = self.ln2.fork(self.msa(norm, residual=x))
            x = at_each_pixel(self.mlp, norm, residual=x)
        return x.permute(0, 3, 1, 2)


class _ResidualUnit(nn.Module):
    """``ReLU(x + convolutions(x))``, at half the width inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Sequential(
            conv1x1(dim, dim // 2),
            nn.ReLU(inplace=True),
            conv3x3(dim // 2, dim // 2),
            nn.ReLU(inplace=True),
            conv1x1(dim // 2, dim),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, dim, height, width) to the same shape."""
        return self.relu(self.conv(x) + x)


class _ResidualUnits(ConvChain):
    """Residual units, and perhaps convolutions behind: one chain where those are fused."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, dim, height, width) to the same shape."""
        if not kernels.fuses_convolutions(x):
            return nn.Sequential.forward(self, x)
        layers, skips, count = [], {}, 0
        for part in self:
            if isinstance(part, _ResidualUnit):
                layers += [*part.conv, part.relu]
                skips[count + 2] = count  # its third convolution adds what its first one reads
                count += 3
            else:
                layers.append(part)
                count += 1
        return fused(layers, x, skips=skips)


class SwinAttentionBlock(nn.Module):
    """Attention block (Cheng et al., arXiv:2001.01568) with Swin blocks before its mask
    (Liu et al., arXiv:2303.14978).

    A 1x1 convolution reduces the input to ``hidden_dim`` channels; the trunk ``conv_a`` is gated
    by the sigmoid of ``conv_b`` applied to the output of two Swin blocks, of which the second has
    shifted windows; a second 1x1 convolution restores the width.

    Args:
        dim: channels of input and output.
        hidden_dim: channels inside.
        head_dim, window_size: see `WindowAttention`.
    """

    def __init__(self, dim: int, hidden_dim: int, head_dim: int, window_size: int):
        super().__init__()
        self.conv_a = _ResidualUnits(*[_ResidualUnit(hidden_dim) for _ in range(3)])
        self.conv_b = _ResidualUnits(
            *[_ResidualUnit(hidden_dim) for _ in range(3)], conv1x1(hidden_dim, hidden_dim)
        )
        self.in_conv = Conv1x1(dim, hidden_dim)
        self.non_local_block = nn.Sequential()
        for name, shift in (("block_1", 0), ("block_2", window_size // 2)):
            block = SwinBlock(hidden_dim, head_dim, window_size, shift)
            self.non_local_block.add_module(name, block)
        self.out_conv = Conv1x1(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, dim, height, width) to the same shape."""
        x = self.in_conv(x)
        gate = torch.sigmoid(self.conv_b(self.non_local_block(x)))
        return self.out_conv(x + self.conv_a(x) * gate)
