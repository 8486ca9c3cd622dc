"""Training crops and test pictures: read or kept, cut, put into batches."""

import contextlib
import itertools
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import utils
from training.crops import CropKey, CropSampler, crop_indices
from training.distributed import Processes
from utils import DataError, UsageError

logger = logging.getLogger("mambavc")

MAX_GPU_SHARE = 0.25  # of a GPU's free memory, for pictures


class Batch(NamedTuple):
    """A training crop, or several that the loader has put together.

    ``pixels``: uint8 (height, width, 3), of several with a dimension before it. ``names`` of the
    files, and ``problems``: a line for each that could not be read in their place. Without names,
    none could be read.
    """

    pixels: Tensor
    names: list[str]
    problems: list[str]


def as_input(pixels: Tensor) -> Tensor:
    """uint8 (batch, height, width, 3) as float32 (batch, 3, height, width) in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)  # this order is called channels last


class Pictures(Dataset):
    """The pictures of a folder as uint8 arrays (height, width, 3), each read when it is needed.

    Args:
        files: paths of pictures.

    Attributes:
        problems: one line for each file found unreadable so far.

    Raises:
        UsageError: none of the files can be read.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.problems: list[str] = []
        if all(isinstance(_try_read(file), str) for file in self.files):
            raise _none_readable(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray | str:
        """The picture, or one line that says why it cannot be read."""
        return _try_read(self.files[index])


class CachedPictures(Pictures):
    """Pictures that are decoded once, at the start, and kept in one tensor.

    Args:
        files: paths of pictures; unreadable ones are left out.
        threads: that decode them.
        device: keeps them if they take at most `MAX_GPU_SHARE` of a GPU's free memory; else the
            host does.
        show: show how far it is.

    Attributes:
        pixels: uint8 (pixels of all pictures, 3), each picture in reading order.
        sizes: (height, width) of each.
        starts: where each begins.

    Raises:
        UsageError: none of the files can be read.
    """

    def __init__(
        self, files: Sequence[Path], threads: int, device: torch.device | str, show: bool = False
    ):
        begin = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without holding Python's lock
            reads = zip(files, pool.map(_try_read, files), strict=True)
            shown = contextlib.nullcontext(reads)
            if show:
                shown = utils.progress(
                    reads, len(files), "picture", "reading", lambda read: read[0].name
                )
            with shown as tracked:
                decoded = [each for _, each in tracked]
        self.problems = [each for each in decoded if isinstance(each, str)]
        pairs = zip(files, decoded, strict=True)
        self.files = [file for file, each in pairs if not isinstance(each, str)]
        decoded = [each for each in decoded if not isinstance(each, str)]
        if not decoded:
            raise _none_readable(files)
        self.sizes = [each.shape[:2] for each in decoded]
        counts = [height * width for height, width in self.sizes]
        *self.starts, total = itertools.accumulate(counts, initial=0)
        pixels = np.empty((total, 3), np.uint8)
        for start, count in zip(self.starts, counts, strict=True):
            pixels[start : start + count] = decoded.pop(0).reshape(-1, 3)  # and its memory is free
        fits = _fits(pixels.nbytes, torch.device(device))
        self.pixels = torch.from_numpy(pixels).to(device if fits else "cpu")
        logger.info(
            f"decoded {len(self)} pictures of {total / 1e6:.0f} megapixels in "
            f"{time.perf_counter() - begin:.1f} s, kept on {self.pixels.device}"
            + ("" if fits else ": they would take too much of the GPU's free memory")
        )

    def __getitem__(self, index: int) -> np.ndarray:
        """The picture."""
        height, width = self.sizes[index]
        start = self.starts[index]
        return self.pixels[start : start + height * width].view(height, width, 3).cpu().numpy()


def _try_read(file: Path) -> np.ndarray | str:
    """The picture, or one line that says why it cannot be read."""
    try:
        return np.asarray(utils.read_image(file))
    except DataError as error:
        return str(error)


def _none_readable(files: Sequence[Path]) -> UsageError:
    return UsageError(
        f"none of the {len(files)} pictures in {files[0].parent} can be read; "
        f"the first: {_try_read(files[0])}"
    )


def _fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes of pictures leave a device enough memory to train."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size <= MAX_GPU_SHARE * free


@dataclass
class Crops(Dataset):
    """Random crops of pictures, with horizontal flips.

    What an item looks like is a function of the seed and its key alone, never of a worker's random
    state or of where its picture is kept. In place of an unreadable picture the next readable one
    is taken.

    Args:
        pictures: where they come from.
        seed: of the run.
        rotate: also turn them by quarters.
    """

    pictures: Pictures
    seed: int
    rotate: bool = False

    def _place(self, key: CropKey, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, key.epoch, key.index))
        return crop_indices(size, key.patch_size, rng, self.rotate)

    def __getitem__(self, key: CropKey) -> Batch:
        """One crop."""
        problems = []
        for i in range(len(self.pictures)):
            index = (key.index + i) % len(self.pictures)
            pixels = self.pictures[index]
            if not isinstance(pixels, str):
                rows, columns = self._place(key, pixels.shape[:2])
                crop = pixels.reshape(-1, 3).take(rows[:, None] + columns, axis=0)
                return Batch(torch.from_numpy(crop), [self.pictures.files[index].name], problems)
            problems.append(pixels)
        return Batch(torch.empty(0), [], problems)

    def cut(self, keys: Sequence[CropKey]) -> Batch:
        """A batch of crops of one size of `CachedPictures`, cut on the device that keeps them.

        The host tells the device where they lie, in (batch, height + width) numbers, and does not
        wait for it.
        """
        pixels = self.pictures.pixels
        height, width = keys[0].patch_size
        places = torch.empty(
            (len(keys), height + width), dtype=torch.int64, pin_memory=pixels.is_cuda
        )
        for place, key in zip(places.numpy(), keys, strict=True):
            rows, columns = self._place(key, self.pictures.sizes[key.index])
            place[:height] = rows + self.pictures.starts[key.index]
            place[height:] = columns
        places = places.to(pixels.device, non_blocking=True)
        index = places[:, :height, None] + places[:, None, height:]
        crops = pixels.index_select(0, index.flatten()).view(*index.shape, 3)
        return Batch(crops, [self.pictures.files[key.index].name for key in keys], [])


