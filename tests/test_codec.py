"""Pictures through files and back, on the command line and under attack."""

import collections
import copy
import dataclasses
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Terminal, gained_model, save_checkpoint, screen, spread_model
from PIL import Image

import codec
import models.entropy
import models.memory
import utils
from models import BitstreamError, Coder, container, load_model
from utils import DataError, UsageError

ROOT = Path(__file__).parent.parent
TRAINED = "mambavc-light-0.0130"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return spread_model()


@pytest.fixture(scope="module")
def coder(model):
    return Coder(model)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return save_checkpoint(model, tmp_path_factory.mktemp("checkpoint") / "tiny.pth.tar")


def picture(width, height, seed=0):
    samples = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(samples)


def mutants(data, rng):
    """Damaged copies of a file, by kind: at least 2,000 of them."""
    head = len(data) - len(container.unpack(data).y) - 8
    for bit in range(8 * head):
        yield "bit of the header", flip(data, bit)
    for bit in rng.integers(8 * head, 8 * len(data), 500):
        yield "bit of the rest", flip(data, bit)
    for length in range(min(200, len(data))):
        yield "cut", data[:length]
    for _ in range(600):
        start, stop = sorted(rng.integers(0, len(data), 2))
        source = rng.integers(0, len(data) - (stop - start) + 1)
        yield "splice", data[:start] + data[source : source + stop - start] + data[stop:]
    for _ in range(300):
        count = rng.integers(1, 40)
        place = rng.integers(0, len(data))
        yield "random bytes", data[:place] + rng.bytes(count) + data[place + count :]
    for _ in range(200):
        yield (
            "removed or inserted",
            (
                data[: (place := rng.integers(0, len(data)))]
                + rng.bytes(rng.integers(0, 4))
                + data[place + rng.integers(0, 4) :]
            ),
        )


