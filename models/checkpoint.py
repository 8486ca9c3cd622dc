"""Checkpoints: files of weights, found by path or by name, and the networks they hold.

PyTorch is imported where it is needed only, so that a wrong name is reported at once.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UsageError, check_output

from .weights import (
    MAX_PART_BYTES,
    PART_PATTERN,
    index_path,
    read_weights,
    sha256,
    to_bytes,
    write_weights,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .base import SliceHyperprior

CHECKPOINT_FOLDER = Path(__file__).parent.parent / "checkpoints"
PROGRESS = ("step", "cooldown_from")  # what of a run travels with its weights


def list_checkpoints() -> list[str]:
    """Names of the checkpoints that come with the project, sorted."""
    files = {*CHECKPOINT_FOLDER.glob("*.safetensors")}
    files -= {*CHECKPOINT_FOLDER.glob(f"*{PART_PATTERN}")}
    files |= {*CHECKPOINT_FOLDER.glob("*.safetensors.index.json")}
    return sorted({checkpoint_name(path) for path in files})


def checkpoint_name(path: Path) -> str:
    """What a checkpoint's file, or the index of its parts, is called without its ending."""
    name = path.name.removesuffix(".index.json")
    return name.removesuffix(".safetensors").removesuffix(".pth.tar")


def find_checkpoint(name: Path | str) -> Path:
    """The file of that path, or the checkpoint of that name that comes with the project.

    Where that file's weights were written in parts, it is their index.

    Raises:
        UsageError: there is neither.
    """
    for path in (Path(name), CHECKPOINT_FOLDER / f"{name}.safetensors"):
        for file in (path, index_path(path)):
            if os.path.isfile(file):  # unlike Path.is_file, also of names too long for a file
                return file
    if os.path.isdir(name):
        raise UsageError(f"{name} is a folder; give a file of weights in it")
    names = ", ".join(list_checkpoints())
    raise UsageError(
        f"checkpoint {name} does not exist; give a file that train.py saved"
        + (f", or one of the names {names}" if names else "")
    )


def load_checkpoint(name: Path | str) -> dict:
    """Read a checkpoint onto the CPU, without running any code it may hold.

    Args:
        name: see `find_checkpoint`; what train.py, tools/export.py or the published code saved.

    Raises:
        UsageError: there is no such file, it is not a checkpoint, or its SHA-256 or that of a part
            is not the recorded one.
    """
    import torch

    path = find_checkpoint(name)
    try:
        _check_record(path)
        if path.suffix in (".safetensors", ".json"):
            metadata, state_dict = read_weights(path)
            checkpoint = {key: metadata[key] for key in ("model", "model_args")}
            progress = {key: int(metadata[key]) for key in PROGRESS if key in metadata}
            return {**checkpoint, **progress, "state_dict": state_dict}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickle protocols
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except PermissionError as error:
        raise UsageError(f"cannot load {error.filename or path}: {error.strerror}") from None
    except Exception:  # torch and safetensors raise many types, and say nothing that would help
        raise UsageError(
            f"cannot load {path} as a checkpoint: it is damaged, or no file of weights; "
            "give a file that train.py or tools/export.py wrote"
        ) from None
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path} holds a {type(checkpoint).__name__}, expected a checkpoint dict")
    return checkpoint


def _check_record(path: Path) -> None:
    """Check a file that comes with the project against the hash in its record, if it has one.

    Raises:
        UsageError: it is another file.
    """
    record = CHECKPOINT_FOLDER / f"{checkpoint_name(path)}.json"
    if path.parent.resolve() != CHECKPOINT_FOLDER.resolve() or not record.is_file():
        return
    recorded = json.loads(record.read_bytes()).get("sha256")
    if recorded is not None and sha256(path) != recorded:
        raise UsageError(
            f"{path} is damaged, or not the file that {record.name} beside it records; fetch both "
            "anew, or give weights of your own another name"
        )


