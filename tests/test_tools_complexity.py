"""Counted operations against closed formulas and PyTorch's counter; the program."""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, save_checkpoint, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
from layers import SS2D, VSSBlock
from models.variants import HEAD_DIM
from tools import complexity, networks
from utils import UsageError

ROOT = Path(complexity.__file__).parent.parent
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
    config = models.build_model("mambavc", **TINY).config
    M, W, T = config["M"], config["context_width"], config["transform_width"]
    S = M // config["num_slices"]
    expected = 0
    for i in range(config["num_slices"]):
        width = M + S * min(i, config["max_support_slices"])
        unit = W * W // 2 + 9 * W * W // 4 + W // 2 * W  # 1x1, 3x3, 1x1 at half the width
        swin = 2 * (12 * W * W + 2 * 64 * W)
        attention = width * W + swin + 6 * unit + W * W + W * width
        expected += 2 * attention + 2 * 9 * (width * T + T * W + W * S)
        expected += 9 * ((width + S) * T + T * W + W * S)
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
    L1, L2, L3, L4 = TINY["depths"]
    # Side and blocks of the maps: g_a and g_s have three of them, the hyperprior's three parts one.
    maps = [(64, 2 * L1), (32, 2 * L2), (16, 2 * L3), (4, 3 * L4)]
    C = 2 * TINY["N"]
    assert scan["macs"] == sum(count * scan_macs(side**2, C) for side, count in maps)
    # Two FLOPs for each, three more per state, and bias, softplus and delta x.
    channels = sum(count * 4 * side**2 * 2 * C for side, count in maps)
    assert scan["flops"] == 2 * scan["macs"] + channels * (3 * 16 + 3)
    assert counted("convvc", 128, 128)["scan"]["macs"] == 0


def test_parts_sum_to_the_total():
    own = counted("swinvc", 128, 128)
    for key in ("parameters", "macs", "flops"):
        assert sum(part[key] for part in own["parts"].values()) == own[key]
    assert all(part["parameters"] > 0 for part in own["parts"].values())


def test_the_command_counts_the_full_networks_at_512x768(capsys):
    """The paper's ratios follow: -44 % against the CNN, -23 % against the Swin variant."""
    complexity.main([])
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "mambavc 512x768: 446.7 GMACs, 960.2 GFLOPs, 53.30 M parameters, "
        "scan included (60.7 GMACs)",
        "convvc 512x768: 799.2 GMACs, 1599.0 GFLOPs, 72.90 M parameters; mambavc -44.1 % MACs",
        "swinvc 512x768: 581.3 GMACs, 1165.3 GFLOPs, 60.46 M parameters; mambavc -23.2 % MACs",
    ]


