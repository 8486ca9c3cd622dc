"""Counted operations against closed formulas and PyTorch's counter; measurements; the script."""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
from layers import VSSBlock
from models.variants import HEAD_DIM
from tools import complexity
from utils import UsageError

TINY = {
    "N": 16,
    "M": 16,
    "depths": (1, 2, 1, 1),
    "num_slices": 2,
    "Z": 8,
    "context_width": 16,
    "transform_width": 16,
}
ALL = ["mambavc", "convvc", "swinvc"]


@functools.cache
def counted(name, height, width):
    """Operations of a tiny network."""
    return complexity.count(models.build_model(name, **TINY), height, width)


def scan_macs(pixels, C):
    """Four directions of 2C channels: delta from its low rank, 16 states in and out, and D x."""
    return 4 * pixels * 2 * C * (math.ceil(C / 16) + 2 * 16 + 1)


def block_macs(name, C, height, width):
    """Multiply-accumulates of one block on a (C, height, width) map, from its definition."""
    pixels = height * width
    if name == "convvc":
        return pixels * 2 * 9 * C * C
    if name == "swinvc":
        padded = math.ceil(height / 8) * math.ceil(width / 8) * 64
        # q, k, v and output projection on the padded map, both products of 64x64 windows, MLP.
        return padded * 4 * C * C + padded * 2 * 64 * C + pixels * 8 * C * C
    rank = math.ceil(C / 16)
    projections = C * 4 * C + 9 * 2 * C + 2 * C * 4 * (rank + 32) + 2 * C * C
    return pixels * projections + scan_macs(pixels, C)


