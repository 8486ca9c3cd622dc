"""Channel-wise autoregressive entropy model: one slice loop for all uses (arXiv:2007.08739)."""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck, EntropyModel
from torch import Tensor

from .rans import MAX_SYMBOL, BitstreamError, SymbolDecoder, SymbolEncoder, Tables

__all__ = [
    "GUARD",
    "BitstreamError",
    "Bottleneck",
    "LatentDecoder",
    "LatentEncoder",
    "SlicePredictor",
    "call",
]

# A scale whose logarithm lies this close to a boundary of the scale table may get another table
# index on another device. Float64 keeps devices within about 1e-12 of each other.
GUARD = 1e-6

CodeSlice = Callable[[int, Tensor, Tensor], Tensor]


def call(stage: Callable, *args):
    """Run a stage of a network: a function of tensors, integers and nothing else."""
    return stage(*args)


class Bottleneck(EntropyBottleneck):
    """CompressAI's bottleneck, whose forward pass does not make the host wait for the GPU."""

    def forward(self, x: Tensor, training: bool | None = None) -> tuple[Tensor, Tensor]:
        """Quantise x (batch, channels, height, width); return it and its likelihoods, alike."""
        training = self.training if training is None else training
        channels_first = x.transpose(0, 1)
        values = channels_first.reshape(x.shape[1], 1, -1)
        outputs = self.quantize(values, "noise" if training else "dequantize", self._get_medians())
        likelihoods, _, _ = self._likelihood(outputs)
        if self.use_likelihood_bound:
            likelihoods = self.likelihood_lower_bound(likelihoods)
        shape = channels_first.shape
        return (
            outputs.reshape(shape).transpose(0, 1).contiguous(),
            likelihoods.reshape(shape).transpose(0, 1).contiguous(),
        )


class SlicePredictor(nn.Module):
    """Predicts mean and scale of each channel slice of y from z_hat and the slices before it.

    Args:
        h_mean_s, h_scale_s: hyper-synthesis transforms, (batch, Z, h/4, w/4) to (batch, M, h, w).
        atten_mean, atten_scale: one attention per slice on the hyper-latents and the support.
        cc_mean_transforms, cc_scale_transforms: from there to a slice's mean and scale.
        lrp_transforms: latent residual prediction, which corrects the rounded slice.
        max_support_slices: decoded slices that a slice is predicted from, at most.
    """

    def __init__(
        self,
        h_mean_s: nn.Module,
        h_scale_s: nn.Module,
        atten_mean: nn.ModuleList,
        atten_scale: nn.ModuleList,
        cc_mean_transforms: nn.ModuleList,
        cc_scale_transforms: nn.ModuleList,
        lrp_transforms: nn.ModuleList,
        max_support_slices: int,
    ):
        super().__init__()
        self.h_mean_s = h_mean_s
        self.h_scale_s = h_scale_s
        self.atten_mean = atten_mean
        self.atten_scale = atten_scale
        self.cc_mean_transforms = cc_mean_transforms
        self.cc_scale_transforms = cc_scale_transforms
        self.lrp_transforms = lrp_transforms
        self.max_support_slices = max_support_slices

    def forward(self, z_hat: Tensor, code_slice: CodeSlice, run_stage: Callable = call) -> Tensor:
        """Walk over the slices and return y_hat (batch, M, h, w).

        ``code_slice(i, mu, scale)`` turns the prediction of slice i into the quantised slice:
        by rounding y in training and estimation, by encoding its symbols, or by decoding them.
        ``run_stage`` runs what lies between.
        """
        latents = run_stage(self.transform, z_hat)
        y_hat: list[Tensor] = []
        for i in range(len(self.lrp_transforms)):
            support = y_hat[: self.max_support_slices]
            mu, scale, mean_support = run_stage(self.predict, i, *latents, *support)
            y_hat.append(run_stage(self.correct, i, mean_support, code_slice(i, mu, scale)))
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
        residual = self.lrp_transforms[i](torch.cat([mean_support, y_hat_slice], dim=1))
        return y_hat_slice + 0.5 * torch.tanh(residual)


@contextlib.contextmanager
def deterministic_arithmetic() -> Iterator[None]:
    """Fixed convolution algorithms without TF32, so that both ends of a stream compute alike."""
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, deterministic=True, benchmark=False, allow_tf32=False
    ):
        yield


