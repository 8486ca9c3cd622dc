"""Channel-wise autoregressive entropy model: one slice loop for all uses (arXiv:2007.08739)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from kernels.graphs import side_by_side
from layers.compressai import EntropyBottleneck, GaussianConditional

from .container import BitstreamError
from .rans import MAX_SYMBOL, SymbolDecoder, Tables, encode

# A scale whose logarithm lies this close to a boundary of the scale table may get another table
# index on another device. Float64 keeps devices within about 1e-13 of each other.
GUARD = 1e-9

Quantise = Callable[[int, Tensor, Tensor], Tensor]


class _RoundFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, offset: Tensor, x: Tensor) -> Tensor:
        return torch.round(x - offset) + offset

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def round_from(offset: Tensor, x: Tensor) -> Tensor:
    """Round x to whole distances from an offset, which broadcasts to it.

    The gradient is that of the identity (straight-through estimator). By the offset there is none:
    what it adds after rounding cancels what it takes away before.
    """
    return _RoundFrom.apply(offset, x)


class Bottleneck(EntropyBottleneck):
    """CompressAI's bottleneck, whose forward pass does not make the host wait for the GPU."""

    def forward(self, x: Tensor, training: bool | None = None) -> tuple[Tensor, Tensor]:
        """Quantise x (batch, channels, height, width); return it and its likelihoods, alike."""
        training = self.training if training is None else training
        channels_first = x.transpose(0, 1)
        values = channels_first.reshape(x.shape[1], 1, -1)
        outputs = self.quantize(values, "noise" if training else "dequantize", self._get_medians())
        # CompressAI's `_likelihood`, but both ends of all intervals pass through at once.
        ends = torch.cat((outputs - 0.5, outputs + 0.5), dim=-1)
        lower, upper = self._logits_cumulative(ends, stop_gradient=False).sigmoid().chunk(2, dim=-1)
        likelihoods = upper - lower
        if self.use_likelihood_bound:
            likelihoods = self.likelihood_lower_bound(likelihoods)
        return tuple(
            values.reshape(channels_first.shape).transpose(0, 1).contiguous()
            for values in (outputs, likelihoods)
        )

    def medians(self) -> Tensor:
        """Medians of the channels' distributions: (1, channels, 1, 1)."""
        return self._get_medians().reshape(1, -1, 1, 1)


class Conditional(GaussianConditional):
    """CompressAI's Gaussian model of y, with tables for the middle of their scales.

    A symbol is coded with the table of the next larger scale of the scale table. CompressAI makes
    it for that scale, which is 6 % too large on average: 0.3 to 0.4 % of the rate of a picture. A
    checkpoint that has tables keeps them.
    """

    def update(self) -> None:
        """Build the CDF tables."""
        largest = self.scale_table
        # To the smallest belongs all that is not larger, most of it clamped to the scale bound.
        self.scale_table = torch.cat((largest[:1], (largest[:-1] * largest[1:]).sqrt()))
        try:
            super().update()
        finally:
            self.scale_table = largest


