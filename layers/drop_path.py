"""Stochastic depth (Huang et al., arXiv:1603.09382)."""

import torch
import torch.nn as nn
from torch import Tensor


class DropPath(nn.Module):
    """In training, set each sample of a residual branch to zero with a probability.

    The samples that are kept are divided by the probability of that, so that the mean stays.
    timm has the same layer, but importing it takes seconds.

    Args:
        drop_prob: from 0 up to, but not, 1.
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_prob must be at least 0 and below 1, got {drop_prob}")
        self.drop_prob = drop_prob

    @property
    def is_active(self) -> bool:
        """Whether it does anything, in the mode it is in."""
        return self.drop_prob > 0 and self.training

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (batch, ...) to the same shape, and add a residual of that shape if there is one."""
        if not self.is_active:
            return x if residual is None else residual + x
        keep = 1 - self.drop_prob
        scale = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)
        # One pass through memory in place of two.
        return x * scale if residual is None else torch.addcmul(residual, x, scale)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"
