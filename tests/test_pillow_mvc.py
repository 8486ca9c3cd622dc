"""`.mvc` files through Pillow: opened, saved, and under attack."""

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import gained_model, save_checkpoint, spread_model
from PIL import Image, ImageFile, UnidentifiedImageError
from test_utils import ADOBE, ADOBE_EXPONENT, icc_profile

import pillow_mvc
import utils
from models import Coder, container, load_model
from models.checkpoint import save_weights

ROOT = Path(__file__).parent.parent
STREAMS = ROOT / "tests" / "assets" / "streams"


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    """A tiny model's coder; its checkpoint is in use during this module."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth.tar"
    coder = Coder(spread_model())
    save_checkpoint(coder.model, path)
    before = pillow_mvc._in_use[:]
    pillow_mvc.use(path)
    yield coder
    pillow_mvc._in_use[:] = before


@pytest.fixture
def in_use():
    """The checkpoints in use, which are those of before after the test."""
    before = pillow_mvc._in_use[:]
    yield before
    pillow_mvc._in_use[:] = before


@pytest.fixture
def picture():
    samples = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    return Image.fromarray(samples)


@pytest.fixture(scope="module")
def stream(coder):
    return coder.encode(torch.rand(1, 3, 40, 70))


def decoded(coder, data):
    return utils.to_image(coder.decode(data)[0])


def test_one_import_is_all_it_takes_in_any_folder(tmp_path):
    """Opening needs no PyTorch; coding finds the shipped weights, whatever lies in the folder."""
    (tmp_path / "mambavc-light-0.0130.safetensors").write_text("not these weights")
    script = (
        "import sys; from PIL import Image; import pillow_mvc\n"
        f"image = Image.open({str(STREAMS / 'crop2d.mvc')!r})\n"
        "print(image.size, image.mode, image.format, 'torch' in sys.modules)\n"
        "image.save('a.png'); print('torch' in sys.modules)\n"
        "image.save('a.mvc', quality=30)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["(64, 200) RGB MVC False", "True"]
    original = utils.read_image(ROOT / "demo" / "train" / "crop2.jpg").crop((0, 0, 64, 200))
    psnr = utils.psnr(utils.to_tensor(Image.open(tmp_path / "a.png")), utils.to_tensor(original))
    assert psnr == pytest.approx(36.063, abs=0.01)  # as measured where it was encoded
    saved = container.unpack((tmp_path / "a.mvc").read_bytes())
    assert (saved.quality, saved.fingerprint) == (
        30,
        Coder(load_model("mambavc-light")).fingerprint,
    )


def test_saved_pictures_are_the_coders(coder, picture, tmp_path):
    path = tmp_path / "a.mvc"
    picture.save(path)
    assert path.read_bytes() == coder.encode(utils.to_tensor(picture)[None])
    with Image.open(path) as image:
        assert (image.size, image.mode, image.format) == ((47, 33), "RGB", "MVC")
        image.load()
        assert image.tobytes() == decoded(coder, path.read_bytes()).tobytes()
        assert image.crop((0, 0, 5, 5)).size == (5, 5)


def test_streams_in_memory(coder, picture):
    file = io.BytesIO()
    picture.save(file, format="MVC")
    assert Image.open(file).tobytes() == decoded(coder, file.getvalue()).tobytes()


def test_a_file_that_arrives_in_pieces(coder, stream):
    """As servers read uploads: the size is known after the first piece."""
    parser = ImageFile.Parser()
    parser.feed(stream[:30])
    assert parser.image.size == (70, 40)
    parser.feed(stream[30:100])
    parser.feed(stream[100:])
    assert parser.close().tobytes() == decoded(coder, stream).tobytes()


def test_files_of_all_checkpoints_in_use_open(coder, stream):
    assert Image.open(io.BytesIO(stream)).tobytes() == decoded(coder, stream).tobytes()
    shipped = STREAMS / "crop2c.mvc"
    expected = decoded(Coder(load_model("mambavc-light-0.0130")), shipped.read_bytes())
    assert Image.open(shipped).tobytes() == expected.tobytes()


def test_a_file_of_another_model_opens_once_its_checkpoint_is_in_use(
    coder, picture, tmp_path, in_use
):
    other = Coder(spread_model(seed=1))
    data = other.encode(utils.to_tensor(picture)[None])
    image = Image.open(io.BytesIO(data))
    with pytest.raises(OSError, match=rf"made by model {other.fingerprint.hex()}.*pillow_mvc\.use"):
        image.load()
    pillow_mvc.use(save_checkpoint(other.model, tmp_path / "other.pth.tar"))
    assert image.tobytes() == decoded(other, data).tobytes()


def test_a_file_that_is_no_checkpoint_hides_none(stream, tmp_path, in_use):
    (tmp_path / "x.pth.tar").write_text("no checkpoint")
    pillow_mvc.use(tmp_path / "x.pth.tar")
    assert Image.open(io.BytesIO(stream)).convert("RGB").size == (70, 40)
    with pytest.raises(OSError, match=r"x\.pth\.tar as a checkpoint"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.mvc")


def test_a_checkpoint_in_parts_is_used_as_others(picture, tmp_path, in_use):
    model = spread_model(seed=2)
    state = {"model": "mambavc", "model_args": model.config, "state_dict": model.state_dict()}
    save_weights(state, tmp_path / "parts.safetensors", max_part_bytes=900_000)
    index = tmp_path / "parts.safetensors.index.json"
    pillow_mvc.use(index)
    file = io.BytesIO()
    picture.save(file, format="MVC")
    coder = Coder(load_model(index))
    assert Image.open(file).tobytes() == decoded(coder, file.getvalue()).tobytes()
    with pytest.raises(
        ValueError, match=r"^parts\.safetensors\.index\.json is a network of a single"
    ):
        picture.save(file, format="MVC", quality=30)


def test_a_checkpoint_that_does_not_exist_is_refused(in_use):
    with pytest.raises(utils.UsageError, match="none-such does not exist"):
        pillow_mvc.use("none-such")
    assert pillow_mvc._in_use == in_use


def test_quality_is_refused_where_the_model_has_one_rate(coder, picture, tmp_path):
    path = tmp_path / "a.mvc"
    with pytest.raises(ValueError, match=r"tiny.pth.tar is .* single rate: leave quality out"):
        picture.save(path, quality=50)
    assert not path.exists()


def test_quality_of_a_network_of_every_rate(picture, tmp_path, in_use):
    coder = Coder(gained_model())
    pillow_mvc.use(save_checkpoint(coder.model, tmp_path / "gained.pth.tar"))
    x = utils.to_tensor(picture)[None]
    for options, quality in (({}, 50), ({"quality": 12.5}, 12.5), ({"quality": 100}, 100)):
        picture.save(tmp_path / "a.mvc", **options)
        data = (tmp_path / "a.mvc").read_bytes()
        assert data == coder.encode(x, quality)
        assert Image.open(tmp_path / "a.mvc").tobytes() == decoded(coder, data).tobytes()
    for quality in (-1, 100.5, "high", float("nan")):
        with pytest.raises(ValueError, match="expected a quality from 0 to 100"):
            picture.save(tmp_path / "a.mvc", quality=quality)


def test_modes_that_lose_something_are_refused(coder, picture):
    for mode in ("RGBA", "LA", "P", "CMYK", "I;16", "F"):
        source = picture.convert("L") if mode == "I;16" else picture
        with pytest.raises(OSError, match=f"cannot write mode {mode} as MVC"):
            source.convert(mode).save(io.BytesIO(), format="MVC")


def test_grey_pictures_are_repeated(coder, picture):
    grey, colour = io.BytesIO(), io.BytesIO()
    picture.convert("L").save(grey, format="MVC")
    picture.convert("L").convert("RGB").save(colour, format="MVC")
    assert grey.getvalue() == colour.getvalue()


def test_colours_of_a_profile_are_converted(coder, picture, tmp_path):
    """The file's own profile, or that which is given: as codec.py does with pictures of both."""
    profile = icc_profile(ADOBE, ADOBE_EXPONENT)
    picture.save(tmp_path / "a.png", icc_profile=profile)
    converted = utils.read_image(tmp_path / "a.png")
    assert converted.tobytes() != picture.tobytes()
    expected = coder.encode(utils.to_tensor(converted)[None])
    Image.open(tmp_path / "a.png").save(tmp_path / "own.mvc")
    picture.save(tmp_path / "given.mvc", icc_profile=profile)
    assert (tmp_path / "own.mvc").read_bytes() == expected
    assert (tmp_path / "given.mvc").read_bytes() == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MVC",
        b"MVC is a pattern of programs",
        b"MVC\x81abcd",
        b"MVC\x81abcd\x80\x80\x80\x80\x80\x01",
    ],
)
def test_what_is_no_stream_is_not_identified(data):
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))


