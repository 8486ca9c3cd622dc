"""Hyperprior codec with a channel-wise autoregressive entropy model, whatever its transforms."""

from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from layers.compressai import CompressionModel, quantize_ste, remap_old_keys

from .coding import Coder
from .entropy import SlicePredictor

# Buffers whose size depends on training, not on the architecture.
_TABLES = ("_quantized_cdf", "_cdf_length", "_offset", "scale_table")


class SliceHyperprior(CompressionModel):
    """Everything of the codec but its layers.

    A subclass sets the transforms ``g_a``, ``g_s``, ``h_a``, the parts of `SlicePredictor`,
    ``entropy_bottleneck``, ``gaussian_conditional`` and ``config`` (its constructor arguments).
    """

    config: dict

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

    def pad(self, x: Tensor) -> Tensor:
        """Repeat the last row and column up to the next multiple of the downsampling factor."""
        factor = self.downsampling_factor
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % factor, 0, -height % factor), mode="replicate")
        return x.contiguous(memory_format=torch.channels_last)

    def analyse(self, x: Tensor, precision: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """y and z of padded pictures; for the precision see `forward`."""
        y = _transform(self.g_a, x, precision)
        return y, self.h_a(y)

    def synthesise(self, y_hat: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
        """Padded pictures from y_hat; for the precision see `forward`."""
        return _transform(self.g_s, y_hat, precision)

    def forward(self, x: Tensor, *, precision: torch.dtype = torch.float32) -> dict:
        """Reconstruct pictures and estimate their rate.

        Args:
            x: pictures (batch, 3, height, width), RGB in [0, 1], any size from 1x1 up.
            precision: with bfloat16 the blocks of g_a and g_s, but not the convolutions between
                them, run in autocast to it, also where training's autocast is not on.

        Returns:
            ``x_hat`` like x, not clamped; ``likelihoods`` with ``y`` (batch, M, h/16, w/16) and
            ``z`` (batch, Z, h/64, w/64), float32, of the picture padded to multiples of 64.
        """
        height, width = x.shape[-2:]
        y, z = self.analyse(self.pad(x), precision)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            _, z_likelihoods = self.entropy_bottleneck(z)
            medians = self.entropy_bottleneck.medians()
            z_hat = quantize_ste(z - medians) + medians

        y_likelihoods: list[Tensor] = []

        def round_slice(i: int, mu: Tensor, scale: Tensor) -> Tensor:
            with torch.autocast(y.device.type, enabled=False):
                channels = mu.shape[1]
                y_slice = y[:, i * channels : (i + 1) * channels].float()
                mu = mu.float()
                _, likelihood = self.gaussian_conditional(y_slice, scale.float(), mu)
                y_likelihoods.append(likelihood)
                return quantize_ste(y_slice - mu) + mu

        y_hat = self.slices(z_hat, round_slice)
        return {
            "x_hat": self.synthesise(y_hat, precision)[..., :height, :width],
            "likelihoods": {"y": torch.cat(y_likelihoods, dim=1), "z": z_likelihoods},
        }

    def compress(self, x: Tensor, *, exact: bool = True) -> dict:
        """Encode pictures: `Coder.compress`. For many pictures, keep a `Coder`."""
        return Coder(self, exact=exact).compress(x)

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

    @classmethod
    def from_state_dict(cls, state_dict):
        """Build a model from a state dict (or a checkpoint that holds one).

        Sizes and depths are recovered from its shapes, in which ``drop_path_rate`` leaves no trace.

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
