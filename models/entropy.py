"""Channel-wise autoregressive entropy model: one slice loop for all uses (arXiv:2007.08739)."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from layers.compressai import EntropyBottleneck, GaussianConditional

from .container import BitstreamError
from .rans import MAX_SYMBOL, SymbolDecoder, Tables, encode

# A scale whose logarithm lies this close to a boundary of the scale table may get another table
# index on another device. Float64 keeps devices within about 1e-12 of each other.
GUARD = 1e-6

Quantise = Callable[[int, Tensor, Tensor], Tensor]


def run_eagerly(stage: Callable, *args):
    """Call a stage of the network; `SlicePredictor` may be given something faster."""
    return stage(*args)


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

    def __call__(self, z_hat: Tensor, quantise: Quantise, run: Callable = run_eagerly) -> Tensor:
        """Walk over the slices and return y_hat (batch, M, h, w).

        Args:
            z_hat: (batch, Z, h/4, w/4).
            quantise: ``quantise(i, mu, scale)`` returns the quantised slice i, given its predicted
                mean and scale: by rounding y, or by decoding its symbols.
            run: ``run(stage, *args)`` runs what lies between; each stage depends on its arguments
                (tensors and integers) and the weights only.
        """
        latents = run(self.transform, z_hat)
        y_hat: list[Tensor] = []
        for i in range(len(self.lrp_transforms)):
            support = y_hat[: self.max_support_slices]
            mu, scale, mean_support = run(self.predict, i, *latents, *support)
            y_hat.append(run(self.correct, i, mean_support, quantise(i, mu, scale)))
        return torch.cat(y_hat, dim=1)

    def transform(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        """What all slices' means and all slices' scales are predicted from."""
        return self.h_mean_s(z_hat), self.h_scale_s(z_hat)

    def predict(
        self, i: int, latent_means: Tensor, latent_scales: Tensor, *support: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and scale of slice i from the slices before it; what `correct` starts from."""
        mean_support = self.atten_mean[i](torch.cat([latent_means, *support], dim=1))
        scale_support = self.atten_scale[i](torch.cat([latent_scales, *support], dim=1))
        mu = self.cc_mean_transforms[i](mean_support)
        return mu, self.cc_scale_transforms[i](scale_support), mean_support

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


def _check(symbols: Tensor, prediction: Tensor) -> None:
    """Check that symbols can be coded, and that what they are coded with is finite.

    Raises:
        ValueError: they are not.
    """
    if not ((symbols.abs() <= MAX_SYMBOL).all() and prediction.isfinite().all()):
        raise ValueError(
            f"latents or their predictions are not finite, or larger than {MAX_SYMBOL}; "
            "check the weights and that the picture is in [0, 1]"
        )


def _dequantise(symbols: Tensor, offset: Tensor) -> Tensor:
    """Their sum, in one memory layout: encoder and decoder then run the same kernels on it."""
    return (symbols + offset).contiguous()


def _flat(values: Tensor) -> list[np.ndarray]:
    """(batch, ...) tensor as one flat int32 array per image, in (channel, row, column) order."""
    return list(values.to(torch.int32).flatten(1).cpu().numpy())


class _LatentCoder:
    """What encoder and decoder share: table indexes, and the checksum of all symbols."""

    def __init__(self, tables: LatentTables, batch: int):
        self.tables = tables
        self.crcs = [0] * batch

    def table_indexes(self, scale: Tensor) -> Tensor:
        """Index of the narrowest table entry that is not below the scale: int64, like scale."""
        return torch.bucketize(scale.double().contiguous(), self.tables.boundaries)

    def z_indexes(self, shape: Sequence[int]) -> np.ndarray:
        """Table index of each symbol of z, which is its channel."""
        channels = len(self.tables.z.offsets)
        return np.repeat(np.arange(channels, dtype=np.int32), shape[0] * shape[1])

    def checksum(self, image: int, symbols: np.ndarray) -> None:
        data = np.ascontiguousarray(symbols, dtype="<i4").tobytes()
        self.crcs[image] = zlib.crc32(data, self.crcs[image])


