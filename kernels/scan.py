"""The public scan and the choice of the backend that runs it."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import scan_operator as ops
from kernels import scan_reference as reference
from kernels.project import project

__all__ = ["BACKEND_VARIABLE", "available_backends", "selective_scan_2d"]

logger = logging.getLogger("mambavc")

BACKEND_VARIABLE = "MAMBAVC_SCAN_BACKEND"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Backend:
    """One way to run the scan.

    ``why_not(device_type)`` is None where it can run, else what is missing and what to do.
    ``run`` takes the arguments of `kernels.scan_reference.scan_2d`, contiguous.
    """

    name: str
    why_not: Callable[[str], str | None]
    run: Callable[..., Tensor]


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _why_not(device_type: str, needed: str, package: str, install: str) -> str | None:
    if device_type != needed:
        return f"it runs on {needed} tensors only, got {device_type}"
    if not _is_installed(package):
        return f"{package} is not installed; run: pip install {install}"
    return None


def _run_mamba_ssm(*args: Tensor) -> Tensor:
    from kernels.scan_mamba_ssm import scan_2d

    return scan_2d(*args)


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("triton", lambda device: _why_not(device, "cuda", "triton", "triton"), ops.scan_2d),
        Backend("cpu", lambda device: _why_not(device, "cpu", "numba", "numba"), ops.scan_2d),
        Backend(
            "mamba_ssm",
            lambda device: _why_not(
                device, "cuda", "mamba_ssm", "--no-build-isolation -r requirements-cuda.txt"
            ),
            _run_mamba_ssm,
        ),
        Backend("reference", lambda device: None, reference.scan_2d),
    )
}


def selective_scan_2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Scan a feature map along four orders of its pixels and sum the results (SS2D).

    The orders are row-major, column-major, and both reversed. In each, with delta's low-rank part
    r, B and C projected from x at every pixel and A = -exp(A_logs) (arXiv:2312.00752, eq. 2;
    arXiv:2401.10166, section 4)::

        delta_t = softplus(dt_projs_weight r_t + dt_projs_bias)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t = C_t . h_t + D x_t

    Args:
        x: (batch, height, width, dim); float32, float64, bfloat16 or float16, any strides.
        x_proj_weight: (4, dt_rank + 2 * dstate, dim), rows in the order r, B, C.
        dt_projs_weight: (4, dim, dt_rank).
        dt_projs_bias: (4, dim).
        A_logs: (4 * dim, dstate).
        Ds: (4 * dim,).
        backend: ``auto``, ``triton``, ``cpu``, ``mamba_ssm`` or ``reference``. The environment
            variable MAMBAVC_SCAN_BACKEND says what ``auto`` stands for; without it the compiled
            backend of x's device, or the reference where that is missing.

    Returns:
        (batch, height, width, dim) in x's dtype. States, delta and sums are float32, for float64
        maps float64; parameters are cast to that. Differentiable once in all tensors.

    Raises:
        ValueError: a shape or dtype is not as above, or there is no backend of that name.
        RuntimeError: the backend asked for cannot run here.

    Example:
        >>> block = layers.SS2D(96)
        >>> selective_scan_2d(torch.rand(1, 8, 8, 192), *block.scan_parameters()).shape
        torch.Size([1, 8, 8, 192])
    """
    _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    run = _choose(backend, x.device.type).run
    # One product for all directions, in image order: it commutes with the orders of the scan.
    x_dbl = project(x, x_proj_weight.flatten(0, 1).to(x.dtype)).to(x.dtype)
    x_dbl = x_dbl.unflatten(-1, x_proj_weight.shape[:2])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    parameters = (dt_projs_weight, dt_projs_bias, A_logs, Ds)
    return run(x.contiguous(), x_dbl.contiguous(), *(p.to(dtype).contiguous() for p in parameters))


def _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"x must be (batch, height, width, dim) and not empty, got {tuple(x.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if dt_projs_weight.ndim != 3 or A_logs.ndim != 2:
        raise ValueError(
            "dt_projs_weight must be (4, dim, dt_rank) and A_logs (4 * dim, dstate), got "
            f"{tuple(dt_projs_weight.shape)} and {tuple(A_logs.shape)}"
        )
    dim, dt_rank, dstate = x.shape[3], dt_projs_weight.shape[2], A_logs.shape[1]
    for name, parameter, shape in (
        ("x_proj_weight", x_proj_weight, (4, dt_rank + 2 * dstate, dim)),
        ("dt_projs_weight", dt_projs_weight, (4, dim, dt_rank)),
        ("dt_projs_bias", dt_projs_bias, (4, dim)),
        ("A_logs", A_logs, (4 * dim, dstate)),
        ("Ds", Ds, (4 * dim,)),
    ):
        if parameter.shape != shape:
            raise ValueError(
                f"{name} must be {shape} for x {tuple(x.shape)}, dt_rank {dt_rank} and dstate "
                f"{dstate}, got {tuple(parameter.shape)}"
            )


def _choose(name: str, device_type: str) -> Backend:
    if name == "auto":
        name = os.environ.get(BACKEND_VARIABLE, "auto")
    if name == "auto":
        return _BACKENDS[_automatic(device_type)]
    if name not in _BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose auto, {', '.join(_BACKENDS)}")
    reason = _BACKENDS[name].why_not(device_type)
    if reason is not None:
        raise RuntimeError(f"scan backend {name!r} cannot run: {reason}")
    return _BACKENDS[name]


@torch.compiler.assume_constant_result
def _automatic(device_type: str) -> str:
    return _first_choice(device_type)


@functools.cache
def _first_choice(device_type: str) -> str:
    """Name of the compiled backend of a device, else ``reference``; logs the choice once."""
    wanted = {"cuda": "triton", "cpu": "cpu"}.get(device_type, "reference")
    reason = _BACKENDS[wanted].why_not(device_type)
    if reason is None:
        logger.info("scan backend for %s tensors: %s", device_type, wanted)
        return wanted
    logger.warning(
        "scan backend for %s tensors: reference, which is slow, because %s cannot run: %s",
        device_type,
        wanted,
        reason,
    )
    return "reference"


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend by name: None where it runs on tensors of this device, else why not."""
    device_type = torch.device(device).type
    return {name: backend.why_not(device_type) for name, backend in _BACKENDS.items()}