def _collate(crops: Sequence[Batch]) -> Batch:
    for crop in crops:
        if not crop.names:
            return crop
    pixels, names, problems = zip(*crops, strict=True)
    chain = itertools.chain.from_iterable
    return Batch(torch.stack(pixels), list(chain(names)), list(chain(problems)))


def _read(batch: Batch) -> Batch:
    # Raised by a worker, the error would come with a traceback for its text.
    if not batch.names:
        raise DataError(f"no training picture can be read any more; the last: {batch.problems[-1]}")
    return batch


def _start_worker(worker: int) -> None:
    # A signal to the process group is for the main process, which first saves its run. It then has
    # to end its workers (see `_reading`), or it would wait for them forever.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loader(dataset: Dataset, workers: int, **kwargs) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        # The loader draws a seed for each pass; taken from the main random state it would make a
        # resumed run differ.
        generator=torch.Generator(),
        **kwargs,
    )


@contextlib.contextmanager
def _reading(loader: DataLoader) -> Iterator[Iterator]:
    """What a DataLoader yields; its worker processes end with this context."""
    items = iter(loader)
    try:
        yield items
    finally:
        if hasattr(items, "_shutdown_workers"):
            items._shutdown_workers()


@contextlib.contextmanager
def training_batches(
    crops: Crops, sampler: CropSampler, workers: int, pin_memory: bool
) -> Iterator[Iterator[Batch]]:
    """Endless training batches inside this context.

    Those of `CachedPictures` are cut where the pictures are kept, in less time than it takes to
    hand them from one process to another; others are read ahead by worker processes (0: none).
    They end with a DataError where no picture can be read any more.
    """
    if isinstance(crops.pictures, CachedPictures):
        batches = map(crops.cut, sampler)
        if pin_memory and not crops.pictures.pixels.is_cuda:
            batches = (each._replace(pixels=each.pixels.pin_memory()) for each in batches)
        yield batches
        return
    loader = _loader(
        crops, workers, batch_sampler=sampler, collate_fn=_collate, pin_memory=pin_memory
    )
    with _reading(loader) as batches:
        yield map(_read, batches)