class _ProductConv2d(nn.Conv2d):
    """A convolution of stride 1 as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1):
            columns = x.flatten(2)  # (batch, C * k * k, h * w)
        else:
            columns = F.unfold(x, self.kernel_size, padding=self.padding)
        weight = self.weight.flatten(1).expand(len(x), -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, columns).unflatten(-1, x.shape[-2:])


def multiply_convolutions(module: nn.Module) -> None:
    """Compute a module's convolutions of stride 1 as matrix products, from now on.

    In float64 a GPU's library takes ten times as long for a convolution as for the product.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.stride == (1, 1):
            layer.__class__ = _ProductConv2d


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

    def __init__(self, bottleneck: EntropyModel, conditional: EntropyModel, batch: int):
        self.z_tables = Tables.of(bottleneck)
        self.y_tables = Tables.of(conditional)
        # The last entry has no upper boundary.
        self.boundaries = conditional.scale_table[:-1].double()
        self.crcs = [0] * batch

    def table_indexes(self, scale: Tensor) -> Tensor:
        """Index of the narrowest table entry that is not below the scale: int64, like scale."""
        return torch.bucketize(scale.double().contiguous(), self.boundaries)

    def z_indexes(self, shape: Sequence[int]) -> np.ndarray:
        """Table index of each symbol of z, which is its channel."""
        channels = len(self.z_tables.offsets)
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

    def __init__(self, bottleneck: EntropyModel, conditional: EntropyModel, y: Tensor):
        super().__init__(bottleneck, conditional, len(y))
        self.y = y
        self.guards: list[list[tuple[int, int]]] = [[] for _ in y]
        self.coded: list[list[Tensor]] = []  # per slice: symbols, scales, indexes, guards

    def encode_z(self, z: Tensor, medians: Tensor) -> tuple[list[bytes], Tensor]:
        """Return the strings of z and z_hat in float64."""
        symbols = torch.round(z - medians)
        _check(symbols, medians)
        strings = []
        for image, values in enumerate(_flat(symbols)):
            encoder = SymbolEncoder(self.z_tables)
            encoder.put(values, self.z_indexes(z.shape[-2:]))
            strings.append(encoder.flush())
            self.checksum(image, values)
        return strings, _dequantise(symbols.double(), medians.double())

    def code_slice(self, i: int, mu: Tensor, scale: Tensor) -> Tensor:
        """Round slice i of y and keep it for `encode_y`; see `SlicePredictor.forward`."""
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
        log_boundaries = self.boundaries.log()
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
        strings = []
        for image, (values, rows) in enumerate(zip(_flat(symbols), _flat(indexes), strict=True)):
            encoder = SymbolEncoder(self.y_tables)
            encoder.put(values, rows)
            strings.append(encoder.flush())
            self.checksum(image, values)
        return strings


class LatentDecoder(_LatentCoder):
    """Reads the symbols that `LatentEncoder` wrote, slice by slice.

    Args:
        y_strings, guards: per image, as the encoder made them.
    """

    def __init__(
        self,
        bottleneck: EntropyModel,
        conditional: EntropyModel,
        y_strings: Sequence[bytes],
        guards: Sequence[Sequence[tuple[int, int]]],
    ):
        super().__init__(bottleneck, conditional, len(y_strings))
        # (position, index) rows
        self.guards = [np.asarray(g, dtype=np.int64).reshape(-1, 2) for g in guards]
        self.decoders = [SymbolDecoder(string, self.y_tables) for string in y_strings]
        self.position = 0  # symbols of y decoded so far in each image

    def decode_z(self, strings: Sequence[bytes], shape: Sequence[int], medians: Tensor) -> Tensor:
        """Return z_hat (batch, Z, *shape) in float64."""
        images = []
        for image, string in enumerate(strings):
            decoder = SymbolDecoder(string, self.z_tables)
            values = decoder.get(self.z_indexes(shape))
            decoder.finish()
            self.checksum(image, values)
            images.append(torch.from_numpy(values).reshape(-1, *shape))
        symbols = torch.stack(images).to(medians.device)
        return _dequantise(symbols.double(), medians.double())

    def code_slice(self, i: int, mu: Tensor, scale: Tensor) -> Tensor:
        """Decode slice i of y; see `SlicePredictor.forward`."""
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
        """Check that the strings of y end here, once all slices are decoded.

        Raises:
            BitstreamError: they do not.
        """
        for decoder in self.decoders:
            decoder.finish()
