"""Memory that coding takes: a picture that does not fit is refused before anything is allocated,
because on Linux a process that asks for too much is killed without a word; and what was freed is
used again.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import TYPE_CHECKING

from utils import DataError

if TYPE_CHECKING:
    from .base import SliceHyperprior

# Most that encoding and decoding took on a CPU for each pixel and unit of N, measured at 512x768
# for N = 128 (MambaVC also for 64): the transforms' maps, whose widths are multiples of N.
BYTES_PER_PIXEL_AND_N = {"MambaVC": 22, "SwinVC": 29, "ConvVC": 10}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep the large blocks of memory that it frees, for its next ones.

    glibc gives them back to the system, which then has to find and clear their pages anew for the
    next map of a network: a fifth of the time that coding takes on a CPU. With another C library,
    and for blocks of 32 MB and more with glibc before 2.35, nothing changes.
    """
    if library := _glibc():
        library.mallopt(M_MMAP_THRESHOLD, 2**30)
        library.mallopt(M_TRIM_THRESHOLD, -1)  # never


def give_back_memory() -> None:
    """Give the system back what was kept by `keep_freed_memory`."""
    if library := _glibc():
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def check_memory(model: SliceHyperprior, height: int, width: int) -> None:
    """Check that a picture of this size can be coded in the CPU's free memory.

    Pictures on a GPU are let through: PyTorch says by itself when its memory is full.

    Raises:
        DataError: it cannot.
    """
    if model.entropy_bottleneck.quantiles.device.type != "cpu":
        return
    # A network of the user's own is taken for the one of ours that takes most.
    most = max(BYTES_PER_PIXEL_AND_N.values())
    factor = BYTES_PER_PIXEL_AND_N.get(type(model).__name__, most)
    needed = factor * model.config["N"] * height * width
    free = free_memory()
    if needed > free:
        give_back_memory()
        free = free_memory()
    if needed > free:
        raise DataError(
            f"a picture of {width}x{height} pixels takes {needed / 2**30:.1f} GiB of memory with "
            f"this network, and {free / 2**30:.1f} GiB are free; give a smaller picture"
        )


def free_memory() -> float:
    """Bytes of memory and swap that this process can still get, as far as Linux says so."""
    return min(_free_in_machine(), _free_in_group())


def _free_in_machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return 1024 * (kib["MemAvailable"] + kib["SwapFree"])


def _free_in_group() -> float:
    """What the control group (version 2) leaves, a container's for instance."""
    try:
        (own,) = (
            line.removeprefix("0::/")
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
        group = Path("/sys/fs/cgroup", own)
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Files that were read stay in memory only until another use is found for it.
        return int(limit) - int(used) + int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # there is no such group, or its limit is "max"
        return math.inf
