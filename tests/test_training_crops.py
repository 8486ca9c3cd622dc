"""Which crops a run sees, in which order and size, and where in their pictures they lie."""

import argparse
import itertools
import math

import numpy as np
import pytest

from training.crops import CropSampler, crop_indices, patch_schedule, scheduled_size
from training.data import pad_to


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(40, 50), (16, 24), (5, 50), (3, 9), (1, 1)])
@pytest.mark.parametrize("rotate", [False, True])
def test_crops_are_parts_of_their_picture_in_every_orientation(size, rotate):
    """Of the reflected picture where that is smaller."""
    pixels, patch_size, rng = picture(*size), (16, 24), np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        rows, columns = crop_indices(size, patch_size, rng, rotate)
        assert rows.shape == (16,)
        assert columns.shape == (24,)
        seen.add(pixels.reshape(-1, 3)[rows[:, None] + columns].tobytes())
    possible = {}
    for turn in range(4 if rotate else 1):
        height, width = patch_size[::-1] if turn % 2 else patch_size
        padded = pad_to(pixels, height, width)
        for top in range(padded.shape[0] - height + 1):
            for left in range(padded.shape[1] - width + 1):
                part = padded[top : top + height, left : left + width]
                for flip in (False, True):
                    turned = np.rot90(part[:, ::-1] if flip else part, turn)
                    possible.setdefault(turned.tobytes(), set()).add((turn, flip))
    assert seen <= possible.keys()
    reached = set.union(*(possible[each] for each in seen))
    assert reached == set.union(*possible.values())


def test_a_run_sees_the_crops_it_always_saw():
    """Crops without --rotate are those of earlier versions, or recipes would not reproduce."""
    rng, pixels = np.random.default_rng((3, 1, 2)), picture(40, 50)
    rows, columns = crop_indices((40, 50), (16, 24), rng)
    again = np.random.default_rng((3, 1, 2))
    top, left, flip = again.integers(25), again.integers(27), again.integers(2)
    expected = pixels[top : top + 16, left : left + 24][:, :: -1 if flip else 1]
    assert np.array_equal(pixels.reshape(-1, 3)[rows[:, None] + columns], expected)


def take(batches, **kwargs):
    kwargs = {"num_pictures": 7, "seed": 1, "patch_size": lambda batch: (16, 24), **kwargs}
    return list(itertools.islice(CropSampler(**kwargs), batches))


def test_every_epoch_holds_each_picture_once():
    keys = [key for batch in take(14, batch_size=3) for key in batch]
    assert len(keys) == 42
    for epoch in range(6):
        order = [key.index for key in keys[7 * epoch : 7 * (epoch + 1)]]
        assert sorted(order) == list(range(7))
        assert all(key.epoch == epoch for key in keys[7 * epoch : 7 * (epoch + 1)])
    assert [k.index for k in keys[:7]] != [k.index for k in keys[7:14]]


def test_processes_share_the_batches_of_one():
    alone = take(6, batch_size=4)
    halves = [take(6, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone
    assert take(4, batch_size=4, start=2) == alone[2:]


def test_crops_grow_by_number_of_their_batch():
    def size(batch):
        return (8, 8) if batch < 3 else (16, 16)

    sizes = [{key.patch_size for key in batch} for batch in take(5, batch_size=2, patch_size=size)]
    assert sizes == [{(8, 8)}] * 3 + [{(16, 16)}] * 2
    later = take(3, batch_size=2, patch_size=size, start=2)
    assert [batch[0].patch_size for batch in later] == [(8, 8), (16, 16), (16, 16)]


def test_patch_schedules():
    def sides(text, total_steps):
        schedule = patch_schedule(text)
        return [scheduled_size(schedule, step, total_steps)[0] for step in range(total_steps)]

    assert sides("128", 2) == [128] * 2
    assert sides("128:0.8,256:1.0", 10) == sides("128:0.8,256", 10) == [128] * 8 + [256] * 2
    assert sides("64:0.25,128:0.5,32", 4) == [64, 128, 32, 32]
    assert sides("128:3,256", 10) == [128] * 3 + [256] * 7
    # A run that is made longer goes on with the last size.
    assert scheduled_size(patch_schedule("128:3,256"), 10**9, 10) == (256, 256)
    assert patch_schedule("128:3,256")[-1][1] == math.inf


@pytest.mark.parametrize(
    "text", ["", "x", "128:0.8", "128:0.8,256:0.9", "128:0.8,256:0.7,512", "128:0.5,256:9,512",
             "0:0.5,256", "128:0,256", "128:nan,256", "128:inf,256", "128:-1,256", "128,256"]
)  # fmt: skip
def test_wrong_patch_schedules_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected SIDE:UNTIL.*such as 128:0\.8"):
        patch_schedule(text)