def flip(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_damaged_files_are_refused_or_decode_to_the_right_picture(coder, monkeypatch):
    monkeypatch.setattr(models.entropy, "GUARD", 1e-2)  # for some guard entries in the header
    data = coder.encode(torch.rand(1, 3, 50, 70))
    assert len(data) > 200
    right = coder.decode(data)
    counts = collections.Counter()
    for kind, damaged in mutants(data, np.random.default_rng(0)):
        if damaged == data:
            continue
        counts[kind] += 1
        try:
            decoded = coder.decode(damaged)
        except BitstreamError as error:
            assert "\n" not in str(error)
        else:
            assert torch.equal(decoded, right), kind
    assert counts.total() >= 2000, counts


def test_damage_behind_the_file_checksum_is_refused_too(coder, monkeypatch):
    """Strings changed on purpose, in files whose checksum was made to fit."""
    monkeypatch.setattr(models.entropy, "GUARD", 1e-2)
    stream = container.unpack(coder.encode(torch.rand(1, 3, 50, 70)))
    right = coder.decode(stream)
    rng = np.random.default_rng(0)
    for i in range(200):
        name = ("z", "y", "guards", "crc")[min(i // 60, 3)]
        value = getattr(stream, name)
        if name == "crc":
            value ^= 1 << i % 32
        elif name == "guards":
            value = [(max(0, p), rng.integers(0, 256)) for p, _ in value]
        elif i % 3:
            value = flip(value, rng.integers(8 * len(value)))
        else:
            value = value[: rng.integers(len(value))] + rng.bytes(i % 4)
        damaged = container.pack(dataclasses.replace(stream, **{name: value}))
        try:
            decoded = coder.decode(damaged)
        except BitstreamError:
            continue
        assert torch.equal(decoded, right)


@pytest.mark.parametrize(("width", "height"), [(8192, 8192), (65_535, 1024), (129, 70), (1, 1)])
def test_size_that_does_not_go_with_the_strings_is_refused(coder, width, height):
    """Before the network runs at that size, so in bounded time and memory."""
    stream = container.unpack(coder.encode(torch.rand(1, 3, 50, 70)))
    data = container.pack(dataclasses.replace(stream, width=width, height=height))
    with pytest.raises(BitstreamError):
        coder.decode(data)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(70, 50).save("a.png")
    picture(33, 40, seed=1).save("b.png")
    return tmp_path


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_encode_info_decode(folder, checkpoint, coder, capsys):
    codec.main(["encode", "a.png", "a.mvc", "--checkpoint", checkpoint])
    data = Path("a.mvc").read_bytes()
    assert (
        f"a.png: 70x50, {len(data)} bytes, {8 * len(data) / 3500:.4f} bpp"
        in capsys.readouterr().out
    )
    codec.main(["info", "a.mvc"])
    out = capsys.readouterr().out
    assert "70x50" in out
    assert f"model {coder.fingerprint.hex()}, version 1, exact" in out
    codec.main(["decode", "a.mvc", "back.png", "--checkpoint", checkpoint])
    assert Image.open("back.png").tobytes() == utils.to_image(coder.decode(data)[0]).tobytes()
    codec.main(["decode", "a.mvc", "back.bmp", "--checkpoint", checkpoint])
    assert Image.open("back.bmp").format == "BMP"
    assert files(folder) == ["a.mvc", "a.png", "b.png", "back.bmp", "back.png"]


@pytest.fixture(scope="module")
def every_rate(tmp_path_factory):
    """Checkpoint of a network of every rate."""
    folder = tmp_path_factory.mktemp("every_rate")
    return save_checkpoint(gained_model(), folder / "gained.pth.tar")


def test_quality_is_in_the_file_and_in_what_is_said_of_it(folder, every_rate, capsys):
    arguments = ["encode", "a.png", "a.mvc", "--checkpoint", every_rate]
    codec.main([*arguments, "--quality", "33.333"])
    assert re.search(r"bpp, quality 33\.33$", capsys.readouterr().out.strip())
    assert container.unpack(Path("a.mvc").read_bytes()).quality == 33.33
    codec.main(["info", "a.mvc"])
    assert re.search(r"bpp, quality 33\.33, model \w+, version 2, exact", capsys.readouterr().out)
    codec.main(["decode", "a.mvc", "back.png", "--checkpoint", every_rate])
    assert Image.open("back.png").size == (70, 50)


@pytest.mark.parametrize("flag", ["--target-bpp", "--target-bytes", "--target-psnr"])
def test_target_is_met_within_a_percent(folder, every_rate, flag, capsys):
    coder = Coder(load_model(every_rate))
    picture(160, 130).save("a.png")
    x = utils.to_tensor(Image.open("a.png"))[None]

    def value(data):
        if flag == "--target-psnr":
            return utils.psnr(coder.decode(data), x)
        return len(data) if flag == "--target-bytes" else 8 * len(data) / (160 * 130)

    wanted = value(coder.encode(x, 20.0))
    if flag == "--target-bytes":
        wanted = round(wanted)
    arguments = ["a.png", "a.mvc", "--checkpoint", every_rate]
    codec.main(["encode", *arguments, flag, str(wanted)])
    out = capsys.readouterr().out
    assert re.search(r", quality [\d.]+ found in [1-8] codings", out)
    assert "not met" not in out
    found = value(Path("a.mvc").read_bytes())
    if flag == "--target-psnr":
        assert abs(found - wanted) < 0.0433, "1 % of the squared error, in dB"
        assert f"{found:.2f} dB" in out
    else:
        assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(
    ("flag", "value", "quality"), [("--target-bpp", "0.001", 0), ("--target-bytes", "99999", 100)]
)
def test_target_out_of_reach_gives_the_nearest_and_says_so(
    folder, every_rate, flag, value, quality, capsys
):
    codec.main(["encode", "a.png", "b.png", "out", "--checkpoint", every_rate, flag, value])
    unit = flag.removeprefix("--target-")
    for line in capsys.readouterr().out.splitlines():
        assert f", quality {quality} found in 2 codings, the nearest to the target" in line
        assert line.endswith(f"of {value} {unit}, which was not met")
    assert container.unpack(Path("out/b.mvc").read_bytes()).quality == quality


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "is a network of every rate; give --quality, --target-bpp, --target-psnr or"),
        (["--quality", "100.5"], "expected a number of at least 0 and at most 100, got '100.5'"),
        (["--quality", "nan"], "expected a number of at least 0 and at most 100, got 'nan'"),
        (["--quality", "5", "--target-bpp", "1"], "not allowed with argument"),
        (["--target-psnr", "0"], "expected a number above 0"),
        (["--target-bytes", "1.5"], "expected an integer of at least 1"),
    ],
    ids=" ".join,
)
def test_rates_that_cannot_be_are_refused(folder, every_rate, flags, message):
    with pytest.raises(UsageError, match=message):
        codec.main(["encode", "a.png", "a.mvc", "--checkpoint", every_rate, *flags])
    assert files(folder) == ["a.png", "b.png"]