def check_weights_output(path: Path) -> None:
    """Make sure that `save_weights` can write there, before the work whose result it takes.

    Raises:
        UsageError: it cannot.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"the output must end in .safetensors, got {path}")
    check_output(path)


def save_weights(
    checkpoint: dict,
    path: Path,
    exact: Iterable[str] = (),
    max_part_bytes: int = MAX_PART_BYTES,
    in_bytes: bool = False,
) -> bool:
    """Write a checkpoint's weights, tables, configuration and any progress as safetensors.

    Weights are rounded to half precision, but for tensors that hold a value beyond its range
    (65,504). The entropy models, which are small, are kept as they are, because their tables were
    built from them, and so are the gains, which act on all of a channel. So is an A that is fixed:
    rounded, it would be any other to the scan's kernels.

    Args:
        path: of a single file; of a larger one than ``max_part_bytes`` there are parts beside it,
            and their index (`find_checkpoint` gives the one that is there).
        exact: names of further layers to keep as they are.
        in_bytes: round weights to one byte where half precision takes two (`weights.to_bytes`).

    Returns:
        Whether rounding changed the model's fingerprint: what was coded with the checkpoint then
        does not decode with the file.

    Raises:
        UsageError: a weight is not finite.
    """
    from layers.ss2d import is_fixed

    from .coding import fingerprint

    _check_finite(checkpoint["state_dict"], path)
    layers = ("entropy_bottleneck", "gaussian_conditional", "gains", *exact)
    prefixes = tuple(f"{layer}." for layer in layers)
    state_dict = {}
    for key, value in checkpoint["state_dict"].items():
        half = value.half() if value.is_floating_point() else value
        is_exact = key.startswith(prefixes) or (key.endswith(".A_logs") and is_fixed(value))
        is_kept = is_exact or not half.isfinite().all()
        kept = (value if is_kept else half).contiguous()
        if in_bytes and value.is_floating_point() and not is_kept:
            state_dict |= to_bytes(key, kept)
        else:
            state_dict[key] = kept
    named = ("model", "model_args", *PROGRESS)
    metadata = {k: checkpoint[k] for k in named if checkpoint.get(k) is not None}
    write_weights(state_dict, metadata, path, max_part_bytes)
    return fingerprint(state_dict) != fingerprint(checkpoint["state_dict"])


def build_from_checkpoint(checkpoint: dict, source: object) -> SliceHyperprior:
    """The model of a checkpoint of ours (name and arguments inside) or of the published code.

    Its CDF tables are built if the checkpoint has none. The model is in eval mode on the CPU.

    Raises:
        UsageError: the weights do not fit a model we know, a value is not finite, or the tables
            are damaged or incomplete.
    """
    from ._registry import build_model
    from .entropy import LatentTables
    from .mambavc import MambaVC

    try:
        if "model_args" in checkpoint:
            arguments, state_dict = checkpoint["model_args"], checkpoint["state_dict"]
            _check_sizes(arguments, MambaVC.sizes_from_state_dict(state_dict))
            model = build_model(checkpoint["model"], **arguments)
            model.load_state_dict(state_dict)
        else:
            model = MambaVC.from_state_dict(checkpoint)
        _check_finite(model.state_dict(), source)
        model.eval()
        coders = (model.entropy_bottleneck, model.gaussian_conditional)
        if not any(coder.quantized_cdf.numel() for coder in coders):
            model.update(force=True)
        LatentTables(*coders)  # refuses damaged ones
    except KeyError as error:
        raise UsageError(f"{source} lacks {error}; give a file that train.py saved") from None
    except AttributeError:
        raise UsageError(
            f"{source}: its state_dict is no dict of tensors; give a file that train.py saved"
        ) from None
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{source}: {reason}") from None
    return model


def load_model(path: Path | str, device: torch.device | str = "cpu") -> SliceHyperprior:
    """`build_from_checkpoint` for a file.

    Raises:
        UsageError: see there and `load_checkpoint`.
    """
    return build_from_checkpoint(load_checkpoint(path), path).to(device)


def check_backend(device: torch.device) -> None:
    """Check that the scan backend the environment asks for runs on a device; log which one does.

    Raises:
        UsageError: it does not, or there is none of that name.
    """
    from kernels.backends import choose_scan

    try:
        choose_scan("auto", device.type)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from None


def check_rate(model: SliceHyperprior, is_given: bool, source: object, flags: str) -> None:
    """Check that a quality is given for a network of every rate, and for no other.

    Args:
        flags: that give one, in words.

    Raises:
        UsageError: it is not.
    """
    if model.qualities and not is_given:
        raise UsageError(f"{source} is a network of every rate; give {flags}")
    if is_given and not model.qualities:
        raise UsageError(f"{source} is a network of a single rate; leave out {flags}")


def _check_sizes(arguments: dict, sizes: dict) -> None:
    """Check a model's arguments against its weights, before a network of any size is built.

    Args:
        arguments: as the checkpoint has them.
        sizes: those that the shapes of the weights tell.

    Raises:
        ValueError: they differ, or are none.
    """
    if not isinstance(arguments, dict):
        raise ValueError(f"model_args is a {type(arguments).__name__}, expected a dict")
    for name, size in sizes.items():
        value = arguments.get(name, size)
        fits = type(value) is type(size) and value == size
        if name == "max_support_slices" and size == sizes["num_slices"]:
            # The last slice has one slice less to be predicted from than there are.
            fits = type(value) is int and value >= size - 1
        if not fits:
            raise ValueError(
                f"the state dict does not fit model_args: {name} is {value!r:.60} there and "
                f"{size!r:.60} by the shapes of the weights; give a file that train.py saved"
            )


def _check_finite(state_dict: dict[str, Tensor], source: object) -> None:
    """Raises UsageError where a value is not finite."""
    for key, value in state_dict.items():
        if not value.isfinite().all():
            raise UsageError(
                f"{source}: {key} holds values that are not finite; the training that made it "
                "diverged: give an earlier checkpoint"
            )
