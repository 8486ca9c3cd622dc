"""Count a network's parameters and the operations of one forward pass, the selective scan included.

One MAC is a multiplication whose product is added to a sum; one FLOP is a single multiplication,
addition or elementary function. A matrix product or a convolution has two FLOPs per MAC (plus one
per bias), elementwise functions have FLOPs only. calflops counts the layers; what it cannot see is
registered with it here: the selective scan, by the formulas of `kernels.scan_operator`, and the two
products of window attention.

A forward pass runs every layer of encoder, entropy model and decoder once. Operations are counted
on shapes alone, so that a 4K picture needs neither its memory nor a GPU.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
import models
import utils
from kernels.scan_operator import scan_flops, scan_macs
from layers import SS2D, WindowAttention
from tools import networks

# The parts of the network that operations are reported for.
PARTS = {
    "g_a": ("g_a",),
    "g_s": ("g_s",),
    "h_a": ("h_a",),
    "h_s": ("h_mean_s", "h_scale_s"),
    "context": (
        "atten_mean",
        "atten_scale",
        "cc_mean_transforms",
        "cc_scale_transforms",
        "lrp_transforms",
    ),
}


def _import_calflops() -> tuple[type, dict[type, Callable]]:
    """calflops' counter and its table of modules that have a formula of their own.

    They are imported without the package's `__init__`, which imports transformers: that takes
    seconds, is not among calflops' requirements, and mistakes our folder `kernels` for the package
    of that name on PyPI where it is installed.
    """
    spec = importlib.util.find_spec("calflops")
    before = sys.modules.get("calflops")
    sys.modules["calflops"] = before or importlib.util.module_from_spec(spec)
    try:
        pipeline = importlib.import_module("calflops.calculate_pipline")
    finally:
        if before is None:
            del sys.modules["calflops"]  # whoever imports it gets all of it
    return pipeline.CalFlopsPipline, pipeline.MODULE_HOOK_MAPPING


_Counter, _formulas = _import_calflops()


def _count_scan(module: SS2D, inputs: tuple[Tensor], output: Tensor) -> None:
    batch, height, width, _ = inputs[0].shape
    dim, dstate = module.x_proj_weight.shape[-1], module.A_logs.shape[1]
    sizes = (batch, height, width, dim, dstate, module.dt_projs_weight.shape[-1])
    module.__macs__ += scan_macs(*sizes)
    module.__flops__ += scan_flops(*sizes)


def _count_attention(module: WindowAttention, inputs: tuple[Tensor], output: Tensor) -> None:
    batch, height, width, dim = inputs[0].shape
    side = module.window_size
    windows = batch * -(-height // side) * -(-width // side)
    pairs = windows * side**4
    module.__macs__ += 2 * pairs * dim
    # Both products, and the softmax of every head's scores.
    module.__flops__ += 4 * pairs * dim + pairs * module.num_heads


_formulas[SS2D] = _count_scan
_formulas[WindowAttention] = _count_attention


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Let networks on the CPU run on tensors that have shapes and no data: nothing is computed."""
    # The compiled scan is one operator; the reference would be walked through step by step.
    with kernels.use_backend("cpu"), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def count(model: models.SliceHyperprior, height: int, width: int) -> dict:
    """Parameters, MACs and FLOPs of one forward pass over a picture.

    Args:
        model: any network of `models`, on the CPU.
        height, width: of the picture, in pixels. The layers see it padded to multiples of 64.

    Returns:
        ``parameters``, ``macs``, ``flops``; ``parts``: the same three for each of `PARTS`, and
        "other" for what is in none of them; ``scan``: macs and flops of the selective scans,
        which are included in the parts.
    """
    was_training = model.training
    model.eval()
    counter = _Counter(model, include_backPropagation=False, compute_bp_factor=2.0)
    counter.start_flops_calculate()
    try:
        with shapes_only():
            model(torch.empty(1, 3, height, width))
        total = _sums([model])
        parts = {
            part: _sums([getattr(model, name) for name in names]) for part, names in PARTS.items()
        }
        scan = {
            key: sum(getattr(m, f"__{key}__") for m in model.modules() if isinstance(m, SS2D))
            for key in ("macs", "flops")
        }
    finally:
        counter.end_flops_calculate()
        model.train(was_training)
    parts["other"] = {
        key: value - sum(part[key] for part in parts.values()) for key, value in total.items()
    }
    return {**total, "parts": parts, "scan": scan}


def _sums(roots: Sequence[nn.Module]) -> dict[str, int]:
    modules = [module for root in roots for module in root.modules()]
    return {
        "parameters": sum(p.numel() for root in roots for p in root.parameters()),
        "macs": sum(module.__macs__ for module in modules),
        "flops": sum(module.__flops__ for module in modules),
    }


def format_parts(rows: Sequence[dict]) -> str:
    """GMACs of each part of the networks, and of the scans in them, as a table."""
    names = [*PARTS, "other"]
    lines = [f"{'GMACs by part':<28}" + "".join(f"{name:>9}" for name in [*names, "(scan)"])]
    for row in rows:
        values = [row["parts"][name]["macs"] for name in names] + [row["scan"]["macs"]]
        label = f"{row['model']} {row['height']}x{row['width']}"
        lines.append(f"{label:<28}" + "".join(f"{value / 1e9:9.1f}" for value in values))
    return "\n".join(lines)


def format_totals(rows: Sequence[dict]) -> str:
    """A line for each row, with the first network's MACs against the others'."""
    lines = []
    first: dict[tuple[int, int], dict] = {}
    for row in rows:
        line = (
            f"{row['model']} {row['height']}x{row['width']}: {row['macs'] / 1e9:.1f} GMACs, "
            f"{row['flops'] / 1e9:.1f} GFLOPs, {row['parameters'] / 1e6:.2f} M parameters"
        )
        if row["scan"]["macs"]:
            line += f", scan included ({row['scan']['macs'] / 1e9:.1f} GMACs)"
        base = first.setdefault((row["height"], row["width"]), row)
        if base is not row:
            line += f"; {base['model']} {100 * (base['macs'] / row['macs'] - 1):+.1f} % MACs"
        lines.append(line)
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        prog="python -m tools.complexity",
        description="Count parameters and operations of networks, on the CPU, by shapes alone.",
    )
    networks.add_flags(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    args = parser.parse_args(argv)
    if args.json is not None:
        utils.check_output(args.json)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    names, sizes = args.models or networks.PAPER, networks.sizes(args) or [(512, 768)]
    cases = (
        ({"model": Path(name).name, "height": height, "width": width}, model)
        for name in names
        for model in [networks.build(name, args.N, args.M)]
        for height, width in sizes
    )

    def label(case: tuple[dict, models.SliceHyperprior]) -> str:
        return "{model} {height}x{width}".format_map(case[0])

    with utils.progress(cases, len(names) * len(sizes), "count", label=label) as tracked:
        rows = [row | count(model, row["height"], row["width"]) for row, model in tracked]
    if args.json is not None:
        with utils.atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(f"{format_parts(rows)}\n\n{format_totals(rows)}")


if __name__ == "__main__":
    utils.run_main(main)