def test_layers_alone_have_the_number_that_other_papers_list():
    """47.88 M: convolutions, linear layers and norms, without parameters that are in no layer."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.LayerNorm)
    model = models.build_model("mambavc")
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == 47_879_523
    scans = [module for module in model.modules() if isinstance(module, SS2D)]
    assert sum(p.numel() for scan in scans for p in scan.scan_parameters()) == 5_373_952
    assert sum(p.numel() for p in model.parameters()) == 53_301_187


def test_the_kept_counts_are_those_of_the_code():
    kept = json.loads((ROOT / "results" / "complexity.json").read_text())["rows"]
    (row,) = (r for r in kept if (r["model"], r["height"], r["width"]) == ("mambavc", 512, 768))
    own = complexity.count(models.build_model("mambavc"), 512, 768)
    assert {key: row[key] for key in own} == own


def test_a_picture_counts_as_what_it_is_padded_to():
    assert counted("convvc", 65, 1) == counted("convvc", 128, 64)


def test_counting_leaves_model_and_functions_as_they_were():
    model = models.build_model("mambavc", **TINY).train()
    linear, keys = F.linear, set(vars(model.g_a[0]))
    complexity.count(model, 128, 128)
    assert F.linear is linear
    assert model.training
    assert set(vars(model.g_a[0])) == keys
    assert isinstance(model.g_a[1], VSSBlock)
    model.eval().update()
    assert torch.isfinite(model(torch.rand(1, 3, 128, 128))["x_hat"]).all()
    assert model.decompress(**model.compress(torch.rand(1, 3, 128, 128)))["x_hat"].isfinite().all()


def test_program_writes_what_it_prints(tmp_path, capsys):
    file = tmp_path / "complexity.json"
    complexity.main(
        ["--models", "convvc", "mambavc", "--N", "8", "--M", "20", "--size", "64", "64",
         "--json", str(file)]
    )  # fmt: skip
    first, second = json.loads(file.read_text())["rows"]
    assert (first["model"], first["height"], first["width"]) == ("convvc", 64, 64)
    for row, printed in zip(
        (first, second), capsys.readouterr().out.splitlines()[-2:], strict=True
    ):
        assert printed.startswith(f"{row['model']} 64x64: {row['macs'] / 1e9:.1f} GMACs, ")
        assert f"{row['flops'] / 1e9:.1f} GFLOPs, {row['parameters'] / 1e6:.2f} M" in printed
    assert printed.endswith(f"convvc {100 * (first['macs'] / second['macs'] - 1):+.1f} % MACs")


def test_sweep_counts_every_size_up_to_4k(tmp_path):
    file = tmp_path / "complexity.json"
    complexity.main(["--models", "convvc", "--N", "8", "--M", "20", "--sweep", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    sizes = [(row["height"], row["width"]) for row in rows]
    assert sizes == [(256, 256), (512, 768), (1024, 1024), (1408, 2048), (2160, 3840)]
    # Convolutions cost the same for each pixel of what a picture is padded to.
    per_pixel = {
        row["macs"] / (64**2 * math.ceil(row["height"] / 64) * math.ceil(row["width"] / 64))
        for row in rows[:-1]
    }
    assert max(per_pixel) == pytest.approx(min(per_pixel))


def test_a_checkpoint_is_counted_as_its_network(tmp_path, capsys):
    save_checkpoint(tiny_model("convvc"), tmp_path / "mine.pth.tar", "convvc")
    complexity.main(["--models", str(tmp_path / "mine.pth.tar"), "--size", "128", "128"])
    gmacs = counted("convvc", 128, 128)["macs"] / 1e9
    assert f"mine.pth.tar 128x128: {gmacs:.1f} GMACs" in capsys.readouterr().out


def test_a_network_of_every_rate_is_counted_as_it_is_at_one(tmp_path):
    path = save_checkpoint(tiny_model("convvc", qualities=3), tmp_path / "every.pth.tar", "convvc")
    assert complexity.count(networks.build(path), 64, 64) == counted("convvc", 64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet"], "neither a network"),
        (["--models", "swinvc", "--N", "24"], "cannot build swinvc"),
        (["--models", "mambavc-light-0.0130", "--N", "24"], "for registered networks"),
        (["--size", "64", "64", "--sweep"], "not allowed with"),
        (["--json", "nowhere/x.json"], "does not exist"),
    ],
)
def test_bad_flags_are_one_line(arguments, message):
    with pytest.raises(UsageError, match=message):
        complexity.main(arguments)
    assert HEAD_DIM == 32  # so that N=24 does not fit it


def test_neither_transformers_nor_another_kernels_is_needed(tmp_path):
    """Where PyPI's `kernels` is installed, transformers takes our folder of that name for it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('the other kernels')\n")
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = (
        "import importlib.metadata, sys\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        "assert importlib.metadata.version('kernels') == '0.18.2'\n"
        "sys.modules['transformers'] = None\n"  # importing it fails
        "from tools import complexity\n"
        "import kernels\n"
        "assert 'calflops' not in sys.modules, 'a package without its contents is left behind'\n"
        "print(kernels.__file__)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == ROOT / "kernels"
