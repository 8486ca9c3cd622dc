"""Which code runs: every operator of this folder asks here, and nothing else decides.

The scan has the backends of `_BACKENDS`. `triton` and `cpu` are one PyTorch operator
(`scan_operator`) with a kernel for each device: the name of one asks for its device and for what
the kernel needs. The stages around the scan run Triton kernels or their formula in PyTorch.
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("mambavc")

_VARIABLE = "MAMBAVC_SCAN_BACKEND"
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_wanted: str | None = None  # what `use_backend` has set


class _Backend(NamedTuple):
    """What a way to run the scan needs; None: nothing."""

    device_type: str | None = None
    package: str | None = None
    install: str | None = None  # arguments of `pip install` that bring the package


_BACKENDS = {
    "triton": _Backend("cuda", "triton", "triton"),
    "cpu": _Backend("cpu", "numba", "numba"),
    "mamba_ssm": _Backend("cuda", "mamba_ssm", "--no-build-isolation -r requirements-cuda.txt"),
    "reference": _Backend(),
}


# Looked up here and not when asked for, so that a compiler sees a constant.
_INSTALLED = {None} | {
    backend.package
    for backend in _BACKENDS.values()
    if backend.package and importlib.util.find_spec(backend.package)
}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let ``auto`` stand for this scan backend, in all threads of the process, until the end.

    It goes before the environment variable, and calls may be nested. ``reference`` turns the
    kernels of the stages around the scan off too; ``auto`` is the choice by device.

    Raises:
        ValueError: if there is no backend of that name.
    """
    global _wanted
    _check_name(name)
    before, _wanted = _wanted, name
    try:
        yield
    finally:
        _wanted = before


def choose_scan(name: str, device_type: str) -> str:
    """The scan backend that a name, or ``auto``, means for tensors of a device.

    Raises:
        ValueError: if there is no backend of that name.
        RuntimeError: if the backend asked for, here or as the meaning of ``auto``, cannot run.
    """
    _check_name(name)
    if name == "auto":
        name = _meaning_of_auto()
    if name == "auto":
        return _automatic(device_type)
    reason = _why_not(name, device_type)
    if reason is not None:
        raise RuntimeError(f"scan backend {name!r} cannot run: {reason}")
    return name


def runs_stage_kernels(device_type: str) -> bool:
    """Whether the stages around the scan run their Triton kernels on tensors of a device."""
    return _meaning_of_auto() != "reference" and _why_not("triton", device_type) is None


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with a map: its own, or autocast's for a float32 map."""
    device_type = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def fused_precision(x: Tensor) -> torch.dtype | None:
    """The dtype in which layers run their fused kernels for a map; None where PyTorch runs its own.

    That is half precision, the map's own or autocast's; float32 where its products may be TF32
    (`product_precision`); float64 where no gradients are recorded. What PyTorch is to compute to
    the last bit as it always has is left to it: float32 with PyTorch's default settings.
    """
    dtype = working_dtype(x)
    if dtype == torch.float32:
        # A compiler, which cannot trace the question, joins PyTorch's small kernels by itself.
        compiles = torch.compiler.is_compiling()
        fuses = not compiles and product_precision(dtype) == "tf32"
    elif dtype == torch.float64:
        fuses = not torch.is_grad_enabled()
    else:
        fuses = dtype in (torch.bfloat16, torch.float16)
    return dtype if fuses and runs_stage_kernels(x.device.type) else None


def product_precision(dtype: torch.dtype) -> str:
    """How a GPU may multiply factors of a dtype, as Triton calls it: ``tf32`` or ``ieee``.

    TF32 keeps 10 bits of the fraction of factors in float32. PyTorch has to be allowed it in matrix
    products (`torch.set_float32_matmul_precision`), and in convolutions, where it is by default.
    """
    if dtype != torch.float32:
        return "ieee"
    # The older names of these settings raise where one has been set by its new name.
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    return "tf32" if matmul.fp32_precision == conv.fp32_precision == "tf32" else "ieee"


def runs_onednn(x: Tensor) -> bool:
    """Whether the products with a map go to oneDNN, as convolutions with kernels of 1x1."""
    return _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every scan backend by name: None where it runs on tensors of this device, else why not."""
    device_type = torch.device(device).type
    return {name: _why_not(name, device_type) for name in _BACKENDS}


def check_dtype(name: str, x: Tensor) -> None:
    """Raise ValueError if no operator of this folder takes a map of x's dtype."""
    if x.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"{name} must be one of {known}, got {x.dtype}; cast it")


def _check_name(name: str, source: str = "") -> None:
    if name != "auto" and name not in _BACKENDS:
        known = ", ".join(_BACKENDS)
        raise ValueError(f"{source}unknown scan backend {name!r}; choose auto, {known}")


def _meaning_of_auto() -> str:
    if _wanted:
        return _wanted
    name = os.environ.get(_VARIABLE, "auto")
    _check_name(name, f"{_VARIABLE}: ")
    return name


def _why_not(name: str, device_type: str) -> str | None:
    """None if a backend runs on tensors of a device, else what is missing and what to do."""
    needed, package, install = _BACKENDS[name]
    if needed not in (None, device_type):
        return f"it runs on {needed} tensors only, got {device_type}"
    if package not in _INSTALLED:
        return f"{package} is not installed; run: pip install {install}"
    return None


def _automatic(device_type: str) -> str:
    """Name of the compiled backend of a device, else ``reference``."""
    wanted = {"cuda": "triton", "cpu": "cpu"}.get(device_type, "reference")
    reason = _why_not(wanted, device_type)
    if not torch.compiler.is_compiling():  # which could not trace a log
        _log_choice(device_type, wanted, reason)
    return wanted if reason is None else "reference"


@functools.cache
def _log_choice(device_type: str, wanted: str, reason: str | None) -> None:
    """Say once which backend ``auto`` stands for."""
    if reason is None:
        logger.info("scan backend for %s tensors: %s", device_type, wanted)
    else:
        message = "scan backend for %s tensors: reference, which is slow, because %s cannot run: %s"
        logger.warning(message, device_type, wanted, reason)
