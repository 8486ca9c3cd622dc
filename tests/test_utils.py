"""What the programs share: pictures, metrics, files that are not lost, errors of one line."""

import argparse
import itertools
import math
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Terminal, screen
from PIL import Image, ImageCms

import utils
from utils import DataError, UsageError, atomic_write, check_output, number

ROOT = Path(__file__).parent.parent


def test_import_needs_neither_pytorch_nor_numpy():
    program = "import sys, utils; print({'torch', 'numpy', 'PIL.Image'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "{'PIL.Image'}\n", done.stderr


# Flags


def test_numbers_are_of_their_range():
    assert number(int, 0)("0") == 0
    assert number(float, 0, 1)("0.5") == 0.5
    assert number(float, 0, most=100)("100") == 100
    assert utils.positive_int("7") == 7
    for parse, text, message in (
        (utils.positive_int, "0", "expected an integer of at least 1, got '0'"),
        (utils.positive_int, "1.5", "expected an integer of at least 1, got '1.5'"),
        (number(float, 0, exclusive=True), "0", "expected a number above 0, got '0'"),
        (number(float, 0), "nan", "expected a number of at least 0, got 'nan'"),
        (number(float, 0), "inf", "expected a number of at least 0, got 'inf'"),
        (number(float, 0, 1), "1", "expected a number of at least 0 and below 1, got '1'"),
        (
            number(float, 0, most=9),
            "9.1",
            "expected a number of at least 0 and at most 9, got '9.1'",
        ),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            parse(text)
        assert str(caught.value) == message


# Pictures


def read(folder, image, name="x.png", **options):
    """First row of a picture that was saved and read."""
    image.save(folder / name, **options)
    return np.array(utils.read_image(folder / name))[0].tolist()


GREY = np.array([[0, 128, 255]], dtype=np.uint8)
EXPECTED = [[v] * 3 for v in (0, 128, 255)]


def test_every_kind_of_picture_becomes_8_bit_rgb(tmp_path):
    assert read(tmp_path, Image.fromarray(GREY)) == EXPECTED
    assert read(tmp_path, Image.fromarray(GREY).convert("P")) == EXPECTED
    assert read(tmp_path, Image.fromarray(GREY).convert("CMYK"), "x.tiff") == EXPECTED
    black_and_white = Image.fromarray(GREY[:, ::2]).convert("1")
    assert read(tmp_path, black_and_white) == EXPECTED[::2]
    # Black of no, half and full opacity over white.
    alpha = np.zeros((1, 3, 4), dtype=np.uint8)
    alpha[..., 3] = GREY
    assert read(tmp_path, Image.fromarray(alpha)) == [[v] * 3 for v in (255, 127, 0)]
    assert read(tmp_path, Image.fromarray(alpha).convert("LA")) == [[v] * 3 for v in (255, 127, 0)]
    palette = Image.fromarray(GREY).convert("P")
    assert read(tmp_path, palette, transparency=0)[0] == [255] * 3
    colour = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # the first row is the right-hand side
    colour.save(tmp_path / "x.png", exif=turned)
    upright = np.array(utils.read_image(tmp_path / "x.png"))
    assert upright.tolist() == [[[255, 0, 0]], [[0, 0, 255]]]


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 * 2**30), ("1.5g", 3 * 2**29), ("800 MiB", 800 * 2**20), ("123", 123), ("2KB", 2048)],
)
def test_sizes_in_bytes(text, size):
    assert utils.size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1e9", "4 Q", "0", "nan", "0.0000001K"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 4G"):
        utils.size_in_bytes(text)


def test_progress_is_said_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    """As if each of four items took 20 seconds."""
    times = itertools.count(0, 20)
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(times))
    with utils.progress(iter("abcd"), 4, "tile", "x.png") as tracked:
        assert [*tracked] == [*"abcd"]
    assert capsys.readouterr() == ("", "x.png: 2 of 4 tiles, 0.05 a second, 00:40 left\n")
    with utils.progress("abcd", 4, "picture", "reading", "{}.png".format) as tracked:
        assert [*tracked] == [*"abcd"]
    line = "reading, b.png: 2 of 4 pictures, 0.05 a second, 00:40 left\n"
    assert capsys.readouterr() == ("", line)


def test_terminal_without_a_size_gets_lines(monkeypatch):
    monkeypatch.setattr(utils, "SECONDS_BETWEEN_LINES", 0)
    with Terminal((0, 0)) as terminal, utils.progress("ab", 2, "picture", label=str) as pictures:
        list(pictures)
    (line,) = screen(terminal.written)
    assert line.startswith("a: 1 of 2 pictures, ")


