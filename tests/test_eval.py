"""Evaluation as a user runs it: tables, JSON, reconstructions, and what bad input gets."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image

import eval as evaluation
import models
import utils

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
    # Machines differ in the last bits of float32: see test_checkpoint.py.
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


def test_a_stream_that_decodes_to_another_picture_is_an_error(pictures, monkeypatch, capsys):
    decode = models.Coder.decode
    monkeypatch.setattr(models.Coder, "decode", lambda self, data: decode(self, data).flip(-1))
    argv = ["--data", pictures, "--checkpoint", CHECKPOINT]
    code, _, err = run(argv, monkeypatch, capsys)
    assert code == 1
    assert "a.png" in err
    assert "does not decode to what was encoded" in err


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "a.png").write_text("no picture")
    (folder / "text.pth.tar").write_text("no checkpoint")
    tiny = models.build_model("mambavc", **TINY)
    model_args = {**tiny.config, "N": 16}
    torch.save(
        {"model": "mambavc", "model_args": model_args, "state_dict": tiny.state_dict()},
        folder / "wrong.pth.tar",
    )
    torch.save({"model": tiny.state_dict()}, folder / "foreign.pth.tar")
    torch.save({"model_args": model_args, "model": "mambavc"}, folder / "no_weights.pth.tar")
    (folder / "twins").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(folder / "twins" / name)
    return folder


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--data", "{data}", "--checkpoint", "nowhere"], 2, "checkpoint nowhere does not exist"),
        (["--data", "{bad}/text", "--checkpoint", "{bad}/text.pth.tar"], 2, "cannot load"),
        (["--data", "{data}", "--checkpoint", "{bad}/wrong.pth.tar"], 2, "does not fit model_args"),
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
