"""Pictures to bytes and back: the entropy path in float64, the coding tables, CUDA graphs.

A decoder must find the table of every symbol that the encoder took: after one symbol read with
another table all that follow are wrong. In float32 two devices differ enough for that in every
picture. In float64 they differ so little that the few scales too close to a boundary between two
tables can be listed in the stream (`entropy.GUARD`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.graphs import Replay
from layers import SS2D, ConvChain
from layers.compressai import CompressionModel
from layers.conv_chain import Conv1x1
from layers.winograd import WinogradConv2d

from . import container
from .container import BitstreamError, Stream, TiledStream
from .entropy import (
    LatentDecoder,
    LatentEncoder,
    LatentTables,
    SlicePredictor,
    Symbols,
    dequantise,
    round_y,
    round_z,
)
from .gains import Gains, GainVectors, gains_at, in_float64, scaled

MAX_GRAPHED_SIZES = 8  # of pictures; each has 8 graphs, whose memory is kept

# What only the encoder uses, and what the tables were made from.
_ENCODER = ("g_a.", "h_a.", "gains.y_enc", "gains.z_enc")
_ENTROPY_MODELS = ("entropy_bottleneck.", "gaussian_conditional.")
_TABLES = ("quantiles", "_quantized_cdf", "_cdf_length", "_offset", "scale_table")


class Coder:
    """A model's pictures to bytes and back.

    What coding needs beyond the model is made once and kept here: the CDF tables, the entropy path
    in float64 and, on a GPU, CUDA graphs. They hold the weights of the moment they are made in:
    make another Coder once the weights have changed.

    Args:
        model: a `SliceHyperprior` in eval mode, with CDF tables, on the device that is to code.
        exact: how `compress` and `encode` run the entropy path, and how `decompress` assumes that
            it was run: in float64, so that any device decodes the stream, or as the model is, for
            decoding on the same machine only.
        graphs: replay pictures of a size seen before from CUDA graphs, so that the GPU need not
            wait for its host. The graphs of eight sizes are kept; a ninth size replaces them all.
        precision: of the blocks of g_a and g_s, see `SliceHyperprior.forward`. The symbols of a
            stream are the same in any: what is coded in one precision decodes in another.

    Raises:
        ValueError: the model is in training mode, its CDF tables are missing or damaged, or
            graphs are asked for on a CPU.
    """

    def __init__(
        self,
        model: CompressionModel,
        *,
        exact: bool = True,
        graphs: bool = False,
        precision: torch.dtype = torch.float32,
    ):
        if model.training:
            raise ValueError("the model is in training mode; call eval() before coding")
        if graphs and model.entropy_bottleneck.quantiles.device.type != "cuda":
            raise ValueError("CUDA graphs need a model on a GPU; leave graphs=True out")
        self.model = model
        self.exact = exact
        self.precision = precision
        self._tables = LatentTables(model.entropy_bottleneck, model.gaussian_conditional)
        self._slices = model.slices
        self._dtype = model.entropy_bottleneck.quantiles.dtype
        self._device = model.entropy_bottleneck.quantiles.device
        self._replay = Replay() if graphs else None
        self._sizes: set[tuple[int, ...]] = set()  # that the graphs are of

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """Four bytes that name the model: see the function `fingerprint`."""
        return fingerprint(self.model.state_dict())

    @functools.cached_property
    def _exact_slices(self) -> _ExactPredictor:
        # Tensors made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            return _ExactPredictor(**_in_float64(self._slices), side=side)

    @functools.cached_property
    def _gains(self) -> Gains | None:
        # In float64, as the entropy path that depends on them: two machines' exponential functions
        # may then differ by 1e-16, which the guards allow for.
        with torch.inference_mode(False), torch.no_grad():
            return in_float64(self.model.gains)

    def prepare(self) -> None:
        """Make what is otherwise made at the first picture, which threads must not do at once."""
        _ = self._exact_slices, self._gains, self.fingerprint

    @torch.no_grad()
    def compress(self, x: Tensor, quality: float | None = None) -> dict:
        """Encode pictures to strings.

        Args:
            x: (batch, 3, height, width), RGB in [0, 1], any size from 1x1 up.
            quality: 0 to 100, of all pictures, where the network has gains; else None.

        Returns:
            The arguments of `decompress`: ``strings`` ([y strings, z strings], one of each per
            picture), ``shape`` of z, ``size`` (height, width) of the pictures, ``guards`` and
            ``crcs`` per picture (see `LatentEncoder`), ``quality``.

        Raises:
            ValueError: the latents cannot be coded, or the quality is missing, out of range or
                given to a network of a single rate.
        """
        gain, rounded_gain = self._gains_at(quality)
        shape = self._z_shape(*x.shape[-2:])
        self._make_room(len(x), *shape)
        stretches = self._run(
            self._analysis,
            self.model.pad(x),
            self.exact,
            rounded_gain.y_enc,
            rounded_gain.z_enc,
            gain.z_dec,
        )
        coded = self._write(stretches, len(x))
        return {**coded, "shape": shape, "size": tuple(x.shape[-2:]), "quality": quality}

    def _write(self, stretches: Generator, batch: int) -> dict:
        """What `compress` returns of the symbols that these stretches yield."""
        encoder = LatentEncoder(self._tables, batch)
        z = _fetch(next(stretches))
        y = _fetch(next(stretches))
        z_strings = encoder.encode_z(Symbols(*z()))  # while the device predicts y
        y_strings = encoder.encode_y(Symbols(*y()))
        return {
            "strings": [y_strings, z_strings],
            "guards": encoder.guards,
            "crcs": encoder.crcs,
        }

    @torch.no_grad()
    def decompress(
        self,
        strings: Sequence[Sequence[bytes]],
        shape: Sequence[int],
        size: Sequence[int] | None = None,
        guards: Sequence[Sequence[tuple[int, int]]] | None = None,
        crcs: Sequence[int] | None = None,
        quality: float | None = None,
        *,
        exact: bool | None = None,
    ) -> dict:
        """Decode what `compress` returned.

        Args:
            strings, shape, size, guards, crcs, quality: see `compress`. Without ``size`` the padded
                pictures are returned, without ``crcs`` the symbols are not checked.
            exact: as the pictures were encoded; by default as this Coder encodes them.

        Returns:
            ``x_hat`` (batch, 3, *size), clamped to [0, 1]; ``y_hat`` (batch, M, h/16, w/16).

        Raises:
            BitstreamError: the symbols are not those that were encoded.
            ValueError: the picture is not finite: clamped, its infinities would look white; or
                the quality is missing, out of range or given to a network of a single rate.
        """
        stretches, y_hat = self._read(strings, shape, guards, crcs, quality, exact)
        x_hat = next(stretches)
        height, width = size or (None, None)
        x_hat = x_hat[..., :height, :width]
        return {"x_hat": _in_range(x_hat), "y_hat": y_hat.clone()}

    def _read(
        self,
        strings: Sequence[Sequence[bytes]],
        shape: Sequence[int],
        guards: Sequence[Sequence[tuple[int, int]]] | None,
        crcs: Sequence[int] | None,
        quality: float | None,
        exact: bool | None,
    ) -> tuple[Generator, Tensor]:
        """y_hat of what `compress` returned, and the stretches that go on with x_hat."""
        gain, rounded_gain = self._gains_at(quality)
        y_strings, z_strings = strings
        batch = len(y_strings)
        self._make_room(batch, *shape)
        decoder = LatentDecoder(self._tables, y_strings, guards or [[] for _ in y_strings])
        symbols = self._host_tensor(batch, self._tables.medians.numel() * math.prod(shape))
        decoder.read_z(z_strings, symbols.numpy())
        stretches = self._run(
            self._synthesis,
            symbols,
            tuple(shape),
            self.exact if exact is None else exact,
            gain.z_dec,
            rounded_gain.y_dec,
        )
        stretch = next(stretches)
        for _ in range(len(self._slices.lrp_transforms)):
            fetch = _fetch([stretch])
            decoder.checksum(symbols.numpy())  # while the device predicts the next slice
            (indexes,) = fetch()
            symbols = self._host_tensor(*indexes.shape)
            decoder.read_slice(indexes, symbols.numpy())
            stretch = stretches.send(symbols)
        decoder.checksum(symbols.numpy())
        decoder.finish()
        if crcs is not None and list(crcs) != decoder.crcs:
            raise BitstreamError(
                "decoded symbols differ from those that were encoded; the stream is damaged, or "
                "it was made by another model or without the exact entropy path on another machine"
            )
        return stretches, stretch

    @torch.no_grad()
    def latents(self, x: Tensor, quality: float | None = None) -> Tensor:
        """y of pictures, with its gain, before it is rounded.

        Args:
            x: (batch, 3, height, width), RGB in [0, 1], sides multiples of 16.
            quality: see `compress`.

        Returns:
            (batch, M, height / 16, width / 16).
        """
        _, gain = self._gains_at(quality)
        self._make_room(*x.shape)
        x = x.contiguous(memory_format=torch.channels_last)
        return next(self._run(self._latents, x, gain.y_enc)).clone()

    @torch.no_grad()
    def compress_latents(self, y: Tensor, quality: float | None = None) -> dict:
        """Encode y as `latents` made it: `compress` without the analysis.

        Args:
            y: (batch, M, rows, columns), both multiples of 4.

        Returns:
            As `compress`, but for ``size``.

        Raises:
            ValueError: see `compress`.
        """
        gain, rounded_gain = self._gains_at(quality)
        shape = (y.shape[-2] // 4, y.shape[-1] // 4)
        self._make_room(len(y), *shape)
        y = y.contiguous(memory_format=torch.channels_last)
        stretches = self._run(self._latent_symbols, y, self.exact, rounded_gain.z_enc, gain.z_dec)
        return {**self._write(stretches, len(y)), "shape": shape, "quality": quality}

    @torch.no_grad()
    def decompress_latents(
        self,
        strings: Sequence[Sequence[bytes]],
        shape: Sequence[int],
        guards: Sequence[Sequence[tuple[int, int]]] | None = None,
        crcs: Sequence[int] | None = None,
        quality: float | None = None,
        *,
        exact: bool | None = None,
    ) -> Tensor:
        """y_hat (batch, M, rows, columns) of what `compress` or `compress_latents` returned.

        Raises:
            BitstreamError, ValueError: see `decompress`.
        """
        _, y_hat = self._read(strings, shape, guards, crcs, quality, exact)
        return y_hat.clone()

    @torch.no_grad()
    def synthesise(self, y_hat: Tensor, quality: float | None = None) -> Tensor:
        """Pictures (batch, 3, 16 * rows, 16 * columns) in [0, 1] of y_hat.

        Args:
            y_hat: (batch, M, rows, columns).
            quality: see `compress`.

        Raises:
            ValueError: see `decompress`.
        """
        _, gain = self._gains_at(quality)
        self._make_room(*y_hat.shape)
        y_hat = y_hat.contiguous(memory_format=torch.channels_last)
        return _in_range(next(self._run(self._pictures, y_hat, gain.y_dec)))

    def encode(self, x: Tensor, quality: float | None = None) -> bytes:
        """Code one picture as a `.mvc` file.

        Args:
            x: (1, 3, height, width), RGB in [0, 1].
            quality: 0 to 100, where the network has gains, of which the file keeps hundredths.

        Raises:
            BitstreamError: the picture is larger than the format allows.
            ValueError: see `compress`.
        """
        height, width = x.shape[-2:]
        container.check_size(height, width)
        if quality is not None:
            quality = container.coded_quality(quality)
        coded = self.compress(x, quality)
        (y,), (z,) = coded["strings"]
        (guards,), (crc,) = coded["guards"], coded["crcs"]
        return container.pack(
            Stream(self.fingerprint, self.exact, height, width, guards, z, y, crc, quality)
        )

    def decode(self, data: bytes | Stream) -> Tensor:
        """Decode a `.mvc` file, with the exact entropy path or without, as the file says.

        Args:
            data: the file's bytes, or what `container.unpack` returned for them.

        Returns:
            x_hat (1, 3, height, width) in [0, 1].

        Raises:
            BitstreamError: it is no such file, it is damaged, another model made it, or, where it
                was coded without the exact entropy path, another machine did.
        """
        stream = data if isinstance(data, Stream) else container.unpack(data)
        if isinstance(stream, TiledStream):
            raise BitstreamError("the picture is in tiles; decode it with models.tiles.decode")
        self.check_model(stream)
        with self.bitstream_errors(stream.exact):
            return self.decompress(
                strings=[[stream.y], [stream.z]],
                shape=self._z_shape(stream.height, stream.width),
                size=(stream.height, stream.width),
                guards=[stream.guards],
                crcs=[stream.crc],
                quality=stream.quality,
                exact=stream.exact,
            )["x_hat"]

    def check_model(self, stream: Stream | TiledStream) -> None:
        """Check that this model made a file.

        Raises:
            BitstreamError: it did not.
        """
        if stream.fingerprint != self.fingerprint:
            raise BitstreamError(
                f"the file was made by model {stream.fingerprint.hex()}, this checkpoint is model "
                f"{self.fingerprint.hex()}; give the checkpoint it was made with"
            )
        if (stream.quality is None) != (self._gains is None):
            raise BitstreamError(
                f"the file is damaged: it is of version {stream.version}, which the network that "
                "made it does not write"
            )

    @staticmethod
    @contextlib.contextmanager
    def bitstream_errors(exact: bool) -> Generator[None, None, None]:
        """Say of strings that cannot be read why that is, where the exact path did not code them.

        Raises:
            BitstreamError: in place of another.
        """
        try:
            yield
        except BitstreamError:
            if exact:
                raise
            raise BitstreamError(
                "the file was coded with the fast entropy path, so it decodes on the machine that "
                "made it only, with the same software, and here its symbols come out wrong; encode "
                "the picture again with the exact path"
            ) from None

    def has_graphs(self, x: Tensor) -> bool:
        """Whether pictures of x's size were coded before, and their graphs are still kept."""
        return (len(x), *self._z_shape(*x.shape[-2:])) in self._sizes

    def _gains_at(self, quality: float | None) -> tuple[GainVectors, GainVectors]:
        """Gains at a quality: in float64, and in the network's precision."""
        gain = gains_at(self._gains, quality)
        return gain, gain.to(self._dtype)

    def _analysis(
        self,
        x: Tensor,
        exact: bool,
        y_enc: Tensor | None,
        z_enc: Tensor | None,
        z_dec: Tensor | None,
    ) -> Generator[Symbols, None, None]:
        """Symbols of z, then those of y, of padded pictures; ``z_dec`` is float64."""
        y = self.model.latents(x, y_enc, self.precision)
        yield from self._latent_symbols(y, exact, z_enc, z_dec)

    def _latents(self, x: Tensor, y_enc: Tensor | None) -> Generator[Tensor, None, None]:
        yield self.model.latents(x, y_enc, self.precision)

    def _pictures(self, y_hat: Tensor, y_dec: Tensor | None) -> Generator[Tensor, None, None]:
        yield self.model.synthesise(y_hat, y_dec, self.precision)

    def _latent_symbols(
        self, y: Tensor, exact: bool, z_enc: Tensor | None, z_dec: Tensor | None
    ) -> Generator[Symbols, None, None]:
        """Symbols of z, then those of y."""
        z = self.model.hyper_latents(y, z_enc)
        symbols = round_z(z, self._tables)
        yield symbols
        slices, dtype = self._path(exact)
        with _deterministic_arithmetic(self._device):
            z_hat = dequantise(symbols.values.view(z.shape), self._tables.medians)
            symbols = round_y(y, scaled(z_hat, z_dec).to(dtype), slices, self._tables)
        yield symbols

    def _synthesis(
        self,
        symbols: Tensor,
        shape: tuple[int, int],
        exact: bool,
        z_dec: Tensor | None,
        y_dec: Tensor | None,
    ) -> Generator[Tensor, Tensor | None, None]:
        """Table indexes of each slice of y, for which it is sent the symbols; y_hat; x_hat.

        Args:
            symbols: of z (batch, symbols), int32.
            shape: (rows, columns) of z.
            z_dec: float64.
        """
        slices, dtype = self._path(exact)
        symbols = symbols.to(self._device, non_blocking=True).unflatten(1, (-1, *shape))
        with _deterministic_arithmetic(self._device):
            z_hat = dequantise(symbols, self._tables.medians)
            walk = slices.walk(scaled(z_hat, z_dec).to(dtype))
            step = next(walk)
        for _ in range(len(slices.lrp_transforms)):
            mu, scale = step
            symbols = yield self._tables.indexes(scale)
            symbols = symbols.to(self._device, non_blocking=True)
            with _deterministic_arithmetic(self._device):
                step = walk.send(dequantise(symbols.view(mu.shape), mu))
        y_hat = step.to(self._dtype).contiguous(memory_format=torch.channels_last)
        yield y_hat
        yield self.model.synthesise(y_hat, y_dec, self.precision)

    def _path(self, exact: bool) -> tuple[SlicePredictor, torch.dtype]:
        """The entropy path and its dtype."""
        return (self._exact_slices, torch.float64) if exact else (self._slices, self._dtype)

    def _host_tensor(self, *shape: int) -> Tensor:
        """A tensor on the host that the device can fetch while the host goes on."""
        return torch.empty(shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")

    def _z_shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of z for a picture of this size."""
        factor = self.model.downsampling_factor
        return -(-height // factor), -(-width // factor)

    def _run(self, function: Callable[..., Generator], *args) -> Generator:
        """Run a generator function of its arguments, of what it is sent, and of the weights."""
        return self._replay.stretches(function, *args) if self._replay else function(*args)

    def _make_room(self, *size: int) -> None:
        """Make room for the graphs of a size: batch, rows and columns of z; or a map's shape."""
        if self._replay and size not in self._sizes:
            if len(self._sizes) == MAX_GRAPHED_SIZES:
                self._replay.forget()
                self._sizes.clear()
            self._sizes.add(size)


def _in_range(x_hat: Tensor) -> Tensor:
    """Pictures clamped to [0, 1].

    Raises:
        ValueError: they are not finite: clamped, infinities would look white.
    """
    if not x_hat.isfinite().all():
        raise ValueError("the network's picture is not finite; check its weights")
    return x_hat.clamp(0, 1)


def _fetch(tensors: Iterable[Tensor | None]) -> Callable[[], list[np.ndarray | None]]:
    """Begin to copy tensors to the host; a call of the result waits and returns them as arrays."""
    copies = [t if t is None else t.to("cpu", non_blocking=True) for t in tensors]
    done = None
    if any(t is not None and t.is_cuda for t in tensors):
        done = torch.cuda.Event()
        done.record()

    def wait() -> list[np.ndarray | None]:
        if done is not None:
            done.synchronize()
        return [copy if copy is None else copy.numpy() for copy in copies]

    return wait


@dataclass(frozen=True, eq=False)
class _ExactPredictor(SlicePredictor):
    """A `SlicePredictor` in float64.

    Attributes:
        side: stream on which a GPU predicts scales while it predicts means; its maps are so small
            that most of it would wait otherwise. None on a CPU.
    """

    side: torch.cuda.Stream | None

    def both(self, of_means: Callable, of_scales: Callable, *inputs: Tensor) -> tuple:
        if self.side is None:
            return super().both(of_means, of_scales, *inputs)
        current = torch.cuda.current_stream()
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            scales = of_scales()
        means = of_means()
        current.wait_stream(self.side)
        return means, scales


class _FusedLinear(nn.Module):
    """A linear layer on channels-last maps as one kernel: `kernels.conv_chain`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", linear.weight[:, :, None, None])  # (out, in, 1, 1)
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        return kernels.conv_chain(x, [self.weight], [self.bias], [None]).permute(0, 2, 3, 1)


class _ProductConv2d(nn.Module):
    """A convolution of stride 1 as one matrix product.

    In float64 PyTorch's convolution takes a GPU ten times as long.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.kernel_size = convolution.kernel_size
        self.padding = convolution.padding
        self.register_buffer("weight", convolution.weight.flatten(1))  # (out, in * k * k)
        self.register_buffer("bias", convolution.bias[:, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1):
            columns = x.flatten(2)  # (batch, in * k * k, h * w)
        else:
            columns = F.unfold(x, self.kernel_size, padding=self.padding)
        weight = self.weight.expand(len(x), -1, -1)
        return torch.baddbmm(self.bias, weight, columns).unflatten(-1, x.shape[-2:])


class _ProductConvTranspose2d(nn.Module):
    """A transposed convolution as one matrix product, whose parts are then added up.

    Args:
        layout: memory format of the result.
    """

    def __init__(self, convolution: nn.ConvTranspose2d, layout: torch.memory_format):
        super().__init__()
        self.layout = layout
        self.kernel_size = convolution.kernel_size
        self.stride = convolution.stride
        self.padding = convolution.padding
        self.output_padding = convolution.output_padding
        self.register_buffer("weight", convolution.weight.flatten(1).T)  # (out * k * k, in)
        self.register_buffer("bias", convolution.bias[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        columns = self.weight.expand(len(x), -1, -1) @ x.flatten(2)
        sides = zip(
            x.shape[-2:],
            self.stride,
            self.padding,
            self.kernel_size,
            self.output_padding,
            strict=True,
        )
        size = [(n - 1) * s - 2 * p + k + extra for n, s, p, k, extra in sides]
        y = F.fold(columns, size, self.kernel_size, padding=self.padding, stride=self.stride)
        # What follows has kernels for maps that lie channels last.
        return (y + self.bias).contiguous(memory_format=self.layout)


def _in_float64(slices: SlicePredictor) -> dict:
    """Copies of its parts that compute in float64, without PyTorch's slow convolutions.

    In their place are kernels where these run, on a GPU, else products. What these do not compute
    stays, such as depthwise convolutions, and so do the layers of `SS2D`, which its kernels read
    and nobody calls.
    """
    parts = copy.deepcopy(vars(slices))
    device = next(slices.h_mean_s.parameters()).device
    fuses = kernels.fuses_convolutions(torch.empty(1, dtype=torch.float64, device=device))
    layout = torch.channels_last if fuses else torch.contiguous_format
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.to(dtype=torch.float64, memory_format=layout)
            _replace_layers(part, fuses, layout)
    return parts


def _replace_layers(parent: nn.Module, fuses: bool, layout: torch.memory_format) -> None:
    # Subclasses may compute something else.
    for name, layer in parent.named_children():
        if isinstance(layer, SS2D) or (fuses and isinstance(layer, ConvChain)):
            continue
        if type(layer) in (nn.Conv2d, Conv1x1) and _is_plain(layer):
            setattr(parent, name, ConvChain(layer) if fuses else _exact_convolution(layer))
        elif type(layer) is nn.ConvTranspose2d:
            setattr(parent, name, _ProductConvTranspose2d(layer, layout))
        elif type(layer) is nn.Linear and layer.bias is not None and fuses:
            setattr(parent, name, _FusedLinear(layer))
        else:
            _replace_layers(layer, fuses, layout)


def _is_plain(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size in ((1, 1), (3, 3))
        and layer.padding == tuple(side // 2 for side in layer.kernel_size)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.bias is not None
    )


def _exact_convolution(layer: nn.Conv2d) -> nn.Module:
    # Products are what takes a CPU's time, launching kernels a GPU's that fuses nothing.
    if layer.kernel_size == (3, 3) and layer.weight.device.type == "cpu":
        return WinogradConv2d(layer)
    return _ProductConv2d(layer)


def _deterministic_arithmetic(device: torch.device) -> contextlib.AbstractContextManager:
    """Fixed convolution algorithms without TF32, so that both ends of a stream compute alike."""
    if device.type != "cuda":  # where tiles are coded in threads, which share these settings
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, deterministic=True, benchmark=False, allow_tf32=False
    )


def fingerprint(state_dict: Mapping[str, Tensor]) -> bytes:
    """Four bytes that differ between models that decode differently.

    The first bytes of the SHA-256 of all that decoding depends on: names, shapes and values of the
    layers behind the latents (as float32, so that storing them in half precision keeps it where
    the values are equal), of the CDF tables and of the scale table. It takes a pass over all
    weights; a `Coder` computes it once.
    """
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        made_tables = name.startswith(_ENTROPY_MODELS) and not name.endswith(_TABLES)
        if name.startswith(_ENCODER) or made_tables:
            continue
        kind = torch.float32 if value.is_floating_point() else torch.int64
        array = value.detach().to("cpu", kind).contiguous().numpy()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return digest.digest()[:4]
