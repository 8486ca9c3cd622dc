"""Weights as safetensors: one file, or parts of a limited size and their index.

The index is JSON as other programs write it for safetensors. Its ``weight_map`` says which part
holds which tensor. Its ``metadata`` is that of a single file, with the SHA-256 of each part, so
that the hash of the index alone vouches for all weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UsageError, atomic_write

if TYPE_CHECKING:
    from torch import Tensor

MAX_PART_BYTES = 50_000_000  # hosts of git repositories warn of larger files, or refuse them
MAX_INDEX_BYTES = 2**24  # a hundred times that of the full network
# What a header has for a tensor beside its name, and for all of a part, at the most.
ENTRY_BYTES = 200
HEADER_BYTES = 512
SCALES = "/scales"  # after the name of a tensor in bytes; names of weights have no slash
LEAST_ROW = 64  # values that share a scale of four bytes

_DIGITS = "[0-9]" * 5
PART_PATTERN = f"-{_DIGITS}-of-{_DIGITS}.safetensors"  # as a glob, after the name of the whole


def index_path(path: Path) -> Path:
    """Where the index is if the weights of the file ``path`` are in parts."""
    return Path(f"{path}.index.json")


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def to_bytes(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor in whole numbers of one byte, -127 to 127, and a scale for each of its rows.

    A row is of its last dimensions, of as few as make 64 values; a tensor that has no such rows
    stays as it is. A value is off by at most 1/254 of the largest of its row.
    """
    dims = _row_dims(value)
    if not dims:
        return {name: value}
    scales = value.float().abs().amax(dims, keepdim=True) / 127
    # A row of zeros is divided by anything but zero.
    whole = (value / scales.where(scales > 0, 1)).round().char()
    return {name: whole, name + SCALES: scales}


def _row_dims(value: Tensor) -> list[int]:
    """Dimensions of a row of `to_bytes`; none where a tensor has no rows."""
    for i in range(value.ndim - 1, 0, -1):
        if value.shape[i:].numel() >= LEAST_ROW:
            return [*range(i, value.ndim)]
    return []