@pytest.mark.parametrize("flags", [["--quality", "5"], ["--target-bpp", "1"]], ids=" ".join)
def test_single_rate_takes_neither_quality_nor_target(folder, checkpoint, flags):
    with pytest.raises(UsageError, match="is a network of a single rate; leave out --quality"):
        codec.main(["encode", "a.png", "a.mvc", "--checkpoint", checkpoint, *flags])


def test_damaged_quality_is_one_line(folder, every_rate, capsys):
    """By accident, and with a file checksum that was made to fit."""
    codec.main(["encode", "a.png", "a.mvc", "--checkpoint", every_rate, "--quality", "40"])
    data = Path("a.mvc").read_bytes()
    assert data[8:10] == (4000).to_bytes(2, "little")
    for quality, resealed, message in (
        (b"\xa1\x0f", False, "its checksum does not match"),
        (b"\xff\xff", False, "its checksum does not match"),
        (b"\xff\xff", True, "a quality of 655.35 is outside the range from 0 to 100"),
        (b"\x11\x27", True, "a quality of 100.01 is outside the range from 0 to 100"),
    ):
        damaged = data[:8] + quality + data[10:]
        if resealed:
            damaged = damaged[:-4] + struct.pack("<I", zlib.crc32(damaged[:-4]))
        Path("bad.mvc").write_bytes(damaged)
        for command in (["info", "bad.mvc"], ["decode", "bad.mvc", "x.png"]):
            tail = ["--checkpoint", every_rate] if command[0] == "decode" else []
            with pytest.raises(DataError, match=message) as caught:
                codec.main([*command, *tail])
            assert "\n" not in str(caught.value)
    assert "x.png" not in files(folder)


def test_several_inputs_go_to_a_folder(folder, checkpoint, capsys):
    Path("c.png").write_text("no picture")
    with pytest.raises(DataError, match="1 of 3 files failed"):
        codec.main(["encode", "a.png", "c.png", "b.png", "out", "--checkpoint", checkpoint])
    captured = capsys.readouterr()
    assert "cannot read c.png as a picture" in captured.err
    assert captured.out.count("bpp") == 2
    codec.main(["decode", "out/a.mvc", "out/b.mvc", "out", "--checkpoint", checkpoint])
    assert [name for name in files(folder) if name.startswith("out")] == [
        f"out/{name}" for name in ("a.mvc", "a.png", "b.mvc", "b.png")
    ]
    assert Image.open("out/b.png").size == (33, 40)


def test_terminal_shows_names_and_the_output_stays_as_it_is(folder, checkpoint, capsys):
    arguments = ["encode", "a.png", "b.png", "out", "--checkpoint", checkpoint, "--tile-size", "64"]
    codec.main(arguments)
    plain, errors = capsys.readouterr()
    assert errors == ""
    with Terminal() as terminal:
        codec.main([*arguments, "--force"])
    assert capsys.readouterr().out == plain
    assert "a.png:   0%" in terminal.written
    assert "0/2 [" in terminal.written  # files
    assert " tile/s" in terminal.written
    assert screen(terminal.written) == []


def test_file_that_cannot_be_read_does_not_end_the_batch(folder, checkpoint, capsys):
    inputs = ["/proc/self/mem", "a.png", "b.png"]  # reading the first is an I/O error
    with pytest.raises(DataError, match="1 of 3 files failed"):
        codec.main(["encode", *inputs, "out", "--checkpoint", checkpoint])
    assert "error: cannot read /proc/self/mem" in capsys.readouterr().err
    with pytest.raises(DataError, match="1 of 2 files failed"):
        codec.main(["info", "/proc/self/mem", "out/a.mvc"])
    assert "out/a.mvc: 70x50" in capsys.readouterr().out
    assert [name for name in files(folder) if name.startswith("out")] == ["out/a.mvc", "out/b.mvc"]


class Pipe(io.TextIOWrapper):
    def __init__(self, data=b""):
        super().__init__(io.BytesIO(data))


def test_standard_input_and_output(folder, checkpoint, monkeypatch, capsys):
    def through(command, data):
        output = Pipe()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", Pipe(data))
            patch.setattr(sys, "stdout", output)
            codec.main([command, "-", "-", "--checkpoint", checkpoint])
        return output.buffer.getvalue()

    data = through("encode", Path("a.png").read_bytes())
    assert Image.open(io.BytesIO(through("decode", data))).size == (70, 50)
    assert capsys.readouterr().err.count("standard input: 70x50") == 2
    monkeypatch.setattr(sys, "stdin", Pipe(data))
    codec.main(["info", "-"])
    assert "standard input: 70x50" in capsys.readouterr().out


