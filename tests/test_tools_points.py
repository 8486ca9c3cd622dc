"""Points of result files side by side."""

import json
from pathlib import Path

import pytest

from tools import points
from utils import UsageError


def test_points_are_listed_with_what_was_measured(tmp_path, capsys):
    full = {"bpp": [0.5], "psnr-rgb": [33.25], "ms-ssim-rgb": [0.99],
            "encoding_time": [1.5], "decoding_time": [2.0]}  # fmt: skip
    for name, results in {"a": full, "b": {"bpp": [0.25], "psnr-rgb": [30]}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "results": results}))
    points.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    header, a, b = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "file bpp PSNR dB MS-SSIM dB encode s decode s"
    assert a.split() == ["a", "0.500", "33.250", "20.000", "1.500", "2.000"]
    assert b.split() == ["b", "0.250", "30.000"]


def test_points_of_a_curve_are_listed_one_below_the_other(tmp_path, capsys):
    results = {"quality": [12.5, 70], "bpp": [0.25, 0.5], "psnr-rgb": [30, 33]}
    (tmp_path / "a.json").write_text(json.dumps({"results": results}))
    points.main([str(tmp_path / "a.json")])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["a", "at", "12.5", "0.250", "30.000"],
        ["a", "at", "70", "0.500", "33.000"],
    ]


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UsageError, match=r"x\.json is not a file that eval\.py"):
        points.main([str(tmp_path / "x.json")])
    with pytest.raises(UsageError, match=r"cannot read .*missing\.json: No such file"):
        points.main([str(tmp_path / "missing.json")])


@pytest.mark.parametrize(
    "file", ["bench-jpeg", "eval_model-hyperprior", "eval_model-mambavc-light"]
)
def test_files_of_compressai_are_listed(file, capsys):
    """All their points; the files are as compressai.utils.bench and .eval_model wrote them."""
    path = Path(__file__).parent / "assets" / "compressai" / f"{file}.json"
    points.main([str(path)])
    _, *lines = capsys.readouterr().out.splitlines()
    results = json.loads(path.read_text())["results"]
    assert [line.split()[:3] for line in lines] == [
        [file, f"{bpp:.3f}", f"{psnr:.3f}"]
        for bpp, psnr in zip(results["bpp"], results["psnr-rgb"], strict=True)
    ]