class LatentEncoder(_LatentCoder):
    """Collects the symbols of z and of the slices of y and turns them into strings.

    Attributes:
        guards: per image, the (position, index) of each symbol of y whose scale lies within
            `GUARD` of a table boundary; positions count in coding order.
        crcs: per image, the CRC-32 of all symbols of z and y (little-endian int32, coding order).
    """

    def __init__(self, tables: LatentTables, y: Tensor):
        super().__init__(tables, len(y))
        self.y = y
        self.guards: list[list[tuple[int, int]]] = [[] for _ in y]
        self.coded: list[list[Tensor]] = []  # per slice: symbols, scales, indexes, guards

    def encode_z(self, z: Tensor) -> tuple[list[bytes], Tensor]:
        """Return the strings of z and z_hat in float64."""
        medians = self.tables.medians
        symbols = torch.round(z - medians.to(z.dtype))
        _check(symbols, medians)
        indexes = [self.z_indexes(z.shape[-2:])] * len(z)
        strings = self._encode(_flat(symbols), indexes, self.tables.z)
        return strings, _dequantise(symbols.double(), medians)

    def round_slice(self, i: int, mu: Tensor, scale: Tensor) -> Tensor:
        """Round slice i of y and keep it for `encode_y`; a `SlicePredictor` calls it."""
        channels = mu.shape[1]
        y = self.y[:, i * channels : (i + 1) * channels]
        symbols = torch.round(y.to(mu.dtype) - mu)
        indexes = self.table_indexes(scale)
        coded = (symbols, scale, indexes, self._near_boundary(scale, indexes))
        self.coded.append([values.flatten(1) for values in coded])
        return _dequantise(symbols, mu)

    def _near_boundary(self, scale: Tensor, indexes: Tensor) -> Tensor:
        """True where another device may find another index."""
        log_scale = scale.double().clamp(min=1e-12).log()
        log_boundaries = self.tables.boundaries.log()
        last = len(log_boundaries) - 1
        # An index lies between boundary index - 1 below it and boundary index above it.
        return (
            torch.minimum(
                (log_scale - log_boundaries[(indexes - 1).clamp(min=0)]).abs(),
                (log_scale - log_boundaries[indexes.clamp(max=last)]).abs(),
            )
            < GUARD
        )

    def encode_y(self) -> list[bytes]:
        """The string of y of each image, once all slices are rounded.

        Nothing before this makes the host wait for the device.

        Raises:
            ValueError: a symbol or a scale cannot be coded.
        """
        symbols, scales, indexes, near = (
            torch.cat(slices, dim=1) for slices in zip(*self.coded, strict=True)
        )
        _check(symbols, scales)
        images, positions = near.nonzero(as_tuple=True)
        chosen = indexes[images, positions]
        for image, position, index in torch.stack([images, positions, chosen], 1).tolist():
            self.guards[image].append((position, index))
        return self._encode(_flat(symbols), _flat(indexes), self.tables.y)

    def _encode(
        self, symbols: Sequence[np.ndarray], indexes: Sequence[np.ndarray], tables: Tables
    ) -> list[bytes]:
        for image, values in enumerate(symbols):
            self.checksum(image, values)
        return [encode(*each, tables) for each in zip(symbols, indexes, strict=True)]


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

    def decode_z(self, strings: Sequence[bytes], shape: Sequence[int]) -> Tensor:
        """Return z_hat (batch, Z, *shape) in float64."""
        images = []
        for image, string in enumerate(strings):
            decoder = SymbolDecoder(string, self.tables.z)
            values = decoder.get(self.z_indexes(shape))
            decoder.finish()
            self.checksum(image, values)
            images.append(torch.from_numpy(values).reshape(-1, *shape))
        medians = self.tables.medians
        return _dequantise(torch.stack(images).to(medians.device).double(), medians)

    def read_slice(self, i: int, mu: Tensor, scale: Tensor) -> Tensor:
        """Decode slice i of y; a `SlicePredictor` calls it."""
        count = mu[0].numel()
        images = []
        for image, rows in enumerate(_flat(self.table_indexes(scale))):
            positions, listed = (self.guards[image] - (self.position, 0)).T
            here = (positions >= 0) & (positions < count)
            rows[positions[here]] = listed[here]
            values = self.decoders[image].get(rows)
            self.checksum(image, values)
            images.append(torch.from_numpy(values).reshape(mu.shape[1:]))
        self.position += count
        return _dequantise(torch.stack(images).to(mu.device).to(mu.dtype), mu)

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