def test_existing_files_are_kept_unless_forced(folder, checkpoint):
    arguments = ["encode", "a.png", "a.mvc", "--checkpoint", checkpoint, "--no-verify"]
    Path("a.mvc").write_text("precious")
    with pytest.raises(UsageError, match=r"a\.mvc exists; give --force"):
        codec.main(arguments)
    assert Path("a.mvc").read_text() == "precious"
    codec.main([*arguments, "--force"])
    assert Path("a.mvc").read_bytes()[:3] == b"MVC"


def test_failed_verification_leaves_the_old_file(folder, checkpoint, monkeypatch):
    Path("a.mvc").write_text("precious")

    def disagree(*args):
        assert files(folder) == ["a.mvc", "a.png", "b.png"]  # no signal could leave another
        raise BitstreamError("decoded symbols differ")

    monkeypatch.setattr(Coder, "decode", disagree)
    arguments = ["encode", "a.png", "a.mvc", "--checkpoint", checkpoint, "--force"]
    with pytest.raises(DataError, match=r"a\.png: decoded symbols differ"):
        codec.main(arguments)
    assert Path("a.mvc").read_text() == "precious"
    assert files(folder) == ["a.mvc", "a.png", "b.png"]
    codec.main([*arguments, "--no-verify"])
    assert container.unpack(Path("a.mvc").read_bytes()).width == 70


@pytest.mark.parametrize("fast", [[], ["--fast-entropy"]], ids=["exact", "fast"])
def test_decoded_picture_is_the_original(folder, fast):
    """Up to what the network loses of it: 33.1 dB at this rate."""
    original = utils.read_image(ROOT / "demo" / "train" / "crop1.jpg")
    original.save("crop.png")
    codec.main(["encode", "crop.png", "crop.mvc", "--checkpoint", TRAINED, *fast])
    assert container.unpack(Path("crop.mvc").read_bytes()).exact == (not fast)
    codec.main(["decode", "crop.mvc", "back.png", "--checkpoint", TRAINED])
    decoded = utils.to_tensor(Image.open("back.png"))
    assert utils.psnr(decoded, utils.to_tensor(original)) > 30