def test_progress_on_a_terminal_is_a_bar_with_names():
    """That of a picture appears before the work on it; lines stand above; in the end it is gone."""
    names = ["a.png", f"{'long' * 20}-12.png", "\x1b[2J.png"]
    with Terminal() as terminal, utils.progress(names, 3, "picture", label=str) as pictures:
        utils.setup_logging()
        for i, name in enumerate(pictures):
            utils.say(f"line {i}", sys.stderr)
            with utils.progress("xy", 2, "tile", name) as tiles:
                utils.logger.info("tiles %s", "".join(tiles))
    lines = screen(terminal.written)
    assert lines[0::2] == ["line 0", "line 1", "line 2"]
    assert [line[20:] for line in lines[1::2]] == ["tiles xy"] * 3  # after the time
    before_work, *_ = terminal.written.split("line 0")
    assert "a.png:   0%" in before_work
    assert "0/3 [" in before_work
    for shown in ("1/3 [", "1/2 [", "ong-12.png:  33%", "?[2J.png:  67%"):
        assert shown in terminal.written
    assert max(len(part) for part in re.split(r"[\r\n]|\x1b\[A", terminal.written)) <= 80


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, ["-c: error: interrupted"]),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, []),
        ("raise utils.DataError('b.png is bad')", 1, ["-c: error: b.png is bad"]),
    ],
)
def test_terminal_is_clean_however_work_ends(end, code, last):
    program = f"""
import os, signal, utils
# Where a shell has started the tests in the background they ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
def main():
    with utils.progress("abc", 3, "file", label=str) as files:
        for name in files:
            with utils.progress("xyz", 3, "tile", name) as tiles:
                for tile in tiles:
                    {end}
utils.run_main(main)
"""
    with Terminal() as terminal:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=terminal.stream)
    assert done.returncode == code
    assert "0/3 [" in terminal.written
    assert screen(terminal.written) == last


def test_psnr_of_pictures_is_that_of_tensors():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (600, 31, 3), dtype=np.uint8) for _ in "ab"]
    images = [Image.fromarray(array) for array in arrays]
    tensors = [utils.to_tensor(image) for image in images]
    assert utils.picture_psnr(*images) == pytest.approx(utils.psnr(*tensors), abs=1e-9)
    assert utils.picture_psnr(images[0], images[0]) == math.inf


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.pgm"])
def test_16_bit_samples_are_rounded(tmp_path, name):
    # 128.498 and 128.506 levels, whose high bytes are both 129.
    samples = np.array([[0, 33_024, 33_026, 65_535]], dtype=np.uint16)
    rounded = [[v] * 3 for v in (0, 128, 129, 255)]
    assert read(tmp_path, Image.fromarray(samples), name) == rounded


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_samples_whose_white_is_unknown_are_refused(tmp_path, kind):
    Image.fromarray(GREY.astype(kind)).save(tmp_path / "x.tiff")
    with pytest.raises(DataError, match=r"x\.tiff has floating-point, signed or 32-bit samples"):
        utils.read_image(tmp_path / "x.tiff")


