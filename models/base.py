"""Hyperprior codec with a channel-wise autoregressive entropy model, whatever its transforms."""

import copy
import operator
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from compressai.models import CompressionModel
from compressai.models.utils import remap_old_keys
from compressai.ops import quantize_ste
from torch import Tensor

from .entropy import (
    BitstreamError,
    LatentDecoder,
    LatentEncoder,
    SlicePredictor,
    call,
    deterministic_arithmetic,
    multiply_convolutions,
)

__all__ = ["SliceHyperprior"]

# Buffers whose size depends on training, not on the architecture.
_TABLES = ("_quantized_cdf", "_cdf_length", "_offset", "scale_table")

# The modules and device of each model's entropy path, its float64 copy and the copy's values.
_exact_slices: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class SliceHyperprior(CompressionModel):
    """Everything of the codec but its layers.

    A subclass sets the transforms ``g_a``, ``g_s``, ``h_a``, the parts of `SlicePredictor`,
    ``entropy_bottleneck``, ``gaussian_conditional`` and ``config`` (its constructor arguments).

    Attributes:
        run_stage: how `compress` and `decompress` run their stages; `graphs.Replay` is faster for
            many pictures of one size on a GPU.
    """

    config: dict
    run_stage: Callable = staticmethod(call)

    @property
    def downsampling_factor(self) -> int:
        """Pixels of the picture per element of z; pictures are padded to multiples of it."""
        return 64

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

    def _pad(self, x: Tensor) -> Tensor:
        """Repeat the last row and column up to the next multiple of the downsampling factor."""
        factor = self.downsampling_factor
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % factor, 0, -height % factor), mode="replicate")
        return x.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> dict:
        """Reconstruct pictures and estimate their rate.

        Args:
            x: pictures (batch, 3, height, width), RGB in [0, 1], any size from 1x1 up.

        Returns:
            ``x_hat`` like x, not clamped; ``likelihoods`` with ``y`` (batch, M, h/16, w/16) and
            ``z`` (batch, Z, h/64, w/64), float32, of the picture padded to multiples of 64.
        """
        height, width = x.shape[-2:]
        y = self.g_a(self._pad(x))
        z = self.h_a(y)

        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            _, z_likelihoods = self.entropy_bottleneck(z)
            medians = self._medians()
            z_hat = quantize_ste(z - medians) + medians

        y_likelihoods: list[Tensor] = []

        def code_slice(i: int, mu: Tensor, scale: Tensor) -> Tensor:
            with torch.autocast(y.device.type, enabled=False):
                channels = mu.shape[1]
                y_slice = y[:, i * channels : (i + 1) * channels].float()
                mu = mu.float()
                _, likelihood = self.gaussian_conditional(y_slice, scale.float(), mu)
                y_likelihoods.append(likelihood)
                return quantize_ste(y_slice - mu) + mu

        y_hat = self.slices(z_hat, code_slice)
        return {
            "x_hat": self.g_s(y_hat)[..., :height, :width],
            "likelihoods": {"y": torch.cat(y_likelihoods, dim=1), "z": z_likelihoods},
        }

    def _medians(self) -> Tensor:
        """Medians of the bottleneck's channels: (1, Z, 1, 1)."""
        return self.entropy_bottleneck.quantiles[:, 0, 1].detach().reshape(1, -1, 1, 1)

    def _coding_slices(self, exact: bool) -> SlicePredictor:
        """The entropy path in the arithmetic of a stream: a float64 copy, or the layers as is."""
        if not exact:
            return self.slices
        slices = self.slices
        modules, device = list(slices.modules())[1:], self.entropy_bottleneck.quantiles.device
        known, known_device, exact_slices, values = _exact_slices.get(self, ([], None, None, None))
        if device != known_device or not (
            len(known) == len(modules) and all(map(operator.is_, known, modules))
        ):
            # Tensors made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                exact_slices = copy.deepcopy(slices).double()
                multiply_convolutions(exact_slices)
                values = _join(_tensors(list(exact_slices.modules())[1:]))
            _exact_slices[self] = modules, device, exact_slices, values
        # Copying the modules takes ten times as long as copying the values, which may have changed.
        values.copy_(torch.cat([tensor.flatten() for tensor in _tensors(modules)]))
        return exact_slices

    @torch.no_grad()
    def compress(self, x: Tensor, *, exact: bool = True) -> dict:
        """Encode pictures to bytes.

        Args:
            x: pictures as in `forward`.
            exact: compute the entropy path in float64, so that any device decodes the stream;
                False uses the layers' own precision, for decoding on the same machine only.

        Returns:
            The keyword arguments of `decompress`: ``strings`` ([y strings, z strings], one of
            each per image), ``shape`` of z, ``size`` (height, width) of the pictures, ``guards``
            and ``crcs`` per image (see `LatentEncoder`).

        Raises:
            ValueError: the model is in training mode or has no CDF tables.
        """
        self._check_eval()
        y, z = self.run_stage(self._analyse, self._pad(x))
        coder = LatentEncoder(self.entropy_bottleneck, self.gaussian_conditional, y)
        slices = self._coding_slices(exact)
        with deterministic_arithmetic():
            z_strings, z_hat = coder.encode_z(z, self._medians())
            slices(z_hat if exact else z_hat.to(y.dtype), coder.code_slice, self.run_stage)
        return {
            "strings": [coder.encode_y(), z_strings],
            "shape": tuple(z.shape[-2:]),
            "size": tuple(x.shape[-2:]),
            "guards": coder.guards,
            "crcs": coder.crcs,
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
        exact: bool = True,
    ) -> dict:
        """Decode what `compress` returned.

        Args:
            strings, shape, size, guards, crcs: see `compress`. Without ``size`` the padded
                picture is returned, without ``crcs`` the symbols are not checked.
            exact: as the stream was encoded.

        Returns:
            ``x_hat`` (batch, 3, *size), clamped to [0, 1]; ``y_hat`` (batch, M, h/16, w/16).

        Raises:
            BitstreamError: the symbols are not those that were encoded.
            ValueError: the model is in training mode or has no CDF tables.
        """
        self._check_eval()
        y_strings, z_strings = strings
        guards = guards if guards is not None else [[] for _ in y_strings]
        coder = LatentDecoder(self.entropy_bottleneck, self.gaussian_conditional, y_strings, guards)
        slices = self._coding_slices(exact)
        dtype = self.entropy_bottleneck.quantiles.dtype
        with deterministic_arithmetic():
            z_hat = coder.decode_z(z_strings, shape, self._medians())
            z_hat = z_hat if exact else z_hat.to(dtype)
            y_hat = slices(z_hat, coder.code_slice, self.run_stage).to(dtype)
        coder.finish()
        if crcs is not None and list(crcs) != coder.crcs:
            raise BitstreamError(
                "decoded symbols differ from those that were encoded; the stream is damaged, or "
                "it was made by another model or without the exact entropy path on another machine"
            )
        height, width = size or (None, None)
        y_hat = y_hat.contiguous(memory_format=torch.channels_last)
        x_hat = self.run_stage(self.g_s, y_hat)[..., :height, :width]
        return {"x_hat": x_hat.clamp(0, 1), "y_hat": y_hat}

    def _analyse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and z of a padded picture."""
        y = self.g_a(x)
        return y, self.h_a(y)

    def _check_eval(self) -> None:
        if self.training:
            raise ValueError("the model is in training mode; call eval() before coding")

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
                f"the state dict does not fit {type(self).__name__}: {shown}{more}. "
                "Check --model and its sizes against those of the checkpoint"
            )
        for key in own:
            module, _, name = key.rpartition(".")
            if name in _TABLES and key in state_dict:
                table = own[key].new_empty(state_dict[key].shape)
                setattr(self.get_submodule(module), name, table)
        return torch.nn.Module.load_state_dict(self, state_dict, strict=strict)

    @classmethod
    def from_state_dict(cls, state_dict, **kwargs):
        """Build a model from a state dict (or a checkpoint that holds one).

        Args:
            state_dict: sizes and depths are recovered from its shapes.
            kwargs: constructor arguments that leave no trace in shapes (``drop_path_rate``).

        Raises:
            RuntimeError: it is not a state dict of this network.
        """
        state_dict = _plain_keys(state_dict.get("state_dict", state_dict))
        try:
            config = cls.config_from_state_dict(state_dict)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise RuntimeError(
                f"this is not a state dict of {cls.__name__}: {error!r} is not among its "
                f"{len(state_dict)} entries; give a checkpoint of this network"
            ) from None
        model = cls(**{**config, **kwargs})
        model.load_state_dict(state_dict)
        return model


def _tensors(modules: Sequence[torch.nn.Module]) -> list[Tensor]:
    """Floating-point parameters and buffers of these modules themselves, in order."""
    stores = (store for m in modules for store in (m._parameters, m._buffers))
    tensors = (tensor for store in stores for tensor in store.values())
    return [t for t in tensors if t is not None and t.is_floating_point()]


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Make the tensors views of one, which is returned: their values, flat, one after another."""
    values = torch.cat([tensor.flatten() for tensor in tensors])
    parts = values.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part.view(tensor.shape)
    return values


def _plain_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without DataParallel's prefix, and with today's names of the bottleneck's parameters."""
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    return remap_old_keys("entropy_bottleneck", state_dict)