def test_precision_is_that_of_the_flag_and_float32_on_a_cpu(folder, checkpoint):
    """Streams of one precision decode in the other, to pictures that hardly differ."""

    def code(command, source, target, *flags):
        codec.main([command, source, target, "--checkpoint", checkpoint, *flags])
        return Path(target).read_bytes()

    half, full = ["--precision", "bfloat16"], ["--precision", "float32"]
    default = code("encode", "a.png", "default.mvc")
    assert default == code("encode", "a.png", "full.mvc", *full)
    assert default != code("encode", "a.png", "half.mvc", *half)
    for name in ("full.mvc", "half.mvc"):
        code("decode", name, "default.png")
        code("decode", name, "full.png", *full, "--force")
        code("decode", name, "half.png", *half, "--force")
        pictures = [Image.open(f"{p}.png").tobytes() for p in ("default", "full", "half")]
        default, full_picture, half_picture = (np.frombuffer(p, np.uint8) for p in pictures)
        assert np.array_equal(default, full_picture)
        difference = np.abs(full_picture.astype(int) - half_picture)
        assert 0 < difference.max() < 12
        Path("default.png").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "none.png", "x.mvc"], "none.png does not exist"),
        (["encode", ".", "x.mvc"], "is a folder"),
        (["encode", "a.png", "nowhere/x.mvc"], "folder nowhere does not exist"),
        (["encode", "a.png", "b.png", "-"], "need an output folder"),
        (["encode", "-", "."], "needs the name of an output file"),
        (["encode", "a.png", "sub/a.png", "out"], "two inputs would be written to"),
        (["encode", "a.png", "a.png", "--force"], "both input and output"),
        (["encode", "a.png", "b.png", "a.png"], "cannot write to a.png"),
        (["decode", "a.png", "x.xyz"], "no picture format ends in '.xyz'"),
        (["decode", "a.png"], "required: OUT"),
        (["frobnicate"], "invalid choice"),
        (["encode", "a.png", "x.mvc", "--checkpoint", "none.pth"], "none.pth"),
        (["encode", "a.png", "x.mvc", "--checkpoint", "a.png"], "a.png"),
        (["encode", "a.png", ""], "the name of the output is empty"),
        (["encode", "", "x.mvc"], "empty name does not exist"),
        (["encode", "n" * 300, "x.mvc"], "n does not exist"),
        (["encode", "a.png", "n" * 300], "File name too long"),
        (["encode", f"{'n' * 252}.p", "."], "File name too long"),
        (["decode", "a.png", "x.ico"], "fixed sizes only"),
        (["decode", "a.png", "x.icns"], "fixed sizes only"),
        (["decode", "a.png", "x.pdf"], "no picture format ends in '.pdf'"),
        (["info", "n" * 300], "n does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_no_file(folder, checkpoint, arguments, message):
    Path("sub").mkdir()
    picture(5, 5).save("sub/a.png")
    Path(f"{'n' * 252}.p").write_text("its output's name would have 256 characters")
    before = files(folder)
    if "--checkpoint" not in arguments and arguments[0] not in ("frobnicate", "info"):
        arguments = [*arguments, "--checkpoint", checkpoint]
    with pytest.raises(UsageError) as caught:
        codec.main(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(folder) == before


def bomb():
    """A PNG of one pixel that claims to have 70,000 x 12,000."""
    data = io.BytesIO()
    Image.new("L", (1, 1)).save(data, "PNG")
    data = bytearray(data.getvalue())
    data[16:24] = struct.pack(">II", 70_000, 12_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("command", "data", "message"),
    [
        ("encode", b"", "cannot read"),
        ("encode", b"some text", "no format that Pillow knows"),
        ("encode", "half", "cannot read"),
        ("encode", "bomb", "70000x12000"),
        ("encode", "float", "floating-point"),
        ("decode", b"", "not an .mvc file"),
        ("decode", b"MVC", "cut off"),
        ("decode", os.urandom(1000), "not an .mvc file"),
        ("info", b"MVC\x81" + bytes(100), "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_data_is_one_line_and_no_file(folder, checkpoint, command, data, message):
    if data == "half":
        data = Path("a.png").read_bytes()[:3000]
    elif data == "bomb":
        data = bomb()
    elif data == "float":
        Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save("x.tiff")
        data = Path("x.tiff").read_bytes()
        Path("x.tiff").unlink()
    Path("bad.png").write_bytes(data)
    before = files(folder)
    options = [] if command == "info" else ["x.png", "--checkpoint", checkpoint]
    with pytest.raises(DataError) as caught:
        codec.main([command, "bad.png", *options])
    assert message in str(caught.value)
    assert "bad.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(folder) == before


def test_unwritable_output_is_one_line_and_no_file(folder, checkpoint, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match=r"cannot write x\.mvc: No space left on device"):
        codec.main(["encode", "a.png", "x.mvc", "--checkpoint", checkpoint])
    assert files(folder) == ["a.png", "b.png"]


def test_processes_understand_each_other_and_exit_with_the_right_code(folder, checkpoint, coder):
    Path("bad.mvc").write_bytes(b"MVC\x81 damaged")
    commands = {
        0: ["encode", "a.png", "a.mvc", "--checkpoint", checkpoint],
        1: ["info", "bad.mvc"],
        2: ["decode", "bad.mvc", "x.png", "--checkpoint", "none.pth"],
    }
    processes = {
        code: subprocess.Popen(
            [sys.executable, ROOT / "codec.py", *command],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for code, command in commands.items()
    }
    for code, process in processes.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == code, errors
        assert errors.count("\n") == (code > 0), errors
    assert coder.decode(Path("a.mvc").read_bytes()).shape == (1, 3, 50, 70)
    assert files(folder) == ["a.mvc", "a.png", "b.png", "bad.mvc"]


def test_formats_that_lose_quality_again_say_so(folder, checkpoint, capsys):
    codec.main(["encode", "a.png", "a.mvc", "--checkpoint", checkpoint])
    pictures = {}
    for ending in ("png", "bmp", "tiff", "webp", "jpg", "gif"):
        capsys.readouterr()
        codec.main(["decode", "a.mvc", f"x.{ending}", "--checkpoint", checkpoint])
        pictures[ending] = np.array(Image.open(f"x.{ending}").convert("RGB"))
        kept = np.array_equal(pictures[ending], pictures["png"])
        assert kept == (ending not in ("jpg", "gif"))
        warning = f"warning: x.{ending}: .* loses quality again; decode to .png"
        assert len(re.findall(warning, capsys.readouterr().err)) == (not kept)


def test_what_is_done_about_a_colour_profile_is_said(folder, checkpoint, capsys):
    picture(64, 64).save("x.png", icc_profile=b"no profile")
    codec.main(["encode", "x.png", "x.mvc", "--checkpoint", checkpoint])
    assert "warning: x.png: its colour profile cannot be used" in capsys.readouterr().err


def test_picture_too_large_for_the_memory_is_refused(folder, checkpoint, model, monkeypatch):
    """For both commands, and before its pixels are decoded."""
    codec.main(["encode", "a.png", "a.mvc", "--checkpoint", checkpoint])
    needed = 22 * model.config["N"] * 70 * 50
    monkeypatch.setattr(models.memory, "free_memory", lambda: needed)
    codec.main(["encode", "a.png", "x.mvc", "--checkpoint", checkpoint])
    monkeypatch.setattr(models.memory, "free_memory", lambda: needed - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    for arguments in (["encode", "a.png", "y.mvc"], ["decode", "a.mvc", "y.png"]):
        with pytest.raises(DataError, match=r"a picture of 70x50 pixels takes .* GiB of memory"):
            codec.main([*arguments, "--checkpoint", checkpoint])
    assert files(folder) == ["a.mvc", "a.png", "b.png", "x.mvc"]


def test_network_that_decodes_to_nan_writes_no_picture(folder, model, coder):
    data = coder.encode(torch.rand(1, 3, 30, 40))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.g_s[-1].weight.fill_(3e38)  # finite, but its sums are not
    path = save_checkpoint(broken, "broken.pth.tar")
    stream = dataclasses.replace(container.unpack(data), fingerprint=Coder(broken).fingerprint)
    Path("a.mvc").write_bytes(container.pack(stream))
    with pytest.raises(DataError, match=r"a\.mvc: the network's picture is not finite"):
        codec.main(["decode", "a.mvc", "x.png", "--checkpoint", path])
    assert not Path("x.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_says_so(folder, checkpoint):
    with pytest.raises(UsageError, match="--cuda was given but PyTorch sees no GPU"):
        codec.main(["encode", "a.png", "x.mvc", "--checkpoint", checkpoint, "--cuda"])
    assert files(folder) == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["fastest", "triton"])
def test_scan_backend_that_cannot_run_is_a_usage_error(folder, checkpoint, monkeypatch, name):
    monkeypatch.setenv("MAMBAVC_SCAN_BACKEND", name)
    with pytest.raises(UsageError, match=f"scan backend '{name}'"):
        codec.main(["encode", "a.png", "x.mvc", "--checkpoint", checkpoint])
    assert files(folder) == ["a.png", "b.png"]


# As processes


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["info", "a.mvc"], 0),
        (["encode"], 2),
        (["encode", "none.png", "x.mvc", "--checkpoint", TRAINED], 2),
        (["encode", "a.png", "x.mvc", "--checkpoint", "none.pth"], 2),
        (["decode", "a.png", "x.png", "--checkpoint", TRAINED], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nothing_waits_for_pytorch_that_does_not_need_it(folder, coder, arguments, code):
    Path("a.mvc").write_bytes(coder.encode(torch.rand(1, 3, 30, 40)))
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import codec, utils
try:
    utils.run_main(codec.main)
finally:
    print("loaded", {{"torch", "numpy", "compressai"}} & {{*sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith(b"loaded set()\n")


def test_closed_streams_and_readers_that_leave_end_without_a_traceback(folder, coder):
    Path("a.mvc").write_bytes(coder.encode(torch.rand(1, 3, 30, 40)))
    info = f"{sys.executable} {ROOT / 'codec.py'} info"
    for command, code, error in (
        (
            f"{info} - <&-",
            2,
            b"codec.py: error: standard input is closed; give the name of a file\n",
        ),
        (f"{info} a.mvc >&-", 0, b""),
        # By then nobody reads the pipe: 128 + SIGPIPE, as other programs.
        (f"( sleep 1; {info} a.mvc; echo $? >code ) | true; exit $(cat code)", 141, b""),
    ):
        done = subprocess.run(["bash", "-c", command], capture_output=True)
        assert (done.returncode, done.stderr) == (code, error)


def test_name_that_the_terminal_cannot_print_does_not_end_the_batch(folder, coder):
    data = coder.encode(torch.rand(1, 3, 30, 40))
    names = [b"\xff.mvc", b"z.mvc"]
    for name in names:
        Path(os.fsdecode(name)).write_bytes(data)
    done = subprocess.run(
        [sys.executable, ROOT / "codec.py", "info", *names],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b": 40x30, ") == 2
