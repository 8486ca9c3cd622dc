"""Training crops and test pictures: read, crop, flip, shard, resume, cache."""

import contextlib
import functools
import itertools
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import utils
from training.distributed import Processes
from utils import DataError, UsageError

logger = logging.getLogger("mambavc")


class Batch(NamedTuple):
    """A training crop, or several that the loader has put together.

    ``pixels``: uint8 (height, width, 3), of several with a dimension before it. ``names`` of the
    files, and ``problems``: a line for each that could not be read in their place.
    """

    pixels: Tensor
    names: list[str]
    problems: list[str]


def pad_to(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Reflect a picture (h, w, 3) at its edges, as often as it takes, to at least this size.

    The picture stays in the middle; a side of one pixel is repeated.
    """
    rows, columns = max(height - pixels.shape[0], 0), max(width - pixels.shape[1], 0)
    if not rows and not columns:
        return pixels
    margins = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    return np.pad(pixels, margins, mode="reflect")


class Pictures(Dataset):
    """The pictures of a folder as uint8 arrays (height, width, 3).

    Args:
        files: paths of pictures.
        cache_threads: decode everything now, with this many threads, and keep it; worker
            processes forked from this one read the same memory. 0 reads a file when it is needed.

    Attributes:
        problems: one line for each file found unreadable so far.

    Raises:
        UsageError: none of the files can be read.
    """

    def __init__(self, files: Sequence[Path], cache_threads: int = 0):
        self.files = list(files)
        self.problems: list[str] = []
        self._cache: list[np.ndarray] = []
        if cache_threads:
            with ThreadPoolExecutor(cache_threads) as pool:
                decoded = list(pool.map(self._try_read, self.files))
            self.problems = [each for each in decoded if isinstance(each, str)]
            self._cache = [each for each in decoded if not isinstance(each, str)]
            pairs = zip(self.files, decoded, strict=True)
            self.files = [file for file, each in pairs if not isinstance(each, str)]
        if not self._cache and all(isinstance(self._try_read(f), str) for f in self.files):
            raise UsageError(
                f"none of the {len(files)} pictures in {files[0].parent} can be read; "
                f"the first: {self._try_read(files[0])}"
            )

    @staticmethod
    def _try_read(file: Path) -> "np.ndarray | str":
        """The picture, or one line that says why it cannot be read."""
        try:
            return np.asarray(utils.read_image(file))
        except DataError as error:
            return str(error)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> "np.ndarray | str":
        """The picture, or one line that says why it cannot be read."""
        return self._cache[index] if self._cache else self._try_read(self.files[index])


class Crops(Dataset):
    """Random crops and horizontal flips of pictures.

    What an item looks like is a function of the seed and its key (epoch, index) alone, never of
    a worker's random state. In place of an unreadable picture the next readable one is taken.

    Args:
        pictures: where they come from.
        patch_size: (height, width) of a crop.
        seed: of the run.
    """

    def __init__(self, pictures: Pictures, patch_size: tuple[int, int], seed: int):
        self.pictures = pictures
        self.patch_size = patch_size
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, first = key
        problems = []
        for i in range(len(self.pictures)):
            index = (first + i) % len(self.pictures)
            pixels = self.pictures[index]
            if not isinstance(pixels, str):
                crop = self._crop(pixels, np.random.default_rng((self.seed, epoch, first)))
                return Batch(crop, [self.pictures.files[index].name], problems)
            problems.append(pixels)
        raise DataError(f"no training picture can be read any more; the last: {problems[-1]}")

    def _crop(self, pixels: np.ndarray, rng: np.random.Generator) -> Tensor:
        height, width = self.patch_size
        pixels = pad_to(pixels, height, width)
        top = rng.integers(pixels.shape[0] - height + 1)
        left = rng.integers(pixels.shape[1] - width + 1)
        crop = pixels[top : top + height, left : left + width]
        if rng.integers(2):
            crop = crop[:, ::-1]
        return torch.from_numpy(crop.copy())


@dataclass
class CropSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of keys (epoch, index) for `Crops`, from any point of a run on.

    The pictures form one stream: each epoch is a permutation of all of them, and epochs follow
    each other without a gap, so every batch is full. A global batch is a run of the stream and
    process ``rank`` gets the part of it at its place: the processes together see what a single
    one with ``world_size`` times the batch size sees, in the same order.

    Args:
        num_pictures: size of the training set.
        batch_size: of one process.
        seed: of the run.
        start: global batches already taken.
        rank, world_size: this process among all.
    """

    num_pictures: int
    batch_size: int
    seed: int
    start: int = 0
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @functools.lru_cache(maxsize=2)
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng((self.seed, epoch)).permutation(self.num_pictures)

        for batch in itertools.count(self.start):
            first = (batch * self.world_size + self.rank) * self.batch_size
            places = (divmod(first + i, self.num_pictures) for i in range(self.batch_size))
            yield [(epoch, int(permutation(epoch)[offset])) for epoch, offset in places]


def _collate(crops: Sequence[Batch]) -> Batch:
    pixels, names, problems = zip(*crops, strict=True)
    chain = itertools.chain.from_iterable
    return Batch(torch.stack(pixels), list(chain(names)), list(chain(problems)))


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


def training_batches(
    crops: Crops, sampler: CropSampler, workers: int, pin_memory: bool
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """Endless training batches, read ahead by worker processes (0: none) inside this context."""
    loader = _loader(
        crops, workers, batch_sampler=sampler, collate_fn=_collate, pin_memory=pin_memory
    )
    return _reading(loader)


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
    """The pictures in ROOT/train and ROOT/test; with ``cache`` they are decoded now and kept.

    Raises:
        UsageError: a folder is missing, or has too few pictures that can be read.
    """
    threads = available_cpus(processes.local_world_size) if cache else 0
    train, test = (Pictures(utils.list_images(root / part), threads) for part in ("train", "test"))
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
