"""Pictures through files and back, on the command line and under attack."""

import collections
import copy
import dataclasses
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import codec
import models.entropy
import utils
from models import build_model, container
from models.container import BitstreamError
from utils import DataError, UsageError

ROOT = Path(__file__).parent.parent
SIZES = {
    "N": 8,
    "M": 8,
    "depths": (1, 1, 1, 1),
    "num_slices": 2,
    "Z": 8,
    "context_width": 16,
    "transform_width": 16,
}


def spread_model(seed=0):
    """A tiny network whose latents and scales spread over many values, as trained ones do."""
    torch.manual_seed(seed)
    model = build_model("mambavc", **SIZES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("g_a.", "h_a.")) and parameter.ndim == 4:
                parameter *= 4
            if name.startswith("cc_scale_transforms") and name.endswith("4.bias"):
                parameter += torch.linspace(0, 8, len(parameter))
            # Widths of z's tables differ.
            if name == "entropy_bottleneck.matrices.0":
                parameter += torch.linspace(-1, 1, len(parameter))[:, None, None]
    model.update()
    return model.eval()


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
    return codec.Codec(lambda: model, torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth.tar"
    state = {"model": "mambavc", "model_args": model.config, "state_dict": model.state_dict()}
    torch.save(state, path)
    return str(path)


def picture(width, height, seed=0):
    samples = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(samples)


def latents(model, stream, exact=True):
    with torch.no_grad():
        return model.decompress(**stream, exact=exact)["y_hat"]


# Coding


@pytest.mark.parametrize(("width", "height"), [(1, 1), (64, 64), (65, 3), (100, 130)], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_picture_survives_the_file(coder, width, height, exact):
    image = picture(width, height)
    data = coder.encode(image, exact)
    stream = container.unpack(data)
    assert (stream.width, stream.height, stream.exact) == (width, height, exact)
    assert len(stream.y) > 40, "the test needs symbols other than zero"
    decoded = coder.decode(data)
    assert decoded.size == image.size
    assert decoded.tobytes() == coder.decode(data).tobytes()


def test_fast_and_exact_coding_do_not_disturb_each_other(model):
    x = torch.rand(2, 3, 70, 64)
    with torch.no_grad():
        exact = model.compress(x)
        fast = model.compress(x, exact=False)
        assert model.compress(x) == exact
        assert model.compress(x, exact=False) == fast
    assert torch.equal(latents(model, exact), latents(model, exact))
    assert torch.equal(latents(model, fast, exact=False), latents(model, fast, exact=False))


def test_threads_do_not_change_the_stream(model):
    x = torch.rand(1, 3, 64, 64)
    try:
        streams = []
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                streams.append(model.compress(x))
        torch.set_num_threads(1)
        decoded = [latents(model, stream) for stream in streams]
        torch.set_num_threads(2)
        decoded += [latents(model, stream) for stream in streams]
    finally:
        torch.set_num_threads(1)
    # g_a and h_a run in float32: what they make of a picture may differ in the last bit. What was
    # coded comes back on any number of threads (the symbol CRC is checked inside).
    for one, two in zip(decoded[:2], decoded[2:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_exact_coding_follows_changed_weights(model):
    x = torch.rand(1, 3, 64, 64)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        before = changed.compress(x)
        changed.h_scale_s[0].weight.data *= 3
        changed.lrp_transforms[0] = copy.deepcopy(changed.lrp_transforms[0])
        changed.lrp_transforms[0][-1].bias += 1
        after = changed.compress(x)
        assert after == copy.deepcopy(changed).compress(x)
    assert after["strings"] != before["strings"]
    with torch.inference_mode():
        changed.decompress(**after)
    latents(changed, after)


@pytest.mark.parametrize("error", [0.9, -0.9], ids=["higher", "lower"])
def test_other_device_with_slightly_other_scales_decodes_the_picture(model, monkeypatch, error):
    """A wide guard band stands for the real one, an error within it for another device's."""
    guard = 1e-2
    monkeypatch.setattr(models.entropy, "GUARD", guard)
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        stream = model.compress(x)
    expected = latents(model, stream)
    assert len(stream["guards"][0]) > 5

    here = models.entropy.LatentDecoder.table_indexes
    monkeypatch.setattr(
        models.entropy.LatentDecoder,
        "table_indexes",
        lambda self, scale: here(self, scale * (1 + error * guard)),
    )
    assert torch.equal(latents(model, stream), expected)
    with pytest.raises(BitstreamError):
        latents(model, {**stream, "guards": [[]]})


def test_latents_that_cannot_be_coded_are_refused(model):
    broken = copy.deepcopy(model)
    for value in (float("nan"), float("inf"), 1e12):
        with torch.no_grad():
            broken.g_a[-1].bias.fill_(value)
            with pytest.raises(ValueError, match="latents or their predictions"):
                broken.compress(torch.rand(1, 3, 64, 64))


# Damage


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
    data = coder.encode(picture(70, 50), exact=True)
    assert len(data) > 200
    right = coder.decode(data).tobytes()
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
            assert decoded.tobytes() == right, kind
    assert counts.total() >= 2000, counts


def test_damage_behind_the_file_checksum_is_refused_too(coder, monkeypatch):
    """Strings changed on purpose, in files whose checksum was made to fit."""
    monkeypatch.setattr(models.entropy, "GUARD", 1e-2)
    stream = container.unpack(coder.encode(picture(70, 50), exact=True))
    right = coder.decode(container.pack(stream)).tobytes()
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
        assert decoded.tobytes() == right


@pytest.mark.parametrize(("width", "height"), [(8192, 8192), (65_535, 1024), (129, 70), (1, 1)])
def test_size_that_does_not_go_with_the_strings_is_refused(coder, width, height):
    """Before the network runs at that size, so in bounded time and memory."""
    stream = container.unpack(coder.encode(picture(70, 50), exact=True))
    data = container.pack(dataclasses.replace(stream, width=width, height=height))
    with pytest.raises(BitstreamError):
        coder.decode(data)


def test_other_weights_are_refused_by_fingerprint(coder):
    other = codec.Codec(lambda: spread_model(seed=1), torch.device("cpu"))
    with pytest.raises(BitstreamError, match="made by model"):
        other.decode(coder.encode(picture(20, 20), exact=True))


# Command line


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
    assert np.array_equal(np.array(Image.open("back.png")), np.array(coder.decode(data)))
    codec.main(["decode", "a.mvc", "back.bmp", "--checkpoint", checkpoint])
    assert Image.open("back.bmp").format == "BMP"
    assert files(folder) == ["a.mvc", "a.png", "b.png", "back.bmp", "back.png"]


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
        raise BitstreamError("decoded symbols differ")

    monkeypatch.setattr(codec.Codec, "decode", disagree)
    arguments = ["encode", "a.png", "a.mvc", "--checkpoint", checkpoint, "--force"]
    with pytest.raises(DataError, match=r"a\.png: decoded symbols differ"):
        codec.main(arguments)
    assert Path("a.mvc").read_text() == "precious"
    assert files(folder) == ["a.mvc", "a.png", "b.png"]
    codec.main([*arguments, "--no-verify"])


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
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_no_file(folder, checkpoint, arguments, message):
    Path("sub").mkdir()
    picture(5, 5).save("sub/a.png")
    before = files(folder)
    if "--checkpoint" not in arguments and arguments[0] != "frobnicate":
        arguments = [*arguments, "--checkpoint", checkpoint]
    with pytest.raises(UsageError) as caught:
        codec.main(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(folder) == before


def bomb():
    """A PNG of one pixel that claims to have 12,000 x 12,000."""
    data = io.BytesIO()
    Image.new("L", (1, 1)).save(data, "PNG")
    data = bytearray(data.getvalue())
    data[16:24] = struct.pack(">II", 12_000, 12_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("command", "data", "message"),
    [
        ("encode", b"", "cannot read"),
        ("encode", b"some text", "no format that Pillow knows"),
        ("encode", "half", "cannot read"),
        ("encode", "bomb", "12000x12000"),
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
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert errors.count("\n") == (code > 0), errors
    assert coder.decode(Path("a.mvc").read_bytes()).size == (70, 50)
    assert files(folder) == ["a.mvc", "a.png", "b.png", "bad.mvc"]


# Pictures


def test_every_kind_of_picture_becomes_8_bit_rgb(tmp_path):
    grey = np.array([[0, 128, 255]], dtype=np.uint8)

    def read(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        return np.array(utils.read_image(tmp_path / name))[0].tolist()

    expected = [[v] * 3 for v in (0, 128, 255)]
    assert read(Image.fromarray(grey)) == expected
    assert read(Image.fromarray(grey).convert("P")) == expected
    sixteen_bit = np.array([[0, 32_896, 65_535]], dtype=np.uint16)
    assert read(Image.fromarray(sixteen_bit)) == expected
    # Black of no, half and full opacity over white.
    alpha = np.zeros((1, 3, 4), dtype=np.uint8)
    alpha[..., 3] = grey
    assert read(Image.fromarray(alpha)) == [[v] * 3 for v in (255, 127, 0)]
    palette = Image.fromarray(grey).convert("P")
    assert read(palette, transparency=0)[0] == [255] * 3
    colour = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # the first row is the right-hand side
    colour.save(tmp_path / "x.png", exif=turned)
    upright = np.array(utils.read_image(tmp_path / "x.png"))
    assert upright.tolist() == [[[255, 0, 0]], [[0, 0, 255]]]
