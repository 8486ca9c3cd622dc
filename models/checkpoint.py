"""Checkpoints: files of weights, found by path or by name, and the networks they hold.

PyTorch is imported where a checkpoint is read, not where one is found: a misspelt name is told at
once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UsageError, atomic_write

if TYPE_CHECKING:
    import torch

    from .base import SliceHyperprior

CHECKPOINT_FOLDER = Path(__file__).parent.parent / "checkpoints"


def find_checkpoint(name: Path | str) -> Path:
    """The file of that path, or the checkpoint of that name that comes with the project.

    Raises:
        UsageError: there is neither.
    """
    shipped = CHECKPOINT_FOLDER / f"{name}.safetensors"
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    names = ", ".join(sorted(p.stem for p in CHECKPOINT_FOLDER.glob("*.safetensors")))
    raise UsageError(
        f"checkpoint {name} does not exist; give a file that train.py saved"
        + (f", or one of the names {names}" if names else "")
    )


def load_checkpoint(name: Path | str) -> dict:
    """Read a checkpoint onto the CPU, without running any code it may hold.

    Args:
        name: see `find_checkpoint`; what train.py, export.py or the published code saved.

    Raises:
        UsageError: there is no such file, or it is not a checkpoint.
    """
    import torch

    path = find_checkpoint(name)
    try:
        if path.suffix == ".safetensors":
            return _load_weights(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types for damaged files
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"cannot load {path} as a checkpoint: {type(error).__name__}: {reason}"
        ) from None
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path} holds a {type(checkpoint).__name__}, expected a checkpoint dict")
    return checkpoint


def _load_weights(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    state_dict = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    model_args = json.loads(metadata["model_args"])
    return {"model": metadata["model"], "model_args": model_args, "state_dict": state_dict}


def save_weights(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint's weights, tables and configuration as a safetensors file.

    Weights are rounded to half precision. The entropy models, which are small, are kept as they
    are: their tables were built from them.
    """
    from safetensors.torch import save_file

    exact = ("entropy_bottleneck.", "gaussian_conditional.")
    state_dict = {
        key: value.half() if value.is_floating_point() and not key.startswith(exact) else value
        for key, value in checkpoint["state_dict"].items()
    }
    metadata = {
        "model": checkpoint["model"],
        "model_args": json.dumps(checkpoint["model_args"]),
    }
    with atomic_write(path) as temporary:
        save_file({k: v.contiguous() for k, v in state_dict.items()}, temporary, metadata)


def build_from_checkpoint(checkpoint: dict, source: object) -> SliceHyperprior:
    """The model of a checkpoint of ours (name and arguments inside) or of the published code.

    Its CDF tables are built if the checkpoint has none. The model is in eval mode on the CPU.

    Raises:
        UsageError: the weights do not fit a model we know.
    """
    from ._registry import build_model
    from .mambavc import MambaVC

    try:
        if "model_args" in checkpoint:
            model = build_model(checkpoint["model"], **checkpoint["model_args"])
            model.load_state_dict(checkpoint["state_dict"])
        else:
            model = MambaVC.from_state_dict(checkpoint)
    except KeyError as error:
        raise UsageError(f"{source} lacks {error}; give a file that train.py saved") from None
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{source}: {error}") from None
    model.eval()
    if model.gaussian_conditional.quantized_cdf.numel() == 0:
        model.update(force=True)
    return model


def load_model(path: Path | str, device: torch.device | str = "cpu") -> SliceHyperprior:
    """`build_from_checkpoint` for a file.

    Raises:
        UsageError: see there and `load_checkpoint`.
    """
    return build_from_checkpoint(load_checkpoint(path), path).to(device)
