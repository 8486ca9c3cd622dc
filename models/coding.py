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
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels.graphs import Replay
from layers.compressai import CompressionModel
from layers.winograd import WinogradConv2d

from . import container
from .container import BitstreamError, Stream
from .entropy import LatentDecoder, LatentEncoder, LatentTables, SlicePredictor

MAX_GRAPHED_SIZES = 8  # of pictures; each has 13 graphs, whose memory is kept

# What only the encoder uses, and what the tables were made from.
_ENCODER = ("g_a.", "h_a.")
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

    Raises:
        ValueError: the model is in training mode, its CDF tables are missing or damaged, or
            graphs are asked for on a CPU.
    """

    def __init__(self, model: CompressionModel, *, exact: bool = True, graphs: bool = False):
        if model.training:
            raise ValueError("the model is in training mode; call eval() before coding")
        if graphs and model.entropy_bottleneck.quantiles.device.type != "cuda":
            raise ValueError("CUDA graphs need a model on a GPU; leave graphs=True out")
        self.model = model
        self.exact = exact
        self._tables = LatentTables(model.entropy_bottleneck, model.gaussian_conditional)
        self._slices = model.slices
        self._dtype = model.entropy_bottleneck.quantiles.dtype
        self._replay = Replay() if graphs else None
        self._sizes: set[tuple[int, ...]] = set()  # that the graphs are of

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """Four bytes that name the model: see the function `fingerprint`."""
        return fingerprint(self.model.state_dict())

    @functools.cached_property
    def _exact_slices(self) -> SlicePredictor:
        # Tensors made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return _in_float64(self._slices)

    @torch.no_grad()
    def compress(self, x: Tensor) -> dict:
        """Encode pictures to strings.

        Args:
            x: (batch, 3, height, width), RGB in [0, 1], any size from 1x1 up.

        Returns:
            The arguments of `decompress`: ``strings`` ([y strings, z strings], one of each per
            picture), ``shape`` of z, ``size`` (height, width) of the pictures, ``guards`` and
            ``crcs`` per picture (see `LatentEncoder`).

        Raises:
            ValueError: the latents cannot be coded.
        """
        self._make_room(len(x), *self._z_shape(*x.shape[-2:]))
        y, z = self._run(self.model.analyse, self.model.pad(x))
        encoder = LatentEncoder(self._tables, y)
        with _deterministic_arithmetic():
            z_strings, z_hat = encoder.encode_z(z)
            self._walk(z_hat, encoder.round_slice, self.exact)
        return {
            "strings": [encoder.encode_y(), z_strings],
            "shape": self._z_shape(*x.shape[-2:]),
            "size": tuple(x.shape[-2:]),
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
        *,
        exact: bool | None = None,
    ) -> dict:
        """Decode what `compress` returned.

        Args:
            strings, shape, size, guards, crcs: see `compress`. Without ``size`` the padded
                pictures are returned, without ``crcs`` the symbols are not checked.
            exact: as the pictures were encoded; by default as this Coder encodes them.

        Returns:
            ``x_hat`` (batch, 3, *size), clamped to [0, 1]; ``y_hat`` (batch, M, h/16, w/16).

        Raises:
            BitstreamError: the symbols are not those that were encoded.
            ValueError: the picture is not finite: clamped, its infinities would look white.
        """
        y_strings, z_strings = strings
        self._make_room(len(y_strings), *shape)
        decoder = LatentDecoder(self._tables, y_strings, guards or [[] for _ in y_strings])
        with _deterministic_arithmetic():
            z_hat = decoder.decode_z(z_strings, shape)
            y_hat = self._walk(z_hat, decoder.read_slice, self.exact if exact is None else exact)
        decoder.finish()
        if crcs is not None and list(crcs) != decoder.crcs:
            raise BitstreamError(
                "decoded symbols differ from those that were encoded; the stream is damaged, or "
                "it was made by another model or without the exact entropy path on another machine"
            )
        height, width = size or (None, None)
        y_hat = y_hat.to(self._dtype).contiguous(memory_format=torch.channels_last)
        x_hat = self._run(self.model.g_s, y_hat)[..., :height, :width]
        if not x_hat.isfinite().all():
            raise ValueError("the network's picture is not finite; check its weights")
        return {"x_hat": x_hat.clamp(0, 1), "y_hat": y_hat}

    def encode(self, x: Tensor) -> bytes:
        """Code one picture as a `.mvc` file.

        Args:
            x: (1, 3, height, width), RGB in [0, 1].

        Raises:
            BitstreamError: the picture is larger than the format allows.
            ValueError: the latents cannot be coded.
        """
        height, width = x.shape[-2:]
        container.check_size(height, width)
        coded = self.compress(x)
        (y,), (z,) = coded["strings"]
        (guards,), (crc,) = coded["guards"], coded["crcs"]
        return container.pack(
            Stream(self.fingerprint, self.exact, height, width, guards, z, y, crc)
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
        if stream.fingerprint != self.fingerprint:
            raise BitstreamError(
                f"the file was made by model {stream.fingerprint.hex()}, this checkpoint is model "
                f"{self.fingerprint.hex()}; give the checkpoint it was made with"
            )
        try:
            return self.decompress(
                strings=[[stream.y], [stream.z]],
                shape=self._z_shape(stream.height, stream.width),
                size=(stream.height, stream.width),
                guards=[stream.guards],
                crcs=[stream.crc],
                exact=stream.exact,
            )["x_hat"]
        except BitstreamError:
            if stream.exact:
                raise
            raise BitstreamError(
                "the file was coded with the fast entropy path, so it decodes on the machine that "
                "made it only, with the same software, and here its symbols come out wrong; encode "
                "the picture again with the exact path"
            ) from None

    def has_graphs(self, x: Tensor) -> bool:
        """Whether pictures of x's size were coded before, and their graphs are still kept."""
        return (len(x), *self._z_shape(*x.shape[-2:])) in self._sizes

    def _walk(self, z_hat: Tensor, quantise, exact: bool) -> Tensor:
        """Run the entropy path on z_hat, which is float64; return y_hat."""
        if exact:
            return self._exact_slices(z_hat, quantise, self._run)
        return self._slices(z_hat.to(self._dtype), quantise, self._run)

    def _z_shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of z for a picture of this size."""
        factor = self.model.downsampling_factor
        return -(-height // factor), -(-width // factor)

    def _run(self, stage, *args):
        """Run a stage of the network, a function of its arguments and of the weights only."""
        return self._replay(stage, *args) if self._replay else stage(*args)

    def _make_room(self, batch: int, rows: int, columns: int) -> None:
        """Make room for the graphs of a batch with z of so many rows and columns."""
        size = (batch, rows, columns)
        if self._replay and size not in self._sizes:
            if len(self._sizes) == MAX_GRAPHED_SIZES:
                self._replay.forget()
                self._sizes.clear()
            self._sizes.add(size)


class _ProductConv2d(nn.Module):
    """A convolution of stride 1 as one matrix product.

    In float64 a GPU's library takes ten times as long for the convolution as for the product.
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


def _in_float64(slices: SlicePredictor) -> SlicePredictor:
    """A copy that computes in float64, with products in place of convolutions of stride 1."""
    slices = copy.deepcopy(slices)
    for part in vars(slices).values():
        if not isinstance(part, nn.Module):
            continue
        part.to(dtype=torch.float64, memory_format=torch.contiguous_format)
        for parent in list(part.modules()):
            for name, layer in list(parent.named_children()):
                # The depthwise convolutions of `SS2D` are a kernel's and not called.
                if type(layer) is nn.Conv2d and layer.stride == (1, 1) and layer.groups == 1:
                    setattr(parent, name, _exact_convolution(layer))
    return slices


def _exact_convolution(layer: nn.Conv2d) -> nn.Module:
    # Products are what takes a CPU's time, kernels to be launched a GPU's.
    if layer.kernel_size == (3, 3) and layer.weight.device.type == "cpu":
        return WinogradConv2d(layer)
    return _ProductConv2d(layer)


def _deterministic_arithmetic() -> contextlib.AbstractContextManager:
    """Fixed convolution algorithms without TF32, so that both ends of a stream compute alike."""
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
