"""Training crops and test pictures: what a run sees, in which order, and what it survives."""

import itertools

import numpy as np
import pytest
import torch
from conftest import Terminal
from PIL import Image

import utils
from training import data
from training.crops import CropKey, CropSampler
from training.data import CachedPictures, Crops, Pictures, WholePictures, pad_to, training_batches


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


def sampler(num_pictures, size=(16, 24), **kwargs):
    return CropSampler(num_pictures, patch_size=lambda batch: size, seed=0, **kwargs)


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


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("size", [(16, 24), (64, 64), (70, 9)])
def test_kept_pictures_give_the_crops_of_their_files(files, size, rotate, device):
    """Wherever they are kept; also of pictures smaller than a crop."""
    read, kept = Pictures(files), CachedPictures(files, 2, device)
    assert all(np.array_equal(kept[i], read[i]) for i in range(len(files)))
    keys = [CropKey(epoch, index, size) for epoch in range(8) for index in range(len(files))]
    batch = Crops(kept, seed=3, rotate=rotate).cut(keys)
    assert batch.pixels.device.type == device
    crops = Crops(read, seed=3, rotate=rotate)
    expected = torch.stack([crops[key].pixels for key in keys])
    assert torch.equal(batch.pixels.cpu(), expected)
    assert batch.names == [files[key.index].name for key in keys]
    other_seed = Crops(kept, seed=4, rotate=rotate).cut(keys)
    assert not torch.equal(other_seed.pixels, batch.pixels)


def test_pictures_too_large_for_a_device_stay_on_the_host(files, monkeypatch):
    monkeypatch.setattr(data, "_fits", lambda size, device: size < 20_000)
    kept = CachedPictures(files, 2, "meta")
    assert kept.pixels.device.type == "cpu"
    assert CachedPictures(files[4:], 2, "meta").pixels.device.type == "meta"


def test_unreadable_picture_is_named_and_replaced(files):
    files[1].write_bytes(files[1].read_bytes()[:80])
    crops = Crops(Pictures(files), seed=0)
    crop = crops[CropKey(0, 1, (16, 24))]
    assert crop.names == [files[2].name]
    assert len(crop.problems) == 1
    assert str(files[1]) in crop.problems[0]
    cached = CachedPictures(files, 2, "cpu")
    assert files[1] not in cached.files
    assert str(files[1]) in cached.problems[0]


@pytest.mark.parametrize("kind", [Pictures, lambda files: CachedPictures(files, 2, "cpu")])
def test_no_readable_picture_is_a_usage_error(tmp_path, kind):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(utils.UsageError, match=r"none of the 2 pictures .*a\.png"):
        kind(utils.list_images(tmp_path))


def test_cached_pictures_need_their_files_no_more(files):
    expected = [Pictures(files)[i].copy() for i in range(len(files))]
    cached = CachedPictures(files, 2, "cpu")
    for file in files:
        file.unlink()
    assert all(np.array_equal(cached[i], expected[i]) for i in range(len(files)))


@pytest.mark.parametrize("show", [False, True])
def test_names_are_shown_while_pictures_are_cached(files, show):
    with Terminal() as terminal:
        CachedPictures(files, 2, "cpu", show)
    assert all((f"reading, {file.name}:" in terminal.written) == show for file in files)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_follow_the_sampler(files, workers, cache):
    crops = Crops(Pictures(files), seed=0)
    keys_of_batches = sampler(len(files), batch_size=3, start=1)
    random_state = torch.get_rng_state()
    pictures = CachedPictures(files, 2, "cpu") if cache else crops.pictures
    source = Crops(pictures, seed=0)
    with training_batches(source, keys_of_batches, workers, pin_memory=False) as batches:
        for keys, batch in itertools.islice(zip(keys_of_batches, batches, strict=False), 4):
            assert batch.pixels.shape == (3, 16, 24, 3)
            assert batch.pixels.dtype == torch.uint8
            assert torch.equal(batch.pixels, torch.stack([crops[key].pixels for key in keys]))
            assert batch.names == [files[key.index].name for key in keys]
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