# Adobe RGB (1998): its primaries in the coordinates of profiles (XYZ under D50), and its exponent.
ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
ADOBE_EXPONENT = 563 / 256
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def icc_profile(primaries, exponent):
    """An ICC profile (version 2) of a display with these columns of XYZ and this exponent."""

    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(v * 65_536) for v in values))

    def text(kind, value):
        return kind + bytes(4) + struct.pack(">I", len(value) + 1) + value + bytes(79)

    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(exponent * 256))
    entries = {
        b"desc": text(b"desc", b"Wide colours"),
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249),
        **{
            b"%cXYZ" % c: b"XYZ " + bytes(4) + fixed(*primaries[:, i]) for i, c in enumerate(b"rgb")
        },
        **{b"%cTRC" % c: curve for c in b"rgb"},
    }
    table, data = struct.pack(">I", len(entries)), b""
    start = 128 + 4 + 12 * len(entries)
    for name, value in entries.items():
        table += struct.pack(">4sII", name, start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = 128 + len(table) + len(data)
    header = struct.pack(">I4xI12s", size, 0x02400000, b"mntrRGB XYZ ").ljust(36, b"\0") + b"acsp"
    header = header.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + table + data


def test_colours_of_another_profile_are_converted_and_said_so(tmp_path):
    # Within sRGB's range, so that nothing is clipped.
    samples = np.random.default_rng(0).integers(90, 170, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(samples)
    image.save(tmp_path / "x.png", icc_profile=icc_profile(ADOBE, ADOBE_EXPONENT))
    notes = []
    actual = utils.read_image(tmp_path / "x.png", report=notes.append)
    linear = (samples / 255) ** ADOBE_EXPONENT @ (np.linalg.inv(SRGB) @ ADOBE).T
    expected = 255 * np.where(
        linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear
    )
    assert np.abs(expected - samples).max() > 20, "the test needs colours that change"
    # Profiles hold primaries and exponents with some four digits.
    assert np.abs(np.array(actual) - expected).max() < 2
    assert notes == [
        f"{tmp_path / 'x.png'}: colours converted to sRGB from the profile 'Wide colours'"
    ]
    actual.save(tmp_path / "y.png")
    assert utils.read_image(tmp_path / "y.png").tobytes() == actual.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA"])
def test_srgb_under_another_name_is_left_alone(tmp_path, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    image = image.convert(mode)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "x.png", icc_profile=profile)
    notes = []
    actual = utils.read_image(tmp_path / "x.png", report=notes.append)
    assert actual.tobytes() == image.convert("RGB").tobytes()
    assert notes == []


def test_damaged_profile_is_ignored_and_said_so(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "x.png", icc_profile=b"no profile")
    notes = []
    image = utils.read_image(tmp_path / "x.png", name="it", report=notes.append)
    assert np.array(image)[0].tolist() == EXPECTED
    assert len(notes) == 1
    assert notes[0].startswith("it: its colour profile cannot be used and is ignored")


def test_size_is_checked_before_pixels_are_decoded(tmp_path, monkeypatch):
    def refuse(height, width):
        raise ValueError(f"{height} rows")

    Image.new("RGB", (5, 7)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(DataError, match=r"^it: 7 rows$"):
        utils.read_image(tmp_path / "x.png", name="it", check_size=refuse)


def test_only_formats_that_can_be_read_are_listed(tmp_path):
    for name in ("a.png", "b.JPG", "c.webp", "d.pdf", "e.palm", "f.txt", "g"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in utils.list_images(tmp_path)] == ["a.png", "b.JPG", "c.webp"]


# Metrics


def test_psnr_is_that_of_8_bit_samples():
    a = torch.zeros(3, 2, 2)
    assert utils.psnr(a, a) == math.inf
    assert utils.psnr(a, a + 0.4 / 255) == math.inf
    assert utils.psnr(a, a + 0.6 / 255) == pytest.approx(20 * math.log10(255))
    assert utils.psnr(a, a + 10.4 / 255) == pytest.approx(20 * math.log10(25.5))
    # One sample of twelve is off by 255: a twelfth of the largest error.
    a[0, 0, 0] = 1
    assert utils.psnr(a, torch.zeros_like(a)) == pytest.approx(10 * math.log10(12))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_no_sample_stands_for_are_refused(value):
    x = torch.zeros(3, 2, 2)
    x[1, 1, 1] = value
    for function in (utils.to_image, utils.to_uint8, lambda x: utils.psnr(x, torch.zeros(3, 2, 2))):
        with pytest.raises(DataError, match="picture is not finite"):
            function(x)


# Files


def write(path, data=b"new"):
    check_output(path)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def test_failure_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_file_behind_a_link_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):  # a link may also lead to a file that does not exist yet
        (tmp_path / name).symlink_to(f"there/{name}")
    (tmp_path / "there" / "old").touch()
    for name in ("old", "new"):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "there" / name).read_bytes() == b"new"
    assert len([*(tmp_path / "there").iterdir()]) == 2


def test_permissions_are_kept(tmp_path):
    (tmp_path / "old").touch(0o640)
    (tmp_path / "old").chmod(0o604)
    umask = os.umask(0o027)
    try:
        write(tmp_path / "old")
        write(tmp_path / "new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o604
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_what_is_no_regular_file_takes_the_data_and_stays_what_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join()
    assert received == [b"new"]
    assert pipe.is_fifo()


def test_names_of_any_length_that_the_system_takes(tmp_path):
    for character in ("n", "\u00fc", "\U0001f600"):
        name = character * (255 // len(character.encode()))
        write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new"
        with pytest.raises(UsageError, match="File name too long"):
            check_output(tmp_path / (name + character))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/x", "folder nowhere does not exist; create it"),
        (".", "it is a folder; give the name of a file"),
        ("file/x", "cannot write file/x: Not a directory"),
        ("lost", "does not exist; create it"),
    ],
)
def test_output_that_cannot_be_written_is_told_beforehand(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("lost").symlink_to("nowhere/x")
    with pytest.raises(UsageError, match=message):
        check_output(Path(path))


# Ends of a program


def test_sigterm_leaves_the_old_file_and_no_temporary_one(tmp_path):
    (tmp_path / "x").write_text("old")
    program = """
import sys, time, utils
from pathlib import Path
def main():
    with utils.atomic_write(Path(sys.argv[1])) as path:
        path.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
utils.run_main(main)
"""
    command = [sys.executable, "-c", program, tmp_path / "x"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such symbol"), "it: no such symbol"),
        (MemoryError(), "it: not enough memory"),
        (RuntimeError("CUDA out of memory"), "it: not enough memory"),
        (RuntimeError("could not create a primitive"), "it: not enough memory"),
    ],
    ids=repr,
)
def test_errors_of_a_picture_name_it(error, message):
    with pytest.raises(DataError, match=message), utils.data_errors("it"):
        raise error


def test_errors_of_the_program_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), utils.data_errors("it"):
        raise RuntimeError("shapes do not match")
