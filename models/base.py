"""Hyperprior codec with a channel-wise autoregressive entropy model, whatever its transforms."""

from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from layers.compressai import CompressionModel, remap_old_keys

from .coding import Coder
from .entropy import SlicePredictor, round_from
from .gains import Gains, gains_at, in_float64, scaled

# Buffers whose size depends on training, not on the architecture.
_TABLES = ("_quantized_cdf", "_cdf_length", "_offset", "scale_table")


class SliceHyperprior(CompressionModel):
    """Everything of the codec but its layers.

    A subclass sets the transforms ``g_a``, ``g_s``, ``h_a``, the parts of `SlicePredictor`,
    ``entropy_bottleneck``, ``gaussian_conditional``, ``gains`` (None for a single rate) and
    ``config`` (its constructor arguments). The first layer of ``g_s`` and of the hyper-syntheses is
    a transposed convolution, the last one of ``g_a`` and ``h_a`` a convolution.
    """

    config: dict
    gains: Gains | None

    # Pixels of the picture per element of z; pictures are padded to multiples of it.
    downsampling_factor = 64

    @property
    def slices(self) -> SlicePredictor:
        """The entropy path, made of this model's own modules."""
        return SlicePredictor(
            self.h_mean_s,
            self.h_scale_s,
            self.atten_mean,
            self.atten_scale,
            self.cc_mean_transforms,
            self.cc_scale_transforms,
            self.lrp_transforms,
            self.config["max_support_slices"],
        )

    @property
    def qualities(self) -> int:
        """Qualities at which gains were learnt; 0 for a single-rate network."""
        return 0 if self.gains is None else len(self.gains.y_enc)

    def lmbda(self, quality: float | Tensor) -> Tensor:
        """Weight of the distortion (CompressAI's lambda) at qualities from 0 to 100.

        Args:
            quality: a number, or a tensor of any shape and device; the host does not wait for it.

        Returns:
            A tensor of the same shape.

        Raises:
            ValueError: the network has a single rate.
        """
        if self.gains is None:
            raise ValueError("this network has a single rate, and does not know its lambda")
        return self.gains.lmbda(torch.as_tensor(quality, dtype=torch.float32))

    def pad(self, x: Tensor) -> Tensor:
        """Repeat the last row and column up to the next multiple of the downsampling factor."""
        factor = self.downsampling_factor
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % factor, 0, -height % factor), mode="replicate")
        return x.contiguous(memory_format=torch.channels_last)

    def analyse(
        self,
        x: Tensor,
        y_enc: Tensor | None = None,
        z_enc: Tensor | None = None,
        precision: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """y and z of padded pictures, times their gains; for the precision see `forward`."""
        y = self.latents(x, y_enc, precision)
        return y, self.hyper_latents(y, z_enc)

    def latents(
        self, x: Tensor, y_enc: Tensor | None = None, precision: torch.dtype = torch.float32
    ) -> Tensor:
        """y of padded pictures, times its gain; for the precision see `forward`."""
        return scaled(_transform(self.g_a, x, precision), y_enc)

    def hyper_latents(self, y: Tensor, z_enc: Tensor | None = None) -> Tensor:
        """z of y, times its gain."""
        return scaled(self.h_a(y), z_enc)

    def synthesise(
        self, y_hat: Tensor, y_dec: Tensor | None = None, precision: torch.dtype = torch.float32
    ) -> Tensor:
        """Padded pictures from y_hat, times its gain; for the precision see `forward`."""
        return _transform(self.g_s, scaled(y_hat, y_dec), precision)

    def forward(
        self,
        x: Tensor,
        quality: float | Tensor | None = None,
        *,
        precision: torch.dtype = torch.float32,
    ) -> dict:
        """Reconstruct pictures and estimate their rate.

        Args:
            x: pictures (batch, 3, height, width), RGB in [0, 1], any size from 1x1 up.
            quality: 0 to 100, or a tensor (batch,) of them on the network's device, whose values
                are not checked. A network with gains needs it, one of a single rate has none.
            precision: with bfloat16 the blocks of g_a and g_s, but not the convolutions between
                them, run in autocast to it, also where training's autocast is not on.

        Returns:
            ``x_hat`` like x, not clamped; ``likelihoods`` with ``y`` (batch, M, h/16, w/16) and
            ``z`` (batch, Z, h/64, w/64), float32, of the picture padded to multiples of 64.

        Raises:
            ValueError: a quality is missing, out of range, or given to a single-rate network.
        """
        height, width = x.shape[-2:]
        gain = gains_at(self.gains, quality)
        y, z = self.analyse(self.pad(x), gain.y_enc, gain.z_enc, precision)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            _, z_likelihoods = self.entropy_bottleneck(z)
            z_hat = scaled(round_from(self.entropy_bottleneck.medians(), z), gain.z_dec)

        y = y.float()
        y_slices = y.chunk(len(self.lrp_transforms), dim=1)
        predictions: list[tuple[Tensor, Tensor]] = []

        def round_slice(i: int, mu: Tensor, scale: Tensor) -> Tensor:
            predictions.append((mu.float(), scale.float()))
            return round_from(predictions[i][0], y_slices[i])

        y_hat = self.slices(z_hat, round_slice)
        # Before the likelihoods, so that a backward pass begins with those: what follows from them
        # then runs beside what follows from the picture, where a GPU does both (`side_by_side`).
        x_hat = self.synthesise(y_hat, gain.y_dec, precision)[..., :height, :width]
        mu, scale = (torch.cat(parts, dim=1) for parts in zip(*predictions, strict=True))
        with torch.autocast(y.device.type, enabled=False):
            _, y_likelihoods = self.gaussian_conditional(y, scale, mu)
        return {
            "x_hat": x_hat,
            "likelihoods": {"y": y_likelihoods, "z": z_likelihoods},
        }

    def compress(self, x: Tensor, *, quality: float | None = None, exact: bool = True) -> dict:
        """Encode pictures: `Coder.compress`. For many pictures, keep a `Coder`."""
        return Coder(self, exact=exact).compress(x, quality)

    def decompress(self, *args, exact: bool = True, **kwargs) -> dict:
        """Decode what `compress` returned: `Coder.decompress`."""
        return Coder(self, exact=exact).decompress(*args, **kwargs)

    def update(self, scale_table=None, force=False, update_quantiles=True) -> bool:
        """Build the CDF tables that coding needs; True if they changed.

        Unlike CompressAI's default, the bottleneck's quantiles are solved first: where training
        left them short of convergence, the tables would waste bits.
        """
        return super().update(scale_table, force, update_quantiles)

    def load_state_dict(self, state_dict, strict: bool = True):
        """Load weights of this or of the published code; CDF tables of any size are taken over.

        Raises:
            RuntimeError: the message lists missing, unexpected and misshapen entries.
        """
        state_dict = _plain_keys(state_dict)
        own = self.state_dict()
        problems = []
        if strict:
            problems += [f"missing {key}" for key in own if key not in state_dict]
            problems += [f"unexpected {key}" for key in state_dict if key not in own]
        problems += [
            f"{key} has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}"
            for key, value in state_dict.items()
            if key in own and value.shape != own[key].shape and not key.endswith(_TABLES)
        ]
        if problems:
            shown = "; ".join(problems[:20])
            more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise RuntimeError(
                f"the state dict does not fit {type(self).__name__}: {shown}{more}; "
                "give the sizes of the network that it is of"
            )
        for key in own:
            module, _, name = key.rpartition(".")
            if name in _TABLES and key in state_dict:
                table = own[key].new_empty(state_dict[key].shape)
                setattr(self.get_submodule(module), name, table)
        return torch.nn.Module.load_state_dict(self, state_dict, strict=strict)

    def load_single_rate(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the weights of a single-rate network and leave the gains as they are.

        A new network with gains then starts from it, best where its lambda was 0.0130.

        Raises:
            RuntimeError: they are not of a network of these sizes.
        """
        own = {key: value for key, value in self.state_dict().items() if key.startswith("gains.")}
        self.load_state_dict({**state_dict, **own})

    @property
    def scaled_layers(self) -> dict[str, str]:
        """Convolutions that gains become part of at a fixed quality: name, field of the gain."""
        return {
            f"g_a.{len(self.g_a) - 1}": "y_enc",
            "g_s.0": "y_dec",
            f"h_a.{len(self.h_a) - 1}": "z_enc",
            "h_mean_s.0": "z_dec",
            "h_scale_s.0": "z_dec",
        }

    @torch.no_grad()
    def at_quality(self, quality: float) -> "SliceHyperprior":
        """The single-rate network, with the published keys, that does the same at one quality.

        Each gain becomes part of the convolution before or after it, so that outputs are equal but
        for float32's rounding. The network is a copy, in the mode and on the device of this one.

        Args:
            quality: 0 to 100.

        Raises:
            ValueError: the quality is out of range, or this network has a single rate.
        """
        # In float64, so that each weight is rounded once.
        gain = gains_at(in_float64(self.gains), quality)
        plain = type(self)(**{**self.config, "qualities": 0})
        plain.to(next(self.parameters()).device).train(self.training)
        plain.load_state_dict(
            {key: v for key, v in self.state_dict().items() if not key.startswith("gains.")}
        )
        for name, field in self.scaled_layers.items():
            layer, factor = plain.get_submodule(name), getattr(gain, field).flatten()
            # Rows of a convolution's weight, columns of a transposed one's: (in, out, k, k).
            layer.weight.copy_(layer.weight * factor[:, None, None, None])
            if field.endswith("_enc"):
                layer.bias.copy_(layer.bias * factor)
        return plain

    @classmethod
    def from_state_dict(cls, state_dict):
        """Build a model from a state dict (or a checkpoint that holds one).

        Sizes and depths are recovered from its shapes, in which ``drop_path_rate`` and
        ``lmbda_range`` leave no trace.

        Raises:
            RuntimeError: it is not a state dict of this network.
        """
        state_dict = state_dict.get("state_dict", state_dict)
        model = cls(**cls.sizes_from_state_dict(state_dict))
        model.load_state_dict(state_dict)
        return model

    @classmethod
    def sizes_from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict:
        """Constructor arguments that leave a trace in the shapes of a state dict.

        Raises:
            RuntimeError: it is not a state dict of this network.
        """
        state_dict = _plain_keys(state_dict)
        try:
            sizes = cls.config_from_state_dict(state_dict)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise RuntimeError(
                f"this is not a state dict of {cls.__name__}: {error!r} is not among its "
                f"{len(state_dict)} entries; give a checkpoint of this network"
            ) from None
        for key, value in state_dict.items():
            # An expanded tensor can have any shape: a network of that size is not to be built.
            if value.untyped_storage().nbytes() < value.numel() * value.element_size():
                raise RuntimeError(f"{key} has fewer values than its shape {tuple(value.shape)}")
        return sizes


def _transform(layers: nn.Sequential, x: Tensor, precision: torch.dtype) -> Tensor:
    """Run g_a or g_s. In bfloat16 its convolutions, through which all passes, stay as they are:

    what a block adds to the float32 map between them is rounded, the map is not.
    """
    if precision == torch.float32:
        return layers(x)
    for layer in layers:
        is_block = not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
        with torch.autocast(x.device.type, precision, enabled=is_block):
            x = layer(x)
    return x


def _plain_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without DataParallel's prefix, and with today's names of the bottleneck's parameters."""
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    return remap_old_keys("entropy_bottleneck", state_dict)
