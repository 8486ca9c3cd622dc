"""Training crops and test pictures: what a run sees, in which order, and what it survives."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from training.data import (
    Crops,
    CropSampler,
    Pictures,
    WholePictures,
    pad_to,
    training_batches,
)


def write_pictures(folder, sizes, seed=0):
    """Noise pictures 0.png, 1.png, ... of these (height, width)."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return utils.list_images(folder)


@pytest.fixture
def files(tmp_path):
    return write_pictures(tmp_path / "pictures", [(40, 50), (33, 70), (64, 64), (5, 9), (1, 1)])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 9), (40, 7)])
def test_small_pictures_are_reflected(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    padded = pad_to(pixels, 32, 48)
    assert padded.shape == (max(size[0], 32), 48, 3)
    top, left = (padded.shape[0] - size[0]) // 2, (48 - size[1]) // 2
    assert np.array_equal(padded[top : top + size[0], left : left + size[1]], pixels)
    if size[1] > 1:  # the columns on both sides of the left edge's neighbour mirror each other
        assert np.array_equal(padded[:, left - 1], padded[:, left + 1])
    assert {tuple(p) for p in padded.reshape(-1, 3)} == {tuple(p) for p in pixels.reshape(-1, 3)}


def test_crops_depend_on_seed_and_key_only(files):
    crops = Crops(Pictures(files), (16, 24), seed=3)
    again = Crops(Pictures(files, cache_threads=2), (16, 24), seed=3)
    keys = [(epoch, index) for epoch in range(3) for index in range(len(files))]
    first = {key: crops[key].pixels for key in keys}
    assert all(torch.equal(again[key].pixels, first[key]) for key in reversed(keys))
    assert not torch.equal(first[0, 2], first[1, 2])
    other_seed = Crops(Pictures(files), (16, 24), seed=4)
    assert not torch.equal(first[0, 2], other_seed[0, 2].pixels)


def test_crops_are_parts_of_their_picture_in_both_orientations(files):
    crops = Crops(Pictures(files), (16, 24), seed=0)
    picture = np.asarray(Image.open(files[0]))
    parts = {
        picture[top : top + 16, left : left + 24][:, ::step].tobytes(): step
        for top, left in itertools.product(range(25), range(27))
        for step in (1, -1)
    }
    seen = {parts[crops[epoch, 0].pixels.numpy().tobytes()] for epoch in range(20)}
    assert seen == {1, -1}


def test_every_epoch_holds_each_picture_once():
    batches = itertools.islice(CropSampler(num_pictures=7, batch_size=3, seed=0), 14)
    keys = [key for batch in batches for key in batch]
    assert len(keys) == 42
    for epoch in range(6):
        order = [index for _, index in keys[7 * epoch : 7 * (epoch + 1)]]
        assert sorted(order) == list(range(7))
        assert all(key[0] == epoch for key in keys[7 * epoch : 7 * (epoch + 1)])
    assert keys[:7] != [(0, index) for _, index in keys[7:14]]


def test_processes_share_the_batches_of_one():
    def take(**kwargs):
        return list(itertools.islice(CropSampler(num_pictures=7, seed=1, **kwargs), 6))

    alone = take(batch_size=4)
    halves = [take(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone
    assert take(batch_size=4, start=2)[:4] == alone[2:]


def test_unreadable_picture_is_named_and_replaced(files):
    files[1].write_bytes(files[1].read_bytes()[:80])
    crops = Crops(Pictures(files), (16, 24), seed=0)
    crop = crops[0, 1]
    assert crop.names == [files[2].name]
    assert len(crop.problems) == 1
    assert str(files[1]) in crop.problems[0]
    cached = Pictures(files, cache_threads=2)
    assert files[1] not in cached.files
    assert str(files[1]) in cached.problems[0]


@pytest.mark.parametrize("cache_threads", [0, 2])
def test_no_readable_picture_is_a_usage_error(tmp_path, cache_threads):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(utils.UsageError, match=r"none of the 2 pictures .*a\.png"):
        Pictures(utils.list_images(tmp_path), cache_threads)


def test_cached_pictures_need_their_files_no_more(files):
    expected = [Pictures(files)[i].copy() for i in range(len(files))]
    cached = Pictures(files, cache_threads=2)
    for file in files:
        file.unlink()
    assert all(np.array_equal(cached[i], expected[i]) for i in range(len(files)))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_follow_the_sampler(files, workers):
    crops = Crops(Pictures(files), (16, 24), seed=0)
    sampler = CropSampler(len(files), batch_size=3, seed=0, start=1)
    random_state = torch.get_rng_state()
    with training_batches(crops, sampler, workers, pin_memory=False) as batches:
        for keys, batch in itertools.islice(zip(sampler, batches, strict=False), 4):
            assert batch.pixels.shape == (3, 16, 24, 3)
            assert batch.pixels.dtype == torch.uint8
            assert torch.equal(batch.pixels, torch.stack([crops[key].pixels for key in keys]))
            assert batch.names == [files[index].name for _, index in keys]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_test_pictures_are_whole_and_grouped_by_size(tmp_path):
    sizes = [(20, 30), (20, 30), (20, 30), (30, 20), (20, 30)]
    files = write_pictures(tmp_path / "pictures", sizes)
    files[4].write_bytes(b"no picture")
    test_pictures = WholePictures(Pictures(files), batch_size=2, workers=0)
    batches = list(test_pictures)
    assert [tuple(b.shape) for b in batches] == [(2, 20, 30, 3), (1, 20, 30, 3), (1, 30, 20, 3)]
    assert len(test_pictures.problems) == 1
    assert str(files[4]) in test_pictures.problems[0]
    assert np.array_equal(batches[0][1].numpy(), np.asarray(Image.open(files[1])))


def test_test_pictures_are_shared_by_processes_and_padded(files):
    shares = [
        list(WholePictures(Pictures(files), 1, workers=0, rank=r, world_size=7, min_side=35))
        for r in range(7)
    ]
    assert [len(share) for share in shares] == [1, 1, 1, 1, 1, 0, 0]
    assert [tuple(share[0].shape[1:3]) for share in shares[:5]] == [
        (40, 50),
        (35, 70),
        (64, 64),
        (35, 35),
        (35, 35),
    ]
