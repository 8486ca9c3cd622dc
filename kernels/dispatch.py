"""The public scan and the choice of the backend that runs it."""

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("mambavc")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _missing(package: str, install: str) -> str | None:
    return None if _is_installed(package) else f"{package} is not installed; {install}"


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _why_not_reference(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _run_reference(*args: Tensor) -> Tensor:
    from kernels.reference import scan_2d

    return scan_2d(*args)


@dataclass(frozen=True)
class Backend:
    """One way to run the scan.

    `why_not(device, dtype)` is None where it can run, else what is missing and what to do.
    `run` takes the arguments of `kernels.reference.scan_2d`.
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype], str | None]
    run: Callable[..., Tensor]


_BACKENDS = {
    backend.name: backend
    for backend in (Backend("reference", _why_not_reference, _run_reference),)
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
    """Scan a feature map along four orders of its pixels and sum the results."""
    dt_rank = dt_projs_weight.shape[2]
    dstate = A_logs.shape[1]
    x_dbl = F.linear(x, x_proj_weight.flatten(0, 1).to(x.dtype)).to(x.dtype)
    x_dbl = x_dbl.unflatten(-1, (4, dt_rank + 2 * dstate))
    return _BACKENDS["reference"].run(x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend by name, with None where it runs on `device`, else the reason why not."""
    device = torch.device(device)
    return {name: backend.why_not(device, torch.float32) for name, backend in _BACKENDS.items()}