def transform_macs(name, config, height, width):
    """Multiply-accumulates of g_a, g_s, h_a and of both h_s."""
    C, M, Z = 2 * config["N"], config["M"], config["Z"]
    L1, L2, L3, L4 = config["depths"]

    def blocks(count, scale):
        return count * block_macs(name, C, height // scale, width // scale)

    def at(scale):
        return height * width // scale**2

    stages = blocks(L1, 2) + blocks(L2, 4) + blocks(L3, 8)
    ends = at(2) * 25 * 3 * C + at(4) * 9 * C * C + at(8) * 9 * C * C
    g_a = stages + ends + at(16) * 9 * C * M
    # A transposed convolution costs its input's pixels, which are its output's in g_a.
    g_s = g_a
    h_a = at(32) * 9 * M * C + blocks(L4, 32) + at(64) * 9 * C * Z
    h_s = 2 * (at(64) * 9 * Z * C + blocks(L4, 32) + at(32) * 9 * C * M)
    return {"g_a": g_a, "g_s": g_s, "h_a": h_a, "h_s": h_s}


@pytest.mark.parametrize("size", [(256, 128), (128, 192)])
@pytest.mark.parametrize("name", ALL)
def test_transforms_have_the_macs_of_the_closed_formula(name, size):
    """128x192 has maps that are not whole windows."""
    parts = counted(name, *size)["parts"]
    macs = {part: parts[part]["macs"] for part in ("g_a", "g_s", "h_a", "h_s")}
    assert macs == transform_macs(name, TINY, *size)


def test_context_has_the_macs_of_the_closed_formula():
    M, W, T = 16, 16, 16
    expected = 0
    for i in range(2):
        width = M + 8 * i
        unit = W * W // 2 + 9 * W * W // 4 + W // 2 * W  # 1x1, 3x3, 1x1 at half the width
        swin = 2 * (12 * W * W + 2 * 64 * W)
        attention = width * W + swin + 6 * unit + W * W + W * width
        expected += 2 * attention + 2 * 9 * (width * T + T * W + W * 8)
        expected += 9 * ((width + 8) * T + T * W + W * 8)
    pixels = 128 * 128 // 16**2
    parts = counted("mambavc", 128, 128)["parts"]
    assert parts["context"]["macs"] == pixels * expected


@pytest.mark.parametrize("name", ALL)
def test_macs_are_those_of_pytorchs_counter(name):
    """It counts two FLOPs per multiply-accumulate and the scan by the operator's formula.

    The counter has no formula for the CPU's fused attention, but for the products it is made of.
    """
    model = models.build_model(name, **TINY).eval()
    own = counted(name, 128, 128)
    with (
        complexity.shapes_only(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(torch.empty(1, 3, 128, 128))
    scan = own["scan"]
    assert counter.get_total_flops() == 2 * (own["macs"] - scan["macs"]) + scan["flops"]


def test_scan_is_counted():
    scan = counted("mambavc", 128, 128)["scan"]
    maps = [(64, 2), (32, 4), (16, 2), (4, 3)]  # side, blocks; the hyperprior has three of them
    assert scan["macs"] == sum(count * scan_macs(side**2, 32) for side, count in maps)
    # Two FLOPs for each, three more per state, and bias, softplus and delta x.
    channels = sum(count * 4 * side**2 * 64 for side, count in maps)
    assert scan["flops"] == 2 * scan["macs"] + channels * (3 * 16 + 3)
    assert counted("convvc", 128, 128)["scan"]["macs"] == 0


def test_parts_sum_to_the_total():
    own = counted("swinvc", 128, 128)
    for key in ("parameters", "macs", "flops"):
        assert sum(part[key] for part in own["parts"].values()) == own[key]
    assert all(part["parameters"] > 0 for part in own["parts"].values())


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("mambavc", 53_301_187, 446_686_334_976),
        ("convvc", 72_896_451, 799_162_404_864),
        ("swinvc", 60_461_251, 581_301_866_496),
    ],
)
def test_totals_of_the_full_networks_at_512x768(name, parameters, macs):
    """The paper's ratios follow: -44 % against the CNN, -23 % against the Swin variant."""
    own = complexity.count(models.build_model(name), 512, 768)
    assert (own["parameters"], own["macs"]) == (parameters, macs)


def test_a_picture_counts_as_what_it_is_padded_to():
    assert counted("convvc", 65, 1) == counted("convvc", 128, 64)


def test_counting_leaves_model_and_functions_as_they_were():
    model = models.build_model("mambavc", **TINY).train()
    linear, keys = F.linear, set(vars(model.g_a[0]))
    complexity.count(model, 128, 128)  # shifted windows have masks, which are cached
    assert F.linear is linear
    assert model.training
    assert set(vars(model.g_a[0])) == keys
    assert isinstance(model.g_a[1], VSSBlock)
    model.eval().update()
    assert torch.isfinite(model(torch.rand(1, 3, 128, 128))["x_hat"]).all()
    assert model.decompress(**model.compress(torch.rand(1, 3, 128, 128)))["x_hat"].isfinite().all()


def test_every_operation_is_measured():
    model = models.build_model("convvc", **TINY)
    model.update()
    device = torch.device("cpu")
    results = complexity.measure_all(model, 64, 64, complexity.OPERATIONS, device, repeats=2)
    assert list(results) == list(complexity.OPERATIONS)
    for result in results.values():
        assert 0 < result["seconds_20"] <= result["seconds"] <= result["seconds_80"]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(
    not complexity.CLEAR_REFS.exists(), reason="peak memory is read from Linux's /proc"
)
def test_peak_memory_is_that_of_the_measured_function():
    """256 MiB that are held for a moment show up once, and are forgotten by the next."""
    size = 2**28
    device = torch.device("cpu")
    large = complexity.measure(lambda: torch.ones(size // 4).sum(), device, 1)["peak_bytes"]
    small = complexity.measure(lambda: None, device, 1)["peak_bytes"]
    assert large - small > 0.9 * size


def test_an_operation_that_does_not_fit_is_reported(monkeypatch):
    def too_large(model, name, x, run_stage):
        def run():
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run if name == "step" else lambda: None

    monkeypatch.setattr(complexity, "operation", too_large)
    model = models.build_model("convvc", **TINY)
    results = complexity.measure_all(model, 64, 64, ["step", "forward"], torch.device("cpu"), 1)
    assert results["step"] is None
    assert results["forward"] is not None
    row = {"model": "convvc", "height": 64, "width": 64, "measured": results}
    assert "out of memory" in complexity.format_measures([row])


def test_script_writes_what_it_prints(tmp_path, capsys):
    file = tmp_path / "complexity.json"
    complexity.main(
        ["--models", "convvc", "mambavc", "--N", "8", "--M", "20", "--size", "64", "64",
         "--measure", "forward", "--repeats", "1", "--json", str(file)]
    )  # fmt: skip
    content = json.loads(file.read_text())
    first, second = content["rows"]
    assert (first["model"], first["height"], first["width"]) == ("convvc", 64, 64)
    assert first["measured"]["forward"]["seconds"] > 0
    printed = capsys.readouterr().out
    assert f"| mambavc | 64x64 | {second['parameters'] / 1e6:.2f} M" in printed
    assert f"{100 * (first['macs'] / second['macs'] - 1):+.1f} %" in printed
    assert "MACs" in printed and "FLOPs" in printed


def test_sweep_is_drawn(tmp_path, capsys):
    picture = tmp_path / "sweep.png"
    sizes = ((64, 64), (128, 64), (512, 768))
    with mock.patch.object(complexity, "SWEEP", sizes):
        complexity.main(
            ["--models", "convvc", "--N", "8", "--M", "20", "--sweep", "--measure",
             "--plot", str(picture)]
        )  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet"], "neither a model"),
        (["--models", "swinvc", "--N", "24"], "cannot build swinvc"),
        (["--size", "64", "64", "--sweep"], "exclude each other"),
        (["--size", "64", "64", "--plot", "x.png"], "--plot draws"),
        (["--sweep", "--plot", "nowhere/x.png"], "does not exist"),
        (["--sweep", "--plot", "x.txt"], "ending must be one of"),
        (["--json", "nowhere/x.json"], "does not exist"),
    ],
)
def test_bad_flags_are_one_line(arguments, message):
    with pytest.raises(UsageError, match=message):
        complexity.main(arguments)
    assert HEAD_DIM == 32  # so that N=24 does not fit it


def test_a_distribution_named_kernels_is_no_obstacle(tmp_path):
    """With PyPI's `kernels` installed, calflops imports and `kernels` is still our folder."""
    root = Path(complexity.__file__).parent
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('the other kernels')\n")
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = (
        "import importlib.metadata, sys\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        "assert importlib.metadata.version('kernels') == '0.18.2'\n"
        "import complexity, kernels\n"
        "assert importlib.metadata.version('kernels') == '0.18.2'\n"
        "print(kernels.__file__)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == root / "kernels"


def test_imports_do_not_see_a_hidden_distribution():
    import importlib.metadata

    with complexity._without_distribution("numpy"):
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("numpy")
        assert importlib.metadata.version("torch")
    assert importlib.metadata.version("numpy")
