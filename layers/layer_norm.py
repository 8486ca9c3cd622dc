"""LayerNorm in the dtype of what follows it."""

import torch.nn as nn
from torch import Tensor

import kernels


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis, in autocast too without copies in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to the same shape; for its dtype see `kernels.layer_norm`."""
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, to be added to a residual branch, and its norm, from which that starts."""
        return kernels.fork_layer_norm(x, self.weight, self.bias, self.eps)
