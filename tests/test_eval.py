"""Evaluation as a user runs it: tables, JSON, reconstructions, and what bad input gets."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Terminal, gained_model, save_checkpoint, screen, tiny_model
from PIL import Image

import eval as evaluation
import models
import utils
from models import Coder, container, load_model
from tools.figures.plot import load_curve
from utils import DataError

ROOT = Path(__file__).parent.parent
EXPECTED = Path(__file__).parent / "assets" / "expected_eval.json"
CHECKPOINT = "mambavc-light-0.0130"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A dataset_root whose test/ holds a picture for MS-SSIM and one that is too small for it."""
    folder = tmp_path_factory.mktemp("data") / "test"
    folder.mkdir()
    for name, size in (("a.png", (176, 168)), ("b.png", (40, 33))):
        crop = Image.open(ROOT / "demo" / "train" / "crop4.jpg").crop(
            (30, 40, 30 + size[0], 40 + size[1])
        )
        crop.save(folder / name)
    return folder.parent


def run(argv, monkeypatch, capsys):
    """Exit code, standard output and standard error of the script."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    code = 0
    try:
        utils.run_main(evaluation.main)
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("mode", ["real", "estimate"])
def test_results_are_the_expected_ones(mode, pictures, tmp_path, monkeypatch, capsys):
    """MAMBAVC_WRITE_EXPECTED=1 writes the expected file anew."""
    file, images = tmp_path / "results.json", tmp_path / "images"
    argv = ["--data", pictures, "--checkpoint", CHECKPOINT, "--json", file]
    argv += ["--save-images", images] if mode == "real" else ["--estimate"]
    code, out, _ = run(argv, monkeypatch, capsys)
    assert code == 0
    assert "MS-SSIM needs sides of at least 161 pixels; skipped for 1 of 2: b.png" in out
    result = json.loads(file.read_text())
    if os.environ.get("MAMBAVC_WRITE_EXPECTED"):
        known = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
        images_without_times = [
            {key: None if key.endswith("_time") else value for key, value in row.items()}
            for row in result["images"]
        ]
        known[mode] = {"images": images_without_times}
        EXPECTED.write_text(json.dumps(known, indent=1) + "\n")
    expected = json.loads(EXPECTED.read_text())[mode]
    # Machines differ in the last bits of float32: see test_checkpoints.py.
    tolerance = {"bpp": {"rel": 0.005}, "estimated-bpp": {"rel": 0.005}, "psnr-rgb": {"abs": 0.02}}
    for row, wanted in zip(result["images"], expected["images"], strict=True):
        assert row.keys() == wanted.keys()
        assert [row[k] for k in ("name", "width", "height")] == [
            wanted[k] for k in ("name", "width", "height")
        ]
        for key, allowed in tolerance.items():
            assert row[key] == pytest.approx(wanted[key], **allowed)
    means = result["results"]
    assert means["bpp"] == [pytest.approx(sum(row["bpp"] for row in result["images"]) / 2)]
    assert means["ms-ssim-rgb"] == [result["images"][0]["ms-ssim-rgb"]]
    if mode == "real":
        assert [Image.open(images / name).size for name in ("a.png", "b.png")] == [
            (176, 168),
            (40, 33),
        ]


def test_reconstructions_are_of_the_pictures(pictures, tmp_path, monkeypatch, capsys):
    argv = ["--data", pictures, "--checkpoint", CHECKPOINT, "--save-images", tmp_path]
    assert run(argv, monkeypatch, capsys)[0] == 0
    for name, least in (("a.png", 34), ("b.png", 43)):  # a little less than expected_eval.json
        original = utils.to_tensor(Image.open(pictures / "test" / name))
        psnr = utils.psnr(utils.to_tensor(Image.open(tmp_path / name)), original)
        assert least < psnr < least + 1, "the originals themselves would be infinitely good"


@pytest.mark.parametrize("fast", [[], ["--fast-entropy"]], ids=["exact", "fast"])
def test_streams_are_coded_as_asked(fast, pictures, monkeypatch, capsys):
    pack = container.pack
    streams = []
    monkeypatch.setattr(container, "pack", lambda stream: pack(streams.append(stream) or stream))
    code, *_ = run(["--data", pictures, "--checkpoint", CHECKPOINT, *fast], monkeypatch, capsys)
    assert code == 0
    assert {stream.exact for stream in streams} == {not fast}


def test_several_checkpoints_make_a_curve_for_each_folder(pictures, tmp_path, monkeypatch, capsys):
    checkpoints = [
        save_checkpoint(tiny_model("convvc"), tmp_path / f"{name}.pth.tar", "convvc")
        for name in "ab"
    ]
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(pictures / "test" / "b.png", other)
    folder = tmp_path / "curves"
    argv = ["--checkpoint", *checkpoints, "--data", pictures, other, "--json", folder]
    code, out, _ = run(argv, monkeypatch, capsys)
    assert code == 0
    assert sorted(file.name for file in folder.iterdir()) == [f"{pictures.name}.json", "other.json"]
    for file, data in ((f"{pictures.name}.json", pictures), ("other.json", other)):
        curve = json.loads((folder / file).read_text())
        for i, checkpoint in enumerate(checkpoints):
            alone = tmp_path / "alone.json"
            run(["--checkpoint", checkpoint, "--data", data, "--json", alone], monkeypatch, capsys)
            point = json.loads(alone.read_text())
            for key in ("bpp", "psnr-rgb", "ms-ssim-rgb"):
                if key in point["results"]:  # the picture of the other is too small for MS-SSIM
                    assert curve["results"][key][i] == point["results"][key][0]
            rows = [row for row in curve["images"] if row["checkpoint"] == checkpoint]
            assert [row["bpp"] for row in rows] == [row["bpp"] for row in point["images"]]
        assert load_curve(str(folder / file)).bpp.tolist() == sorted(curve["results"]["bpp"])
    assert [line for line in out.splitlines() if " on " in line] == [
        f"{checkpoint} on {data}"
        for checkpoint in checkpoints
        for data in (pictures / "test", other)
    ]


def test_long_evaluations_say_where_they_are(pictures, tmp_path, monkeypatch, capsys):
    """In lines where there is no terminal, in a bar on one; standard output is the same."""
    checkpoint = save_checkpoint(tiny_model("convvc"), tmp_path / "a.pth.tar", "convvc")
    argv = ["--checkpoint", checkpoint, "--estimate", "--data", pictures]
    _, plain, errors = run(argv, monkeypatch, capsys)
    assert errors == ""
    monkeypatch.setattr(utils, "SECONDS_BETWEEN_LINES", 0)
    _, out, errors = run(argv, monkeypatch, capsys)
    assert without_times(out) == without_times(plain)
    assert re.fullmatch(r"a\.png: 1 of 2 pictures, \S+ a second, \d\d:\d\d left\n", errors)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(pictures / "test" / "b.png", other)
    with Terminal() as terminal:
        _, out, _ = run(argv, monkeypatch, capsys)
        run([*argv, other], monkeypatch, capsys)
    assert without_times(out) == without_times(plain)
    assert "\ra.png:   0%" in terminal.written
    assert "\rrun 2 of 2, b.png:   0%" in terminal.written
    assert screen(terminal.written) == []


def without_times(table):
    return re.sub(r" +\d+\.\d{3}$", "", table, flags=re.MULTILINE)


def test_a_run_that_ends_early_keeps_the_curves_so_far(pictures, tmp_path, monkeypatch, capsys):
    files = [tmp_path / f"{name}.pth.tar" for name in "ab"]
    argv = ["--checkpoint", *files, "--data", pictures, "--json", tmp_path / "curve.json"]
    for file in files:
        save_checkpoint(tiny_model("convvc"), file, "convvc")
    evaluate, calls = evaluation.evaluate, []

    def evaluate_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise DataError("no more")
        return evaluate(*args)

    monkeypatch.setattr(evaluation, "evaluate", evaluate_once)
    code, _, err = run(argv, monkeypatch, capsys)
    assert code == 1 and "no more" in err
    assert len(json.loads((tmp_path / "curve.json").read_text())["results"]["bpp"]) == 1


def test_checkpoints_that_cannot_be_used_end_a_run_at_once(pictures, tmp_path, monkeypatch, capsys):
    good = save_checkpoint(tiny_model("convvc"), tmp_path / "good.pth.tar", "convvc")
    every_rate = save_checkpoint(gained_model(), tmp_path / "rates.pth.tar")
    (tmp_path / "bad.pth.tar").write_bytes(b"")
    for bad in (every_rate, tmp_path / "bad.pth.tar"):
        argv = ["--checkpoint", good, bad, "--data", pictures]
        code, out, err = run(argv, monkeypatch, capsys)
        assert (code, out) == (2, "") and str(bad) in err


def test_curves_of_runs_are_told_apart(pictures, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "0.013"
    folder.mkdir(parents=True)
    checkpoint = save_checkpoint(tiny_model("convvc"), folder / "checkpoint_best.pth.tar", "convvc")
    argv = ["--checkpoint", checkpoint, "--data", pictures, "--json", tmp_path / "x.json"]
    assert run(argv, monkeypatch, capsys)[0] == 0
    assert json.loads((tmp_path / "x.json").read_text())["name"] == "runs/0.013"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{data}", "{data}", "--json", "{out}"], "two folders of --data would be"),
        (["--data", "{data}", "{data}", "--save-images", "{out}"], "one checkpoint and one folder"),
    ],
    ids=["names", "images"],
)
def test_several_folders_that_cannot_be_are_one_line(
    flags, message, pictures, tmp_path, monkeypatch, capsys
):
    flags = [flag.format(data=pictures, out=tmp_path / "out") for flag in flags]
    code, out, err = run(["--checkpoint", CHECKPOINT, *flags], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("flags", [[], ["--precision", "bfloat16"]], ids=["default", "bfloat16"])
def test_results_say_the_precision_that_they_were_made_with(
    flags, pictures, tmp_path, monkeypatch, capsys
):
    """The estimate, whose picture the decoded one has to be, is of the same precision."""
    precisions = []

    class Watched(Coder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model.register_forward_pre_hook(
                lambda _, args, kwargs: precisions.append(kwargs["precision"]), with_kwargs=True
            )
            precisions.append(self.precision)

    monkeypatch.setattr(models, "Coder", Watched)
    file = tmp_path / "results.json"
    argv = ["--data", pictures, "--checkpoint", CHECKPOINT, "--json", file, *flags]
    assert run(argv, monkeypatch, capsys)[0] == 0
    wanted = "bfloat16" if flags else "float32"
    assert json.loads(file.read_text())["config"] == {"precision": wanted}
    assert len(precisions) == 1 + 3  # the first picture is coded twice
    assert set(precisions) == {getattr(torch, wanted)}


@pytest.fixture(scope="module")
def every_rate(tmp_path_factory):
    """Checkpoint of a network of every rate."""
    folder = tmp_path_factory.mktemp("every_rate")
    return save_checkpoint(gained_model(), folder / "gained.pth.tar")


@pytest.mark.parametrize("mode", [[], ["--estimate"]], ids=["real", "estimate"])
def test_qualities_give_one_curve(mode, every_rate, pictures, tmp_path, monkeypatch, capsys):
    file = tmp_path / "curve.json"
    argv = ["--data", pictures, "--checkpoint", every_rate, "--json", file, *mode]
    code, out, _ = run([*argv, "--qualities", 90, 10, 40.004, 40], monkeypatch, capsys)
    assert code == 0
    result = json.loads(file.read_text())
    assert result["description"].partition(", ")[2].startswith("2 pictures")
    curve = result["results"]
    assert curve["quality"] == [10, 40, 90], "in order, each once"
    assert {len(values) for values in curve.values()} == {3}
    assert [(row["name"], row["quality"]) for row in result["images"]] == [
        (name, quality) for name in ("a.png", "b.png") for quality in (10, 40, 90)
    ]
    assert curve["bpp"] == sorted({*curve["bpp"]})
    for i, quality in enumerate(curve["quality"]):
        rows = [row for row in result["images"] if row["quality"] == quality]
        assert curve["bpp"][i] == pytest.approx(sum(row["bpp"] for row in rows) / 2)
        assert curve["ms-ssim-rgb"][i] == rows[0]["ms-ssim-rgb"]
        assert re.search(rf"^quality {quality:g}, lambda 0\.\d{{4}}$", out, re.MULTILINE)
    assert out.count("skipped for 1 of 2: b.png") == 1
    assert load_curve(str(file)).bpp.tolist() == curve["bpp"]


def test_quality_of_an_evaluation_is_that_of_the_codec(every_rate):
    coder = Coder(load_model(every_rate))
    x = torch.rand(1, 3, 40, 33)
    row, x_hat = evaluation.evaluate_image(coder, x, False, 61.5)
    data = coder.encode(x, 61.5)
    assert (row["bpp"], row["quality"]) == (8 * len(data) / (40 * 33), 61.5)
    assert torch.equal(x_hat, coder.decode(data))


def test_pictures_that_a_higher_quality_does_not_help_are_named():
    def rows(*values):
        return [
            {"name": name, "bpp": bpp, "psnr-rgb": psnr}
            for name, (bpp, psnr) in zip("abc", values, strict=True)
        ]

    low = rows((1, 30), (1, 30), (1, 30))
    assert evaluation.not_rising([low, rows((2, 31), (1, 31), (2, 30))]) == ["b", "c"]
    assert evaluation.not_rising([low, rows((2, 31), (2, 31), (2, 31))]) == []
    assert evaluation.not_rising([low]) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "is a network of every rate; give --qualities"),
        (["--qualities", "101"], "at most 100, got '101'"),
        (["--qualities", "1", "2", "--save-images", "x"], "pictures of one quality; give one"),
    ],
    ids=str,
)
def test_qualities_that_cannot_be_are_one_line(
    flags, message, every_rate, pictures, monkeypatch, capsys
):
    argv = ["--data", pictures, "--checkpoint", every_rate, *flags]
    code, out, err = run(argv, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize("change", [lambda x: x.flip(-1), lambda x: x + 0.003], ids=["flip", "add"])
def test_a_stream_that_decodes_to_another_picture_is_an_error(
    change, pictures, monkeypatch, capsys
):
    """Also where hardly anybody would see it: 0.003 are 0.8 grey levels, a tenth of a dB."""
    decode = Coder.decode
    monkeypatch.setattr(Coder, "decode", lambda *args: change(decode(*args)))
    argv = ["--data", pictures, "--checkpoint", CHECKPOINT]
    code, _, err = run(argv, monkeypatch, capsys)
    assert code == 1
    assert "a.png" in err
    assert "does not decode to what was encoded" in err


@pytest.mark.parametrize(("precision", "expected"), [("float32", 1), ("bfloat16", 0)])
def test_latents_of_fewer_bits_may_decode_to_a_little_less(
    precision, expected, pictures, tmp_path, monkeypatch, capsys
):
    """0.017 dB, as where some are rounded to neighbours: in float32 that is an error."""
    shutil.copy(pictures / "test" / "a.png", tmp_path)
    decode = Coder.decode

    def darker(*args):
        x_hat = decode(*args)
        x_hat[..., :12] -= 1 / 255
        return x_hat

    monkeypatch.setattr(Coder, "decode", darker)
    argv = ["--data", tmp_path, "--checkpoint", CHECKPOINT, "--precision", precision]
    code, _, err = run(argv, monkeypatch, capsys)
    assert code == expected, err


def test_rate_above_the_estimate_is_warned_of(pictures, tmp_path, monkeypatch, capsys):
    """As that of b.png is, whose header weighs; estimates are not above themselves."""
    shutil.copy(pictures / "test" / "b.png", tmp_path)
    argv = ["--data", tmp_path, "--checkpoint", CHECKPOINT]
    _, out, _ = run(argv, monkeypatch, capsys)
    # 0.291 and 0.134 bits per pixel; a byte more or less is 2 %.
    assert re.search(r"warning: real bpp is 1[12]\d\.\d% above the estimate", out)
    _, out, _ = run([*argv, "--estimate"], monkeypatch, capsys)
    assert "warning" not in out


def test_files_that_cannot_be_read_are_skipped_named_and_counted(
    pictures, tmp_path, monkeypatch, capsys
):
    data, file = tmp_path / "data", tmp_path / "results.json"
    shutil.copytree(pictures / "test", data)
    (data / "0.png").write_text("no picture")
    (data / "0.pdf").write_text("no picture and not named like one")
    Image.new("L", (65_600, 1)).save(data / "c.png")
    argv = ["--data", data, "--checkpoint", CHECKPOINT, "--json", file]
    code, out, err = run(argv, monkeypatch, capsys)
    assert code == 0
    assert f"skipped: cannot read {data / '0.png'} as a picture" in err
    assert f"skipped: {data / 'c.png'}: a picture of 65600x1 pixels is outside the limits" in err
    assert "warning: 2 of 4 files could not be read" in out
    assert "0.png, c.png" in out
    results = json.loads(file.read_text())
    assert [row["name"] for row in results["images"]] == ["a.png", "b.png"]
    assert results["skipped"] == ["0.png", "c.png"]
    assert "2 pictures" in results["description"]


@pytest.mark.parametrize("place", ["{data}/test", "{link}", "{other}"])
def test_originals_are_never_overwritten(place, pictures, tmp_path, monkeypatch, capsys):
    """Nor are reconstructions put among them, nor written over what their links lead to."""
    data, other, link = tmp_path / "test", tmp_path / "other", tmp_path / "link"
    shutil.copytree(pictures / "test", data)
    link.symlink_to("test")
    other.mkdir()
    (data / "a.png").rename(data / "a.bmp")
    (data / "b.png").rename(other / "b.png")
    (data / "b.bmp").symlink_to(other / "b.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    folder = place.format(data=tmp_path, link=link, other=other)
    argv = ["--data", tmp_path, "--checkpoint", CHECKPOINT, "--save-images", folder]
    code, out, err = run(argv, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert "would write over the pictures that are evaluated, or among them" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_longest_names_are_saved(pictures, tmp_path, monkeypatch, capsys):
    name = f"{'n' * 251}.png"
    (tmp_path / "data").mkdir()
    shutil.copy(pictures / "test" / "b.png", tmp_path / "data" / name)
    argv = ["--data", tmp_path / "data", "--checkpoint", CHECKPOINT, "--estimate"]
    assert run([*argv, "--save-images", tmp_path], monkeypatch, capsys)[0] == 0
    assert Image.open(tmp_path / name).size == (40, 33)


def test_identical_pictures_give_json_that_every_reader_takes(tmp_path, monkeypatch, capsys):
    """Their PSNR is infinite, which JSON cannot say."""
    model = tiny_model()
    with torch.no_grad():
        model.g_s[-1].weight.zero_()
        model.g_s[-1].bias.fill_(0.2)
    checkpoint = save_checkpoint(model, tmp_path / "grey.pth.tar")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16), (51, 51, 51)).save(tmp_path / "data" / "a.png")
    argv = ["--data", tmp_path / "data", "--checkpoint", checkpoint, "--json", tmp_path / "r.json"]
    code, out, err = run(argv, monkeypatch, capsys)
    assert code == 0, err
    assert "inf" in out

    def refuse(constant):
        raise ValueError(constant)

    result = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert result["results"]["psnr-rgb"] == [None]
    assert result["images"][0]["psnr-rgb"] is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is full")
@pytest.mark.parametrize("file", ["results.json", "/dev/full"])
def test_full_disk_is_one_line_and_takes_no_more_than_it_must(file, pictures, tmp_path):
    """Where only the table cannot be written, the results are there."""
    checkpoint = save_checkpoint(tiny_model(), tmp_path / "tiny.pth.tar")
    argv = ["--data", pictures, "--checkpoint", checkpoint, "--estimate", "--json", tmp_path / file]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "eval.py", *argv], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert (
        b"eval.py: error: cannot write: No space left on device; " in done.stderr.splitlines()[-1]
    )
    assert b"Traceback" not in done.stderr
    if file == "results.json":
        assert len(json.loads((tmp_path / file).read_text())["images"]) == 2


def test_network_that_estimates_infinity_is_refused():
    """Which, clamped to white, would have a PSNR."""
    model = tiny_model()
    model.g_s.append(torch.nn.Threshold(1e9, torch.inf))
    with pytest.raises(utils.DataError, match="the network's picture is not finite"):
        evaluation.evaluate_image(Coder(model), torch.rand(1, 3, 20, 30), estimate=True)


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "a.png").write_text("no picture")
    (folder / "text.pth.tar").write_text("no checkpoint")
    tiny = tiny_model()
    model_args = {**tiny.config, "N": 16}
    torch.save(
        {"model": "mambavc", "model_args": model_args, "state_dict": tiny.state_dict()},
        folder / "wrong.pth.tar",
    )
    torch.save({"model": tiny.state_dict()}, folder / "foreign.pth.tar")
    torch.save({"model_args": model_args, "model": "mambavc"}, folder / "no_weights.pth.tar")
    for part in ("g_s", "g_a", "h_scale_s"):
        broken = copy.deepcopy(tiny)
        with torch.no_grad():
            broken.get_submodule(part)[-1].weight.fill_(3e38)  # finite, but its sums are not
        save_checkpoint(broken, folder / f"huge_{part}.pth.tar")
        with torch.no_grad():
            broken.get_submodule(part)[-1].bias.fill_(torch.nan)
        save_checkpoint(broken, folder / f"nan_{part}.pth.tar")
    tables = copy.deepcopy(tiny)
    tables.gaussian_conditional._quantized_cdf = tables.gaussian_conditional._quantized_cdf[0]
    save_checkpoint(tables, folder / "flat.pth.tar")
    tables = copy.deepcopy(tiny)
    tables.gaussian_conditional._offset = tables.gaussian_conditional._offset[:0]
    save_checkpoint(tables, folder / "half.pth.tar")
    (folder / "twins").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(folder / "twins" / name)
    return folder


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--data", "{data}", "--checkpoint", "nowhere"], 2, "checkpoint nowhere does not exist"),
        (["--data", "{bad}/text", "--checkpoint", "{bad}/text.pth.tar"], 2, "cannot load"),
        (["--data", "{data}", "--checkpoint", "{bad}/wrong.pth.tar"], 2, "model_args: N is 16"),
        (["--data", "{data}", "--checkpoint", "{bad}/foreign.pth.tar"], 2, "not a state dict of"),
        (["--data", "{data}", "--checkpoint", "{bad}/no_weights.pth.tar"], 2, "lacks 'state_dict'"),
        (["--data", "{bad}/none", "--checkpoint", CHECKPOINT], 2, "is not a folder"),
        (["--data", "{bad}/empty", "--checkpoint", CHECKPOINT], 2, "no images in"),
        (["--data", "{bad}/text", "--checkpoint", CHECKPOINT], 1, "a.png"),
        (
            ["--data", "{data}", "--checkpoint", CHECKPOINT, "--json", "{bad}/no/r.json"],
            2,
            "does not exist; create it",
        ),
        (
            ["--data", "{data}", "--checkpoint", CHECKPOINT, "--json", "{bad}"],
            2,
            "it is a folder; give the name of a file",
        ),
        (
            ["--data", "{bad}/twins", "--checkpoint", CHECKPOINT, "--save-images", "{bad}/out"],
            2,
            "has several of a; rename them",
        ),
        (["--data", "{data}", "--checkpoint", CHECKPOINT, "--lambda", "1"], 2, "--lambda"),
        (
            ["--data", "{data}", "--checkpoint", CHECKPOINT, "--qualities", "1"],
            2,
            "of a single rate; leave out --qualities",
        ),
        (["--data", "{data}", "--checkpoint", "{bad}/nan_g_s.pth.tar"], 2, "nan_g_s.pth.tar"),
        (["--data", "{data}", "--checkpoint", "{bad}/flat.pth.tar"], 2, "flat.pth.tar"),
        (["--data", "{data}", "--checkpoint", "{bad}/half.pth.tar"], 2, "half.pth.tar"),
        (["--data", "{data}", "--checkpoint", "{bad}/huge_g_s.pth.tar"], 1, "a.png: the network"),
        (["--data", "{data}", "--checkpoint", "{bad}/huge_g_a.pth.tar"], 1, "a.png: the network"),
        (
            ["--data", "{data}", "--checkpoint", "{bad}/huge_h_scale_s.pth.tar", "--estimate"],
            1,
            "a.png: the network",
        ),
    ],
)
def test_bad_input_is_one_line(argv, code, message, pictures, bad_files, monkeypatch, capsys):
    argv = [word.format(data=pictures, bad=bad_files) for word in argv]
    actual, out, err = run(argv, monkeypatch, capsys)
    assert actual == code
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_says_so(pictures, monkeypatch, capsys):
    argv = ["--data", pictures, "--checkpoint", CHECKPOINT, "--cuda"]
    code, _, err = run(argv, monkeypatch, capsys)
    assert code == 2
    assert "--cuda was given but PyTorch sees no GPU" in err


@pytest.mark.parametrize("name", ["fastest", "triton"])
def test_scan_backend_that_cannot_run_is_a_usage_error(pictures, monkeypatch, capsys, name):
    monkeypatch.setenv("MAMBAVC_SCAN_BACKEND", name)
    argv = ["--data", pictures, "--checkpoint", CHECKPOINT]
    code, _, err = run(argv, monkeypatch, capsys)
    assert code == 2
    assert f"scan backend '{name}'" in err
    assert "a.png" not in err


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--data", "none"], 2),
        (["--data", "none", "--checkpoint", CHECKPOINT], 2),
        (["--data", "{data}", "--checkpoint", "none"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nothing_waits_for_pytorch_that_does_not_need_it(argv, code, pictures):
    argv = [word.format(data=pictures) for word in argv]
    program = """
import sys, eval as evaluation, utils
try:
    utils.run_main(evaluation.main)
finally:
    print("loaded", {"torch", "numpy", "compressai"} & {*sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith(b"loaded set()\n")
