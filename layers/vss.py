"""Visual state-space block of MambaVC (arXiv:2405.15413, section 3.2)."""

import torch.nn as nn
from torch import Tensor

from .drop_path import DropPath
from .layer_norm import LayerNorm
from .ss2d import SS2D


class VSSBlock(nn.Module):
    """``x + DropPath(SS2D(LayerNorm(x)))`` on (batch, dim, height, width) maps.

    Args:
        dim: channels of input and output.
        drop_path: probability of dropping the residual branch of a sample in training.
    """

    def __init__(self, dim: int, drop_path: float = 0.0):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.op = SS2D(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x, norm = self.norm.fork(x.permute(0, 2, 3, 1))
        return self.drop_path(self.op(norm), residual=x).permute(0, 3, 1, 2)