def _from_bytes(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `to_bytes` made of tensors, in float32 again.

    Raises:
        KeyError: a tensor lacks its scales.
        ValueError: they are not one for each row.
    """
    import torch

    for name in [name for name, value in state_dict.items() if value.dtype == torch.int8]:
        whole, scales = state_dict[name], state_dict.pop(name + SCALES)
        rows = _row_dims(whole)
        if scales.shape != tuple(1 if i in rows else n for i, n in enumerate(whole.shape)):
            raise ValueError(f"{name} has scales of shape {tuple(scales.shape)}")
        state_dict[name] = whole * scales
    return state_dict


def write_weights(
    state_dict: dict[str, Tensor], metadata: dict, path: Path, max_part_bytes: int
) -> None:
    """Write tensors as one file, or as parts and an index beside it if that would be too large.

    What there was of weights of this name, whole or in parts, is replaced once all is written.

    Args:
        metadata: JSON values.
        path: of the single file.
        max_part_bytes: a tensor that is larger by itself is a part by itself.
    """
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    data = _to_data(state_dict, texts)
    if len(data) <= max_part_bytes:
        # The function of safetensors that writes files makes ones that others cannot read.
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
        written = {path}
    else:
        del data
        written = _write_parts(state_dict, metadata, path, max_part_bytes)
    before = path.parent.glob(f"{escape(path.stem)}{PART_PATTERN}")
    for old in {path, index_path(path), *before} - written:
        old.unlink(missing_ok=True)


def _to_data(state_dict: dict[str, Tensor], texts: dict[str, str]) -> bytes:
    """A safetensors file. safetensors writes metadata in any order, we in one: equal weights have
    equal hashes."""
    from safetensors.torch import save

    data = save(state_dict, texts)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(texts.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return b"".join([len(text).to_bytes(8, "little"), text, data[start:]])


def _write_parts(
    state_dict: dict[str, Tensor], metadata: dict, path: Path, max_part_bytes: int
) -> set[Path]:
    """Returns the files written."""
    parts, size = [{}], HEADER_BYTES
    for key, value in state_dict.items():
        stored = value.nbytes + len(json.dumps(key)) + ENTRY_BYTES
        if parts[-1] and size + stored > max_part_bytes:
            parts.append({})
            size = HEADER_BYTES
        parts[-1][key] = value
        size += stored
    index = index_path(path)
    hashes, weight_map = {}, {}
    # All are written before the first takes its place, and the index takes its own last. A process
    # that dies while they do leaves parts that the index does not vouch for, and loading says so.
    with contextlib.ExitStack() as stack:
        temporary_index = stack.enter_context(atomic_write(index))
        for i, tensors in enumerate(parts, 1):
            part = path.with_name(f"{path.stem}-{i:05}-of-{len(parts):05}.safetensors")
            temporary = stack.enter_context(atomic_write(part))
            temporary.write_bytes(_to_data(tensors, {"part_of": index.name}))
            hashes[part.name] = sha256(temporary)
            weight_map |= dict.fromkeys(tensors, part.name)
        total_size = sum(value.nbytes for value in state_dict.values())
        content = {
            "metadata": {"total_size": total_size, **metadata, "sha256": hashes},
            "weight_map": weight_map,
        }
        temporary_index.write_text(json.dumps(content, indent=1) + "\n")
    return {index, *map(path.with_name, hashes)}


def read_weights(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """What `write_weights` wrote: metadata and tensors, those of fewer bits in float32.

    Args:
        path: of the single file, or of the index.

    Raises:
        UsageError: a part is missing or not the one that was written, or no index names it.
        Exception: of many types, where a file is damaged.
    """
    if path.suffix == ".json":
        metadata, state_dict = _read_parts(path)
        return metadata, _from_bytes(state_dict)
    texts, state_dict = _read_file(path)
    if "part_of" in texts:
        raise UsageError(
            f"{path} is one part of a checkpoint; give the index of all, {texts['part_of']!r:.80}"
        )
    return {**texts, "model_args": json.loads(texts["model_args"])}, _from_bytes(state_dict)


def _read_parts(index: Path) -> tuple[dict, dict[str, Tensor]]:
    metadata, parts = _read_index(index)
    names = {digest: name for name, (digest, _) in parts.items()}
    state_dict = {}
    for name, (digest, keys) in parts.items():
        part = index.with_name(name)
        if not os.path.isfile(part):  # unlike Path.is_file, also of names that no file can have
            raise UsageError(
                f"{index}: part {name!r:.80} is missing; put it beside the index, which takes "
                f"{len(parts)} parts"
            )
        found = sha256(part)
        if found != digest:
            raise UsageError(
                f"{index}: part {name!r:.80} "
                + (
                    f"holds what belongs into {names[found]!r:.80}; give the parts their own names"
                    if found in names
                    else "is damaged, or of another checkpoint; fetch all parts and the index anew"
                )
            )
        _, tensors = _read_file(part)
        if tensors.keys() != keys:
            raise UsageError(
                f"{index}: part {name!r:.80} does not hold the tensors that the index says; give "
                "an index that tools/export.py wrote"
            )
        state_dict |= tensors
    return metadata, state_dict


def _read_index(path: Path) -> tuple[dict, dict[str, tuple[str, set[str]]]]:
    """An index's metadata, and the hash and the tensors of each part by its name."""
    with open(path, "rb") as file:
        content = file.read(MAX_INDEX_BYTES + 1)
    if len(content) > MAX_INDEX_BYTES:
        raise UsageError(
            f"{path} has more than {MAX_INDEX_BYTES} bytes, which no index of weights needs; give "
            "one that tools/export.py wrote"
        )
    index = json.loads(content)
    metadata = index["metadata"]
    parts = {}
    for key, name in index["weight_map"].items():
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise UsageError(
                f"{path}: part {name!r:.80} is no *.safetensors beside the index; give an index "
                "that tools/export.py wrote"
            )
        parts.setdefault(name, (metadata["sha256"][name], set()))[1].add(key)
    return metadata, parts


def _read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    import torch
    from safetensors import safe_open

    state_dict = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118, not a dict
            value = file.get_tensor(key)
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            # A copy, also in its own dtype: a tensor of the file keeps all of the file in memory.
            state_dict[key] = value.to(dtype, copy=True)
        return file.metadata() or {}, state_dict