@dataclass(frozen=True, eq=False)
class SlicePredictor:
    """Predicts mean and scale of each channel slice of y from z_hat and the slices before it.

    It refers to the modules of a model and owns none of them.

    Attributes:
        h_mean_s, h_scale_s: hyper-synthesis transforms, (batch, Z, h/4, w/4) to (batch, M, h, w).
        atten_mean, atten_scale: one attention per slice on the hyper-latents and the support.
        cc_mean_transforms, cc_scale_transforms: from there to a slice's mean and scale.
        lrp_transforms: latent residual prediction, which corrects the rounded slice.
        max_support_slices: decoded slices that a slice is predicted from, at most.
    """

    h_mean_s: nn.Module
    h_scale_s: nn.Module
    atten_mean: nn.ModuleList
    atten_scale: nn.ModuleList
    cc_mean_transforms: nn.ModuleList
    cc_scale_transforms: nn.ModuleList
    lrp_transforms: nn.ModuleList
    max_support_slices: int

    def __call__(self, z_hat: Tensor, quantise: Quantise) -> Tensor:
        """Walk over the slices and return y_hat (batch, M, h, w).

        Args:
            z_hat: (batch, Z, h/4, w/4).
            quantise: ``quantise(i, mu, scale)`` returns the quantised slice i, given its predicted
                mean and scale: by rounding y, for instance.
        """
        walk = self.walk(z_hat)
        result = next(walk)
        for i in range(len(self.lrp_transforms)):
            result = walk.send(quantise(i, *result))
        return result

    def walk(self, z_hat: Tensor) -> Generator[tuple[Tensor, Tensor] | Tensor, Tensor, None]:
        """The walk that stops at each slice until it gets its values.

        Args:
            z_hat: (batch, Z, h/4, w/4).

        Yields:
            Mean and scale of each slice, which takes the quantised slice; in the end y_hat
            (batch, M, h, w).
        """
        latents = self.transform(z_hat)
        y_hat: list[Tensor] = []
        for i in range(len(self.lrp_transforms)):
            support = y_hat[: self.max_support_slices]
            mu, scale, mean_support = self.predict(i, *latents, *support)
            y_hat_slice = yield mu, scale
            y_hat.append(self.correct(i, mean_support, y_hat_slice))
        yield torch.cat(y_hat, dim=1)

    def transform(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        """What all slices' means and all slices' scales are predicted from."""
        return self.both(lambda: self.h_mean_s(z_hat), lambda: self.h_scale_s(z_hat), z_hat)

    def predict(
        self, i: int, latent_means: Tensor, latent_scales: Tensor, *support: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and scale of slice i from the slices before it; what `correct` starts from."""

        def predict_mean() -> tuple[Tensor, Tensor]:
            mean_support = self.atten_mean[i](torch.cat([latent_means, *support], dim=1))
            return self.cc_mean_transforms[i](mean_support), mean_support

        def predict_scale() -> Tensor:
            scale_support = self.atten_scale[i](torch.cat([latent_scales, *support], dim=1))
            return self.cc_scale_transforms[i](scale_support)

        inputs = latent_means, latent_scales, *support
        (mu, mean_support), scale = self.both(predict_mean, predict_scale, *inputs)
        return mu, scale, mean_support

    def both(self, of_means: Callable, of_scales: Callable, *inputs: Tensor) -> tuple:
        """Results of two functions that need nothing of each other, each a part of the network.

        Args:
            inputs: what they read.
        """
        return tuple(side_by_side([of_means, of_scales], inputs))

    def correct(self, i: int, mean_support: Tensor, y_hat_slice: Tensor) -> Tensor:
        """Add the predicted residual of rounding to slice i."""
        support = torch.cat([mean_support, y_hat_slice.to(mean_support.dtype)], dim=1)
        residual = self.lrp_transforms[i](support)
        # In autocast the layers behind it take it in their dtype: cast once, for all of them.
        return (y_hat_slice + 0.5 * torch.tanh(residual)).to(residual.dtype)


class LatentTables:
    """What the symbols of z and y are coded with.

    Args:
        bottleneck, conditional: the model's entropy models of z and of y.

    Attributes:
        z: one table per channel of z.
        y: one table per entry of the scale table.
        medians: (1, Z, 1, 1), float64; z is rounded to whole distances from them.
        boundaries: scales between which one entry of the scale table is used, rising, float64;
            the last entry has no upper one.

    Raises:
        ValueError: a model has no CDF tables, or they are damaged or not its own.
    """

    def __init__(self, bottleneck: Bottleneck, conditional: GaussianConditional):
        self.z = Tables.of(bottleneck)
        self.y = Tables.of(conditional)
        self.medians = bottleneck.medians().double()
        scales = conditional.scale_table.double()
        rising = scales.ndim == 1 and len(scales) > 1 and bool((scales.diff() > 0).all())
        if not (rising and scales[0] > 0 and scales[-1].isfinite()):
            raise ValueError("the scale table is damaged: its scales should be positive and rise")
        for tables, name, count in ((self.z, "z", bottleneck.channels), (self.y, "y", len(scales))):
            if len(tables.offsets) != count:
                raise ValueError(
                    f"there are {len(tables.offsets)} CDF tables of {name}, expected {count}; "
                    "build the tables again with update(force=True)"
                )
        self.boundaries = scales[:-1]

    def indexes(self, scale: Tensor) -> Tensor:
        """Index of the narrowest entry of y's that is not below the scale.

        Args:
            scale: (batch, channels, height, width).

        Returns:
            int32 (batch, symbols).
        """
        scale = scale.double().flatten(1)
        return torch.bucketize(scale.contiguous(), self.boundaries, out_int32=True)


def dequantise(symbols: Tensor, offset: Tensor) -> Tensor:
    """Sum of both in the dtype and layout of the offset, or, where it broadcasts, of the symbols.

    Encoder and decoder, whose symbols lie in different ways, then run the same kernels on it.
    """
    return offset + symbols


class Symbols(NamedTuple):
    """What is coded of one latent, on the device; and on the host, as arrays.

    Attributes:
        values: int32 (batch, symbols), in the order channel, row, column.
        largest: float64 (2,); the largest absolute values of all symbols, before they became
            integers, and of what they are coded with. NaN counts as larger than any number.
        indexes: int32, of each symbol's table; None for z.
        near: bool, where another device may find another index; None for z.
    """

    values: Tensor | np.ndarray
    largest: Tensor | np.ndarray
    indexes: Tensor | np.ndarray | None = None
    near: Tensor | np.ndarray | None = None

    @classmethod
    def of(cls, rounded: Tensor, prediction: Tensor, *rest: Tensor) -> Symbols:
        largest = [values.abs().amax().double() for values in (rounded, prediction)]
        return cls(rounded.to(torch.int32).flatten(1), torch.stack(largest), *rest)


def round_z(z: Tensor, tables: LatentTables) -> Symbols:
    """Symbols of z (batch, Z, h/4, w/4)."""
    return Symbols.of(torch.round(z - tables.medians.to(z.dtype)), tables.medians)


def round_y(y: Tensor, z_hat: Tensor, slices: SlicePredictor, tables: LatentTables) -> Symbols:
    """Symbols of y (batch, M, h, w), each slice predicted from z_hat and the slices before it."""
    symbols, scales = [], []

    def round_slice(i: int, mu: Tensor, scale: Tensor) -> Tensor:
        channels = mu.shape[1]
        y_slice = y[:, i * channels : (i + 1) * channels].to(mu.dtype)
        symbols.append(torch.round(y_slice - mu))
        scales.append(scale)
        return dequantise(symbols[i], mu)

    slices(z_hat, round_slice)
    scale = torch.cat(scales, dim=1).double().contiguous()
    lower, upper = (tables.indexes(scale * math.exp(error)) for error in (-GUARD, GUARD))
    return Symbols.of(torch.cat(symbols, dim=1), scale, tables.indexes(scale), lower != upper)


class _LatentCoder:
    """What encoder and decoder share: the tables, and the checksum of all symbols.

    Attributes:
        crcs: per image, the CRC-32 of all symbols of z and y (little-endian int32, coding order).
    """

    def __init__(self, tables: LatentTables, batch: int):
        self.tables = tables
        self.crcs = [0] * batch

    def z_indexes(self, count: int) -> np.ndarray:
        """Table index of each of ``count`` symbols of z, which is its channel."""
        channels = len(self.tables.z.offsets)
        return np.repeat(np.arange(channels, dtype=np.int32), count // channels)

    def checksum(self, symbols: np.ndarray) -> None:
        """Add symbols, (batch, symbols), to the checksums."""
        for image, values in enumerate(symbols):
            self.crcs[image] = zlib.crc32(values.astype("<i4", copy=False), self.crcs[image])


class LatentEncoder(_LatentCoder):
    """Turns the symbols of z and y into strings.

    Attributes:
        guards: per image, the (position, index) of each symbol of y whose scale lies within
            `GUARD` of a table boundary; positions count in coding order.
    """

    def __init__(self, tables: LatentTables, batch: int):
        super().__init__(tables, batch)
        self.guards: list[list[tuple[int, int]]] = [[] for _ in range(batch)]

    def encode_z(self, symbols: Symbols) -> list[bytes]:
        """The string of z of each image.

        Args:
            symbols: of `round_z`, as arrays.

        Raises:
            ValueError: a symbol cannot be coded.
        """
        indexes = self.z_indexes(symbols.values.shape[1])
        return self._encode(symbols, [indexes] * len(symbols.values), self.tables.z)

    def encode_y(self, symbols: Symbols) -> list[bytes]:
        """The string of y of each image; call it after `encode_z`.

        Args:
            symbols: of `round_y`, as arrays.

        Raises:
            ValueError: a symbol or a scale cannot be coded.
        """
        strings = self._encode(symbols, symbols.indexes, self.tables.y)
        for guards, near, indexes in zip(self.guards, symbols.near, symbols.indexes, strict=True):
            (positions,) = near.nonzero()
            guards += zip(positions.tolist(), indexes[positions].tolist(), strict=True)
        return strings

    def _encode(
        self, symbols: Symbols, indexes: Sequence[np.ndarray], tables: Tables
    ) -> list[bytes]:
        largest_symbol, largest_prediction = symbols.largest
        if not (largest_symbol <= MAX_SYMBOL and largest_prediction < np.inf):
            raise ValueError(
                f"latents or their predictions are not finite, or larger than {MAX_SYMBOL}; "
                "check the weights and that the picture is in [0, 1]"
            )
        self.checksum(symbols.values)
        return [encode(*each, tables) for each in zip(symbols.values, indexes, strict=True)]


class LatentDecoder(_LatentCoder):
    """Reads the symbols that `LatentEncoder` wrote, slice by slice.

    Args:
        y_strings, guards: per image, as the encoder made them.
    """

    def __init__(
        self,
        tables: LatentTables,
        y_strings: Sequence[bytes],
        guards: Sequence[Sequence[tuple[int, int]]],
    ):
        super().__init__(tables, len(y_strings))
        # (position, index) rows
        self.guards = [np.asarray(g, dtype=np.int64).reshape(-1, 2) for g in guards]
        self.decoders = [SymbolDecoder(string, self.tables.y) for string in y_strings]
        self.position = 0  # symbols of y decoded so far in each image

    def read_z(self, strings: Sequence[bytes], symbols: np.ndarray) -> None:
        """Decode the symbols of z.

        Args:
            symbols: int32 (batch, symbols), which is filled.
        """
        indexes = self.z_indexes(symbols.shape[1])
        for string, values in zip(strings, symbols, strict=True):
            decoder = SymbolDecoder(string, self.tables.z)
            decoder.get(indexes, values)
            decoder.finish()

    def read_slice(self, indexes: np.ndarray, symbols: np.ndarray) -> None:
        """Decode the next slice of y.

        Args:
            indexes: int32 (batch, symbols), of each symbol's table, as found here. They are
                overwritten where the encoder listed them.
            symbols: int32 (batch, symbols), which is filled.
        """
        count = indexes.shape[1]
        for image, rows in enumerate(indexes):
            positions, listed = (self.guards[image] - (self.position, 0)).T
            here = (positions >= 0) & (positions < count)
            rows[positions[here]] = listed[here]
            self.decoders[image].get(rows, symbols[image])
        self.position += count

    def finish(self) -> None:
        """Check that the strings of y and the guards end here, once all slices are decoded.

        Raises:
            BitstreamError: they do not.
        """
        for decoder in self.decoders:
            decoder.finish()
        if any((guards[:, 0] >= self.position).any() for guards in self.guards):
            raise BitstreamError(
                "a guard entry is for a symbol beyond the picture's last; the file is damaged"
            )
