"""What tiles cost: pictures of a folder, and large ones made of them, in tiles and whole."""

import json

import numpy as np
import pytest
from conftest import save_checkpoint, spread_model
from PIL import Image

from tools import tiles
from utils import UsageError


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Arguments for three pictures of 96x160 and a tiny network."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for name in "abc":
        samples = rng.integers(0, 256, (160, 96, 3), dtype=np.uint8)
        Image.fromarray(samples).save(tmp_path / "pictures" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    checkpoint = save_checkpoint(spread_model(), tmp_path / "tiny.pth.tar")
    return ["pictures", "--checkpoint", str(checkpoint), "--json", "rows.json"]


def test_pictures_of_a_folder(command, tmp_path, capsys):
    tiles.main([*command, "--tile-sizes", "64", "128"])
    rows = json.loads((tmp_path / "rows.json").read_text())["tiles"]
    assert [(row["name"], row["tile"]) for row in rows] == [
        (f"{name}.png", tile) for name in "abc" for tile in (64, 128)
    ]
    assert {row["pixels"] for row in rows} == {96 * 160}
    assert len(capsys.readouterr().out.splitlines()) == 3  # a heading, and a line for each size


def test_large_pictures_take_as_many_of_the_folder_as_they_have_room_for(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr(tiles, "ENLARGED", (120, 80))
    tiles.main([*command, "--tile-sizes", "64", "--size", "200", "70"])
    rows = json.loads((tmp_path / "rows.json").read_text())["tiles"]
    assert [(row["name"], row["pixels"]) for row in rows] == [
        ("a.png", 200 * 70), ("c.png", 200 * 70)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tile-sizes", "100"], "expected a multiple of 64 from 64 up to 16320, got '100'"),
        (["--tile-sizes", "0"], "expected a multiple of 64 from 64 up to 16320, got '0'"),
        (["--tile-sizes", "64", "--margins", "5"], "expected a multiple of 16 up to 4080, got '5'"),
        (["--tile-sizes", "64", "--quality", "40"], "leave out --quality"),
    ],
)
def test_what_no_file_can_have_is_refused(command, flags, message):
    with pytest.raises(UsageError, match=message):
        tiles.main([*command, *flags])


def test_a_size_without_tiles_is_refused(command):
    with pytest.raises(UsageError, match="--size is of pictures for --tile-sizes"):
        tiles.main([*command, "--megapixels", "1", "--size", "200", "70"])
