"""Memory that coding takes: a picture is coded in tiles that fit, and one that does not fit is
refused before anything is allocated, because on Linux a process that asks for too much is killed
without a word; and what was freed is used again.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import TYPE_CHECKING

from utils import DataError

from .container import MARGIN_UNIT, TILE_UNIT, TiledStream
from .grid import windows

if TYPE_CHECKING:
    import torch

    from .base import SliceHyperprior

# Pictures of more pixels are coded in tiles, however much memory there is: what is written then
# depends on the machine only where it has little, and any machine can decode it.
MAX_WHOLE_PIXELS = 2**22
DEFAULT_TILE = 512
DEFAULT_MARGIN = 32
SAFE_SHARE = 0.8  # of the free memory, that tiles may take; others go on using the machine

# Of a picture of 8 bits while it is read: Pillow's 4 for itself, a copy, and what a conversion of
# its colours needs. Once it is read, 4 are left.
READING_BYTES = 16
PICTURE_BYTES = 4

# Most that encoding and decoding took on a CPU for each pixel and unit of N, measured at 512x768
# for N = 128 (MambaVC also for 64): the transforms' maps, whose widths are multiples of N.
BYTES_PER_PIXEL_AND_N = {"MambaVC": 22, "SwinVC": 29, "ConvVC": 10}
# Beyond that, whatever the picture: compiled code, libraries' work space, memory in pieces.
FIXED_BYTES = 2**28

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
    needed = _network_bytes(model, height * width)
    free = free_memory()
    if needed > free:
        give_back_memory()
        free = free_memory()
    if needed > free:
        raise DataError(
            f"a picture of {width}x{height} pixels takes {needed / 2**30:.1f} GiB of memory with "
            f"this network, and {free / 2**30:.1f} GiB are free; give a smaller picture"
        )


def _network_bytes(model: SliceHyperprior, pixels: int) -> int:
    # A network of the user's own is taken for the one of ours that takes most.
    most = max(BYTES_PER_PIXEL_AND_N.values())
    factor = BYTES_PER_PIXEL_AND_N.get(type(model).__name__, most)
    return factor * model.config["N"] * pixels


def choose_tile(
    model: SliceHyperprior, height: int, width: int, limit: int | None, jobs: int
) -> int | None:
    """Longest side of the tiles that a picture is to be coded in; None to code it whole.

    Args:
        limit: bytes that the process, or on a GPU its part of that, may take; by default a safe
            share of what is free.
        jobs: tiles that are coded at the same time.

    Raises:
        DataError: it does not fit in any tiles.
    """
    available = available_memory(model, limit)
    if height * width <= MAX_WHOLE_PIXELS:
        if limit is None:
            check_memory(model, height, width)
            return None
        if FIXED_BYTES + _network_bytes(model, height * width) <= available:
            return None
    for tile in range(DEFAULT_TILE, 0, -TILE_UNIT):
        if tiles_bytes(model, height, width, tile, DEFAULT_MARGIN, jobs) <= available:
            return tile
    check_tiles(model, height, width, TILE_UNIT, DEFAULT_MARGIN, limit, jobs)
    return TILE_UNIT


def check_tiles(
    model: SliceHyperprior,
    height: int,
    width: int,
    tile: int,
    margin: int,
    limit: int | None,
    jobs: int,
) -> None:
    """Check that a picture can be coded in these tiles; arguments as of `choose_tile`.

    Args:
        tile, margin: as of `TiledStream`.

    Raises:
        DataError: it cannot.
    """
    needed = tiles_bytes(model, height, width, tile, margin, jobs)
    available = available_memory(model, limit)
    if needed > available:
        cause = "is free" if limit is None else "is left of --max-memory"
        raise DataError(
            f"a picture of {width}x{height} pixels takes {needed / 2**30:.2f} GiB of memory with "
            f"this network in tiles of {tile or 'any size'}, and {max(available, 0) / 2**30:.2f} "
            f"GiB {cause}; give fewer --jobs, or more memory"
        )


def tiles_bytes(
    model: SliceHyperprior, height: int, width: int, tile: int, margin: int, jobs: int
) -> int:
    """Most that coding a picture in tiles takes, beyond the network itself.

    On a CPU the picture counts: as it is read, then beside the windows of the network. With it the
    decoder holds the latents of three rows of tiles.
    """
    stream = TiledStream(b"", True, height, width, None, tile, margin)
    window = 1  # pixels
    for parts in (stream.rows, stream.columns):
        ((start, stop), *_) = windows(parts, margin, MARGIN_UNIT, parts[-1][1])
        window *= stop - start
    tile_height = max(stop - start for start, stop in stream.rows)
    across = stream.columns[-1][1]
    latents = 4 * model.config["M"] * 3 * tile_height * across // 256
    work = jobs * _network_bytes(model, window) + latents + FIXED_BYTES
    if model.entropy_bottleneck.quantiles.device.type != "cpu":
        return work
    pixels = height * width
    return max(READING_BYTES * pixels, PICTURE_BYTES * pixels + work)


def available_memory(model: SliceHyperprior, limit: int | None) -> float:
    """Bytes that coding may take from now on, on the device of the network."""
    device = model.entropy_bottleneck.quantiles.device
    if device.type == "cpu":
        free, held = free_memory(), resident_memory()
    else:
        import torch

        free, held = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
    return SAFE_SHARE * free if limit is None else min(limit - held, free)


def limit_device(device: torch.device, limit: int | None) -> None:
    """Let PyTorch refuse to take more than so many bytes of the current GPU's memory."""
    if device.type == "cuda" and limit is not None:
        import torch

        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))


def resident_memory() -> int:
    """Bytes that this process holds in memory, as far as Linux says so."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    (resident,) = (line.split()[1] for line in lines if line.startswith("VmRSS"))
    return 1024 * int(resident)


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
