"""Which crops a run sees, in which order and size, and where in their pictures they lie."""

import argparse
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

Schedule = Sequence[tuple[tuple[int, int], float]]  # of sizes (height, width), and their ends


def patch_schedule(text: str) -> Schedule:
    """argparse type: ``SIDE:UNTIL,...,SIDE`` as pairs of a size and where it ends, in order.

    An end is a fraction of the run below 1, or else a step; that of the last size is infinite.
    """
    with contextlib.suppress(ValueError):
        parts = [entry.partition(":") for entry in text.split(",")]
        sides = [int(side) for side, _, _ in parts]
        ends = [float(end) for _, _, end in parts[:-1]]
        rise = all(a < b for a, b in itertools.pairwise([0, *ends]))
        of_one_kind = all(end < 1 for end in ends) or all(1 < end < math.inf for end in ends)
        if min(sides) > 0 and rise and of_one_kind and parts[-1][2] in ("", "1", "1.0"):
            return [((s, s), end) for s, end in zip(sides, [*ends, math.inf], strict=True)]
    raise argparse.ArgumentTypeError(
        "expected SIDE:UNTIL,...,SIDE, where UNTIL is a fraction of the run or a step, such as "
        f"128:0.8,256 or 128:8000,256; got {text!r}"
    )


def scheduled_size(schedule: Schedule, step: int, total_steps: int) -> tuple[int, int]:
    """Size of the crops of a step, from 0, of a run of this length."""
    ends = ((size, end * total_steps if end < 1 else end) for size, end in schedule)
    return next(size for size, end in ends if step < end)


class CropKey(NamedTuple):
    """What a crop is made of, together with the run's seed."""

    epoch: int
    index: int  # of its picture
    patch_size: tuple[int, int]  # height, width


@dataclass
class CropSampler(Sampler[list[CropKey]]):
    """Endless batches of keys for `Crops`, from any point of a run on.

    The pictures form one stream: each epoch is a permutation of all of them, and epochs follow
    each other without a gap, so every batch is full. A global batch is a run of the stream and
    process ``rank`` gets the part of it at its place: the processes together see what a single
    one with ``world_size`` times the batch size sees, in the same order.

    Args:
        num_pictures: size of the training set.
        batch_size: of one process.
        patch_size: (height, width) of the crops of a global batch, by its number.
        seed: of the run.
        start: global batches already taken.
        rank, world_size: this process among all.
    """

    num_pictures: int
    batch_size: int
    patch_size: Callable[[int], tuple[int, int]]
    seed: int
    start: int = 0
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[CropKey]]:
        @functools.lru_cache(maxsize=2)
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng((self.seed, epoch)).permutation(self.num_pictures)

        for batch in itertools.count(self.start):
            first = (batch * self.world_size + self.rank) * self.batch_size
            places = (divmod(first + i, self.num_pictures) for i in range(self.batch_size))
            patch_size = self.patch_size(batch)
            yield [
                CropKey(epoch, int(permutation(epoch)[offset]), patch_size)
                for epoch, offset in places
            ]


def crop_indices(
    size: tuple[int, int],
    patch_size: tuple[int, int],
    rng: np.random.Generator,
    rotate: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Place a crop at random in a picture, and turn it over from left to right or not.

    A picture that is smaller than the crop is reflected at its edges, as by `pad_to`.

    Args:
        size: (height, width) of the picture.
        patch_size: (height, width) of the crop.
        rng: draws the place and the orientation.
        rotate: also turn the crop by none to three quarters.

    Returns:
        rows (height,) and columns (width,), int64: pixel (i, j) of the crop is pixel
        ``rows[i] + columns[j]`` of the picture in reading order. Every flip and every turn leaves
        a crop of this form.
    """
    turns = rng.integers(4) if rotate else 0
    # The part of the picture that is to be turned.
    height, width = patch_size[::-1] if turns % 2 else patch_size
    top = rng.integers(max(size[0] - height, 0) + 1)
    left = rng.integers(max(size[1] - width, 0) + 1)
    rows = _coordinates(top, height, size[0]) * size[1]
    columns = _coordinates(left, width, size[1])
    if rng.integers(2):
        columns = columns[::-1]
    for _ in range(turns):  # anticlockwise: the last column becomes the first row
        rows, columns = columns[::-1], rows
    return rows, columns


def _coordinates(first: int, count: int, length: int) -> np.ndarray:
    """``count`` places from ``first`` on of a line, which is reflected where it is too short."""
    if count <= length:
        return np.arange(first, first + count)
    places = np.arange(count) - (count - length) // 2
    period = max(2 * (length - 1), 1)
    places %= period
    return np.minimum(places, period - places)