def header(height, width):
    out = bytearray(b"MVC\x81abcd")
    container._write_varint(out, height)
    container._write_varint(out, width)
    return io.BytesIO(out + b"\0" * 20)


def test_pillows_rules_for_huge_pictures_apply():
    with pytest.raises(Image.DecompressionBombError):
        Image.open(header(65_535, 65_535))
    with pytest.warns(Image.DecompressionBombWarning):
        image = Image.open(header(10_000, 10_000))
    with pytest.raises(OSError, match="checksum"):
        image.load()
    with pytest.raises(UnidentifiedImageError):
        Image.open(header(0, 5))


def test_a_size_beyond_the_formats_limits_is_an_os_error(coder, tmp_path):
    with pytest.raises(OSError, match="outside the limits"):
        Image.new("L", (65_536, 1)).save(tmp_path / "a.mvc")


def test_damaged_files_raise_what_pillows_own_do(coder, stream):
    """Every byte of a file in turn has a bit flipped, and the file ends before it."""
    rng = np.random.default_rng(0)
    mutants = [stream[:n] for n in range(len(stream))]
    for place in range(len(stream)):
        bit = 1 << rng.integers(8)
        mutants.append(stream[:place] + bytes([stream[place] ^ bit]) + stream[place + 1 :])
    mutants.append(stream + b"\0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for mutant in mutants:
            with pytest.raises((OSError, Image.DecompressionBombError)):
                Image.open(io.BytesIO(mutant)).load()
    assert Image.open(io.BytesIO(stream)).tobytes() == decoded(coder, stream).tobytes()


def test_a_file_that_changed_after_it_was_opened_is_an_os_error(coder, stream):
    for size in (8, 80):
        file = io.BytesIO(stream)
        image = Image.open(file)
        file.seek(0)
        file.truncate()
        file.write(coder.encode(torch.rand(1, 3, size, size)))
        with pytest.raises(OSError, match="changed since it was opened"):
            image.load()
