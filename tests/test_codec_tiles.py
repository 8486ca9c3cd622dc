"""Large pictures on the command line: tiles, regions, previews, memory, metadata, interruptions."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import gained_model, save_checkpoint, spread_model
from PIL import Image, ImageCms

import codec
import models.memory
import utils
from models import container
from utils import DataError, UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small only wait for each other on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(spread_model(), tmp_path_factory.mktemp("checkpoint") / "tiny.pth.tar")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    small.resize((180, 150), Image.Resampling.BICUBIC).save("a.png")
    return tmp_path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def encode(checkpoint, *flags, name="a"):
    codec.main(["encode", "a.png", f"{name}.mvc", "--checkpoint", checkpoint, *flags])
    return Path(f"{name}.mvc").read_bytes()


def decode(checkpoint, *flags, output="b.png"):
    codec.main(["decode", "a.mvc", output, "--checkpoint", checkpoint, "--force", *flags])
    return Image.open(output)


def test_tiles_and_their_parts(folder, checkpoint, capsys):
    data = encode(checkpoint, "--tile-size", "64")
    assert f"a.png: 180x150, {len(data)} bytes" in capsys.readouterr().out
    codec.main(["info", "a.mvc"])
    out = capsys.readouterr().out
    assert re.search(r"version 3, exact entropy path, 3x3 tiles of up to 64 pixels, margin 32", out)
    assert re.search(r"tile 8 \(row 2, column 2\): 52x22 at 128, 128, \d+ bytes", out)
    whole = decode(checkpoint)
    assert whole.size == (180, 150)
    preview = decode(checkpoint, "--scale", "1/8", "--jobs", "2", output="c.ppm")
    assert "23x19 decoded" in capsys.readouterr().out
    assert preview.tobytes() == whole.reduce(8).tobytes()
    assert decode(checkpoint, "--region", "20", "30", "70", "60").size == (70, 60)
    assert files(folder) == ["a.mvc", "a.png", "b.png", "c.ppm"]


def test_pictures_under_the_limit_are_coded_as_before(folder, checkpoint):
    assert container.unpack(encode(checkpoint)).version == 1
    whole = decode(checkpoint).convert("RGB")
    part = decode(checkpoint, "--region", "20", "30", "70", "60", output="c.png")
    assert part.tobytes() == whole.crop((20, 30, 90, 90)).tobytes()
    preview = decode(checkpoint, "--scale", "1/4", output="d.png")
    assert preview.tobytes() == whole.reduce(4).tobytes()


def test_pictures_above_the_limit_are_coded_in_tiles(folder, checkpoint, monkeypatch):
    monkeypatch.setattr(codec, "MAX_WHOLE_PIXELS", 180 * 150)
    assert container.unpack(encode(checkpoint)).version == 1
    monkeypatch.setattr(codec, "MAX_WHOLE_PIXELS", 180 * 150 - 1)
    monkeypatch.setattr(models.memory, "MAX_WHOLE_PIXELS", 180 * 150 - 1)
    stream = container.unpack(encode(checkpoint, "--force"))
    assert (stream.version, stream.tile) == (3, models.memory.DEFAULT_TILE)


def test_many_tiles_take_few_lines(folder, checkpoint, capsys):
    Image.new("RGB", (64 * 30, 10)).save("a.png")
    encode(checkpoint, "--tile-size", "64", "--no-verify")
    capsys.readouterr()
    codec.main(["info", "a.mvc"])
    out = capsys.readouterr().out
    assert out.count("\n") == 22
    assert "and 10 more" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tile-size", "100"], "expected a multiple of 64 up to 16320, got '100'"),
        (["--tile-size", "-64"], "expected an integer of at least 0"),
        (["--tile-size", "16384"], "expected a multiple of 64"),
        (["--jobs", "0"], "expected an integer of at least 1"),
        (["--max-memory", "many"], "expected a size such as 4G or 800M, got 'many'"),
        (["--max-memory", "0"], "expected a size such as 4G"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_cannot_be_are_refused(folder, checkpoint, flags, message):
    with pytest.raises(UsageError, match=message):
        encode(checkpoint, *flags)
    assert files(folder) == ["a.png"]


@pytest.mark.parametrize("tile", [[], ["--tile-size", "64"]], ids=["whole", "tiles"])
@pytest.mark.parametrize(
    "region", ["180 0 1 1", "0 0 181 1", "0 0 1 151", "0 0 0 5", "100 100 80 51", "9 9 999999 9"]
)
def test_region_outside_is_refused(folder, checkpoint, tile, region):
    encode(checkpoint, "--no-verify", *tile)
    with pytest.raises(DataError, match=r"a\.mvc: a region of .* is no part of a picture of 180x1"):
        decode(checkpoint, "--region", *region.split())
    assert files(folder) == ["a.mvc", "a.png"]


def test_damaged_tile_is_named_and_salvaged(folder, checkpoint, capsys):
    data = bytearray(encode(checkpoint, "--tile-size", "64"))
    data[-20] ^= 1
    Path("a.mvc").write_bytes(data)
    for command in (["info", "a.mvc"], ["decode", "a.mvc", "b.png", "--checkpoint", checkpoint]):
        with pytest.raises(DataError, match=r"a\.mvc: tile 8 \(row 2, column 2\) of 9 tiles is"):
            codec.main(command)
    assert files(folder) == ["a.mvc", "a.png"]
    assert decode(checkpoint, "--region", "0", "0", "60", "60").size == (60, 60)
    with pytest.raises(DataError, match=r"tile 8 .* filled with the mean of those around"):
        decode(checkpoint, "--salvage")
    corner = np.asarray(Image.open("b.png"))[128:, 128:]
    assert (corner == corner[0, 0]).all()


def test_targets_are_met_in_tiles(folder, tmp_path):
    every_rate = save_checkpoint(gained_model(), tmp_path / "gained.pth.tar")
    # Of noise even a network of random weights makes more where it has more bits.
    noise = np.random.default_rng(0).integers(0, 256, (130, 160, 3), dtype=np.uint8)
    original = Image.fromarray(noise)
    original.save("a.png")
    size = len(encode(every_rate, "--tile-size", "64", "--quality", "20"))
    psnr = utils.picture_psnr(decode(every_rate), original)
    found = encode(every_rate, "--tile-size", "64", "--target-bytes", str(size), name="b")
    assert len(found) == pytest.approx(size, rel=0.01)
    encode(every_rate, "--tile-size", "64", "--target-psnr", str(psnr), "--force")
    found = utils.picture_psnr(decode(every_rate), original)
    assert found == pytest.approx(psnr, abs=0.0433), "1 % of the squared error, in dB"


def test_metadata_is_kept(folder, checkpoint):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 6  # turned by 90 degrees
    picture = Image.open("a.png")
    picture.save("a.png", icc_profile=profile, exif=exif)
    stream = container.unpack(encode(checkpoint, "--keep-metadata"))
    assert (stream.tile, stream.icc, stream.width) == (0, profile, 150)
    for output in ("b.png", "b.jpg", "b.webp"):
        back = decode(checkpoint, output=output)
        assert back.info["icc_profile"] == profile
        assert back.getexif()[0x010E] == "a description"
        assert 0x0112 not in back.getexif(), "the picture is upright now"
    encode(checkpoint, "--force")
    assert "icc_profile" not in decode(checkpoint).info

    exif[0x010E] = "x" * 2**20
    picture.save("a.png", exif=exif)
    with pytest.raises(DataError, match="bytes of exif are more than 1048576"):
        encode(checkpoint, "--keep-metadata", "--force")


def test_picture_whose_pixels_do_not_fit_is_refused_with_the_numbers(
    folder, checkpoint, monkeypatch
):
    """Before they are decoded."""
    image = Image.new("1", (40_000, 40_000))
    image.save("a.png")
    monkeypatch.setattr(models.memory, "free_memory", lambda: 8 * 2**30)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(DataError, match=r"40000x40000 pixels takes 23\.84 GiB .* 6\.40 GiB is fr"):
        encode(checkpoint)


# As processes


def run(*arguments):
    return subprocess.Popen(
        [sys.executable, ROOT / "codec.py", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A shell's background jobs, of which the tests may be one, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def test_process_stays_under_its_limit(folder, checkpoint):
    """A limit below what the picture takes whole."""
    model = spread_model(N=32)
    path = save_checkpoint(model, "wide.pth.tar")
    small = Image.open("a.png")
    small.resize((1200, 1000)).save("a.png")
    limit = 1300 * 2**20
    whole = 22 * 32 * 1200 * 1000 + models.memory.FIXED_BYTES
    assert whole > limit - 2**29, "PyTorch itself takes half a gigabyte"
    for command in (["encode", "a.png", "a.mvc"], ["decode", "a.mvc", "b.png"]):
        done = subprocess.run(
            [
                *(sys.executable, "-c", MEASURE, sys.executable, ROOT / "codec.py", *command),
                *("--checkpoint", path, "--max-memory", str(limit)),
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        code, peak = map(int, done.stdout.split()[-2:])
        assert code == 0, done.stderr
        assert peak < limit
    assert container.unpack(Path("a.mvc").read_bytes()).version == 3


def test_interrupted_processes_leave_nothing(folder, checkpoint):
    Image.open("a.png").resize((1200, 900)).save("a.png")
    before = files(folder)
    for i, seconds in enumerate((0.05, 1.5, 4.0)):
        process = run("encode", "a.png", "x.mvc", "--checkpoint", checkpoint, "--tile-size", "64")
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM if i == 1 else signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:  # it was done already
            Path("x.mvc").unlink()
        elif i:  # earlier, Python itself is interrupted while it starts
            assert process.returncode in (130, 143), errors
            assert b"Traceback" not in errors, errors
        assert files(folder) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_and_reader_that_leaves(folder, checkpoint):
    encode(checkpoint, "--tile-size", "64")
    arguments = ["decode", "a.mvc", "-", "--checkpoint", checkpoint]
    with open("/dev/full", "wb") as full:
        command = [sys.executable, ROOT / "codec.py", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert re.fullmatch(
        rb"codec.py: error: cannot write standard output: No space.*\n", done.stderr
    )
    process = run(*arguments)
    process.stdout.close()  # before anything is written
    process.stdout = None
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, b"")
    assert files(folder) == ["a.mvc", "a.png"]


def test_two_processes_on_one_output(folder, checkpoint):
    encode(checkpoint, "--tile-size", "64")
    processes = [
        run("decode", "a.mvc", "b.png", "--checkpoint", checkpoint, "--force") for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, b"")
    written = Image.open("b.png").tobytes()
    assert written == decode(checkpoint, output="c.png").tobytes()
    assert files(folder) == ["a.mvc", "a.png", "b.png", "c.png"]
