"""The paper's comparison networks: MambaVC with another block in place of the VSS block."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from layers import DropPath, SwinBlock

from ._registry import register_model
from .mambavc import MambaVC

HEAD_DIM, WINDOW = 32, 8


class _ResidualBlock(nn.Module):
    """``x + DropPath(conv(GELU(conv(x))))`` with 3x3 convolutions that keep the width.

    GELU is what the Swin block and the entropy model use, so the variants differ in how they mix
    pixels only. Nothing follows the second convolution: as in the other two blocks, the branch
    ends in a linear map and the residual stream stays unbounded.
    """

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, dim, height, width) to the same shape."""
        return x + self.drop_path(self.conv2(F.gelu(self.conv1(x))))


@register_model("convvc")
class ConvVC(MambaVC):
    """The CNN variant (arXiv:2405.15413): residual blocks of two 3x3 convolutions.

    Args:
        As of `MambaVC`.
    """

    def make_block(self, dim: int, drop_path: float, index: int) -> nn.Module:
        return _ResidualBlock(dim, drop_path)


@register_model("swinvc")
class SwinVC(MambaVC):
    """The Transformer variant (arXiv:2405.15413): Swin blocks.

    Windows of 8x8 pixels, 32 channels per head (all of them in narrower networks), MLP ratio 4;
    every second block of a stage shifts its windows by 4.

    Args:
        As of `MambaVC`; ``2 * N`` is at most 32 or a multiple of 32.
    """

    def make_block(self, dim: int, drop_path: float, index: int) -> nn.Module:
        return SwinBlock(
            dim,
            head_dim=min(HEAD_DIM, dim),
            window_size=WINDOW,
            shift=WINDOW // 2 if index % 2 else 0,
            drop_path=drop_path,
        )
