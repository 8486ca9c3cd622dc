"""One network for every rate: learnt gains on the latents (Cui et al., CVPR 2021).

A gain above 1 makes the steps finer with which a channel is rounded, and costs bits. Each of y and
z is multiplied, channel by channel, by one vector before it is rounded and by another one after
it. The vectors are learnt at K anchors and interpolated between them in the log, so that quality
is continuous. All else, the prediction of y included, works on scaled latents: at a fixed quality
the vectors are part of the convolutions beside them, see `SliceHyperprior.at_quality`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from .container import check_quality

# At this weight of the distortion the step of 1 suits what g_a makes by itself: gains start at 1.
UNIT_LMBDA = 0.0130


class GainVectors(NamedTuple):
    """Factors of the latents: (batch or 1, channels, 1, 1), or all None in a single-rate network.

    Attributes:
        y_enc, z_enc: before rounding.
        y_dec, z_dec: after it.
    """

    y_enc: Tensor | None = None
    y_dec: Tensor | None = None
    z_enc: Tensor | None = None
    z_dec: Tensor | None = None

    def to(self, dtype: torch.dtype) -> GainVectors:
        """The same factors in another precision."""
        return GainVectors(*(gain if gain is None else gain.to(dtype) for gain in self))


def scaled(x: Tensor, gain: Tensor | None) -> Tensor:
    """x times a gain; x itself where there is none."""
    return x if gain is None else x * gain


class Gains(nn.Module):
    """Logarithms of the gains at K qualities, which lie evenly from 0 to 100.

    The gains of y start where the size of the steps falls with lambda^(-1/2), as the distortion of
    uniform quantisation asks for: gains that start equal are slow to part (and may never do).

    Args:
        qualities: K, 2 or more.
        M, Z: channels of y and of z.
        lmbda_range: weights of the distortion at quality 0 and 100; geometric between them.

    Raises:
        ValueError: there are too few qualities, or the weights are not positive and rising.
    """

    def __init__(self, qualities: int, M: int, Z: int, lmbda_range: Sequence[float]):
        super().__init__()
        if qualities < 2:
            raise ValueError(f"qualities={qualities} is too few; give 2 or more, or 0 for one rate")
        lowest, highest = lmbda_range
        if not 0 < lowest < highest < math.inf:
            raise ValueError(f"lmbda_range={lmbda_range} should be two positive numbers that rise")
        self.lmbda_range = (lowest, highest)
        y_enc = 0.5 * (self.lmbda(torch.linspace(0, 100, qualities)) / UNIT_LMBDA).log()
        self.y_enc = nn.Parameter(y_enc[:, None].repeat(1, M))
        self.y_dec = nn.Parameter(-self.y_enc.detach())
        self.z_enc = nn.Parameter(torch.zeros(qualities, Z))
        self.z_dec = nn.Parameter(torch.zeros(qualities, Z))

    def lmbda(self, quality: Tensor) -> Tensor:
        """Weights of the distortion that qualities were trained with; like quality."""
        lowest, highest = self.lmbda_range
        return lowest * torch.exp(quality * (math.log(highest / lowest) / 100))

    def forward(self, quality: Tensor) -> GainVectors:
        """Gains at qualities (batch or 1,), in the precision of the parameters.

        Qualities beyond the ends are taken for the ends. The host waits for nothing.
        """
        anchors, M = self.y_enc.shape
        logs = torch.cat([self.y_enc, self.y_dec, self.z_enc, self.z_dec], dim=1)
        position = quality.to(logs.dtype).clamp(0, 100) * ((anchors - 1) / 100)
        # How near each anchor is: all but the two neighbours' are 0. A sum of products in place of
        # a look-up, whose gradient would add up in another order each time on a GPU.
        near = position[:, None] - torch.arange(anchors, device=logs.device)
        near = (1 - near.abs()).clamp(min=0)
        gains = (near[:, :, None] * logs).sum(1).exp()
        Z = self.z_enc.shape[1]
        return GainVectors(*gains[:, :, None, None].split([M, M, Z, Z], dim=1))


def in_float64(gains: Gains | None) -> Gains | None:
    """A copy of a network's gains, if it has any, for coding and for folding."""
    return gains and copy.deepcopy(gains).double()


def gains_at(gains: Gains | None, quality: float | Tensor | None) -> GainVectors:
    """Gains of a network at qualities, or none for a network of a single rate.

    Args:
        quality: 0 to 100, or a floating-point tensor (batch,) of them on the network's device,
            whose values are not checked; None for a network of a single rate.

    Raises:
        ValueError: a quality is missing, or is out of range, or the network has a single rate.
    """
    if gains is None:
        if quality is not None:
            raise ValueError("this network has a single rate; leave the quality out")
        return GainVectors()
    if quality is None:
        raise ValueError("this network codes at any quality from 0 to 100; give one")
    if not isinstance(quality, Tensor):
        # Filled on the device, which the host need not wait for.
        quality = gains.y_enc.new_full((1,), check_quality(quality))
    return gains(quality)