def pad_to(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Reflect a picture (h, w, 3) at its edges, as often as it takes, to at least this size.

    The picture stays in the middle; a side of one pixel is repeated.
    """
    rows, columns = max(height - pixels.shape[0], 0), max(width - pixels.shape[1], 0)
    if not rows and not columns:
        return pixels
    margins = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    return np.pad(pixels, margins, mode="reflect")


@dataclass
class WholePictures:
    """Whole pictures in batches of one size.

    Args:
        pictures: where they come from.
        batch_size: pictures of equal size that follow each other are put together up to this.
        workers: processes that read ahead.
        rank, world_size: every ``world_size``-th picture belongs to this process.
        min_side: smaller pictures are padded by reflection.
    """

    pictures: Pictures
    batch_size: int
    workers: int
    rank: int = 0
    world_size: int = 1
    min_side: int = 1

    def __post_init__(self) -> None:
        self.problems: list[str] = []
        self._loader = _loader(
            self.pictures,
            self.workers,
            batch_size=None,
            sampler=range(self.rank, len(self.pictures), self.world_size),
            collate_fn=lambda picture: picture,
        )

    def __iter__(self) -> Iterator[Tensor]:
        """Yield uint8 (batch, height, width, 3); unreadable files go to ``problems``."""
        batch: list[np.ndarray] = []
        self.problems = []
        with _reading(self._loader) as pictures:
            for pixels in pictures:
                if isinstance(pixels, str):
                    self.problems.append(pixels)
                    continue
                pixels = pad_to(pixels, self.min_side, self.min_side)
                if batch and (len(batch) == self.batch_size or batch[0].shape != pixels.shape):
                    yield torch.from_numpy(np.stack(batch))
                    batch = []
                batch.append(pixels)
            if batch:
                yield torch.from_numpy(np.stack(batch))


def open_dataset(root: Path, cache: bool, processes: Processes) -> tuple[Pictures, Pictures]:
    """The pictures in ROOT/train and ROOT/test; with ``cache`` they are decoded now and kept,
    those to train on where this process computes if they fit there.

    Raises:
        UsageError: a folder is missing, or has too few pictures that can be read.
    """
    threads = available_cpus(processes.local_world_size)

    def open_part(name: str, device: torch.device) -> Pictures:
        files = utils.list_images(root / name)
        return (
            CachedPictures(files, threads, device, processes.is_first) if cache else Pictures(files)
        )

    train = open_part("train", processes.device)
    test = open_part("test", torch.device("cpu"))
    for problem in [*train.problems, *test.problems]:
        logger.warning("skipped: %s", problem)
    if len(train) < processes.world_size:
        raise UsageError(
            f"{len(train)} training pictures leave some of {processes.world_size} processes "
            f"empty; add pictures or use --nproc_per_node={len(train)}"
        )
    logger.info("%d training and %d test pictures", len(train), len(test))
    return train, test


def capped_workers(wanted: int, processes: Processes) -> int:
    """Workers to read pictures: as many as wanted, but at most the CPUs of this process."""
    workers = min(wanted, available_cpus(processes.local_world_size))
    if workers < wanted:
        logger.info("%d workers in place of %d: CPUs per process", workers, wanted)
    return workers


def available_cpus(processes: int) -> int:
    """CPUs for each of the processes that share those which this one may run on, at least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return max((len(allowed) if allowed else os.cpu_count() or 1) // processes, 1)
