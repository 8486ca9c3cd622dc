"""What a network costs: parameters, operations by part, latency and memory on this machine.

One MAC is a multiplication whose product is added to a sum; one FLOP is a single multiplication,
addition or elementary function. A matrix product or a convolution has two FLOPs per MAC (plus one
per bias), elementwise functions have FLOPs only. calflops counts the layers; what it cannot see
is registered here: the selective scan by `scan_macs` and `scan_flops` of `kernels.scan_operator`, which say what
one step of it counts, and the two products of window attention.

Operations are those of one forward pass: every layer of encoder, entropy model and decoder once.
They are counted on shapes alone, so a 4K picture needs neither memory nor a GPU.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import models
import utils
from kernels.graphs import Replay
from kernels.scan_operator import scan_flops, scan_macs
from layers import SS2D, WindowAttention
from models import checkpoint as checkpoint_file
from tools.figures import scaling, style
from utils import ArgumentParser, UsageError

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
SWEEP = ((256, 256), (512, 768), (1024, 1024), (1408, 2048), (2160, 3840))
OPERATIONS = ("encode", "decode", "forward", "step")
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@contextlib.contextmanager
def _without_distribution(name: str) -> Iterator[None]:
    """Let no import see that a distribution is installed.

    Where PyPI's `kernels` is installed, transformers (which calflops imports) takes our folder of
    that name for it and fails on what it does not find there.
    """
    version = importlib.metadata.version

    def hidden(distribution: str) -> str:
        if distribution == name:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(distribution)

    with mock.patch.object(importlib.metadata, "version", hidden):
        yield


with _without_distribution("kernels"):
    from calflops.calculate_pipline import CalFlopsPipline
    from calflops.pytorch_ops import MODULE_HOOK_MAPPING
    from calflops.utils import get_module_flops, get_module_macs


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


MODULE_HOOK_MAPPING[SS2D] = _count_scan
MODULE_HOOK_MAPPING[WindowAttention] = _count_attention


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Let networks on the CPU run on tensors that have shapes and no data: nothing is computed."""
    # The compiled scan is one operator; the reference would be walked through step by step.
    backend = mock.patch.dict(os.environ, {"MAMBAVC_SCAN_BACKEND": "cpu"})
    with backend, torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
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
    counter = CalFlopsPipline(model, include_backPropagation=False, compute_bp_factor=2.0)
    counter.start_flops_calculate()
    try:
        with shapes_only():
            model(torch.empty(1, 3, height, width))
        total = _counts([model])
        parts = {
            part: _counts([getattr(model, name) for name in names]) for part, names in PARTS.items()
        }
        scans = [module for module in model.modules() if isinstance(module, SS2D)]
        scan = {
            "macs": sum(module.__macs__ for module in scans),
            "flops": sum(module.__flops__ for module in scans),
        }
    finally:
        counter.end_flops_calculate()
        model.train(was_training)
    parts["other"] = {
        key: value - sum(part[key] for part in parts.values()) for key, value in total.items()
    }
    return {**total, "parts": parts, "scan": scan}


def _counts(modules: Sequence[nn.Module]) -> dict[str, int]:
    return {
        "parameters": sum(p.numel() for module in modules for p in module.parameters()),
        "macs": sum(get_module_macs(module) for module in modules),
        "flops": sum(get_module_flops(module) for module in modules),
    }


def operation(
    model: models.SliceHyperprior, name: str, x: Tensor, graphs: bool = False
) -> Callable[[], object]:
    """A function that does one operation on pictures x: what `measure` runs.

    ``encode`` is `compress`, ``decode`` is `decompress` of what `compress` made of x (the
    network and the entropy coder), ``forward`` is the estimate without a gradient, ``step`` is
    forward and backward in training mode, without an optimiser. With ``graphs`` all but
    the last are replayed from CUDA graphs.
    """
    model.train(name == "step")
    if name == "step":

        def step() -> None:
            model.zero_grad(set_to_none=True)
            out = model(x)
            rate = -sum(likelihood.log2().sum() for likelihood in out["likelihoods"].values())
            (rate / x[:, 0].numel() + 0.01 * 255**2 * (out["x_hat"] - x).square().mean()).backward()

        return step
    if name == "forward":
        return torch.no_grad()(
            functools.partial(Replay(), model, x) if graphs else lambda: model(x)
        )
    coder = models.Coder(model, graphs=graphs)
    if name == "encode":
        return lambda: coder.compress(x)
    coded = coder.compress(x)
    return lambda: coder.decompress(**coded)


def measure(run: Callable[[], object], device: torch.device, repeats: int) -> dict:
    """Time and peak memory of a function, after one run to warm up.

    Returns:
        ``seconds``: median; ``seconds_20``, ``seconds_80``: percentiles; ``peak_bytes``: on a GPU
        the most memory PyTorch held at once, weights included; on the CPU the most resident memory
        of this process (None where Linux's /proc does not tell).
    """
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_peak_resident()
    seconds = []
    for _ in range(repeats):
        start = utils.clock(device)
        run()
        seconds.append(utils.clock(device) - start)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if repeats > 1 else []
    return {
        "seconds": statistics.median(seconds),
        "seconds_20": deciles[1] if deciles else seconds[0],
        "seconds_80": deciles[7] if deciles else seconds[0],
        "peak_bytes": (
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()
        ),
    }


def _reset_peak_resident() -> None:
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5")


def _peak_resident() -> int | None:
    """Most bytes this process has had in memory since the last reset."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


def measure_all(
    model: models.SliceHyperprior,
    height: int,
    width: int,
    names: Sequence[str],
    device: torch.device,
    repeats: int,
    batch_size: int = 1,
    cuda_graph: bool = False,
) -> dict[str, dict | None]:
    """`measure` for each operation; None for one that the GPU's memory does not hold.

    With ``cuda_graph`` all but ``step`` are timed as CUDA graphs, and their memory is not measured.
    """
    x = torch.rand(batch_size, 3, height, width, device=device)
    results: dict[str, dict | None] = {}
    for name in names:
        replayed = cuda_graph and name != "step"
        try:
            run = operation(model, name, x, replayed)
            if replayed:
                run()  # what `measure` warms up with is then the capture
            results[name] = measure(run, device, repeats)
            if replayed:
                results[name]["peak_bytes"] = None
        except torch.OutOfMemoryError:
            results[name] = None
        run = None  # lets go of its graphs
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def load(name: str, **sizes: int) -> tuple[str, models.SliceHyperprior]:
    """A model and its name, from the registry (fixed random weights) or from a checkpoint file.

    Raises:
        UsageError: there is neither.
    """
    if name in models.list_models():
        torch.manual_seed(0)
        try:
            model = models.build_model(name, **sizes)
        except ValueError as error:
            raise UsageError(f"cannot build {name}: {error}") from None
        return name, model
    try:
        path = checkpoint_file.find_checkpoint(name)
    except UsageError:
        raise UsageError(
            f"{name} is neither a model ({', '.join(models.list_models())}) nor a checkpoint file"
        ) from None
    if sizes:
        raise UsageError(
            f"--{next(iter(sizes))} does not change the sizes of a checkpoint; leave it out"
        )
    return path.name, checkpoint_file.load_model(path)


def device_name(device: torch.device) -> str:
    """What the device calls itself, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{utils.cpu_name()}, {torch.get_num_threads()} threads"


def format_counts(rows: Sequence[dict]) -> str:
    """Operations of the rows as a Markdown table, with the first model's MACs against each."""
    names = [*PARTS, "other"]
    header = ["model", "picture", "parameters", "MACs", "FLOPs", "first against it"]
    header += [f"{name} MACs" for name in names] + ["scan MACs"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    first: dict[tuple[int, int], int] = {}
    for row in rows:
        base = first.setdefault((row["height"], row["width"]), row["macs"])
        cells = [
            row["model"],
            f"{row['height']}x{row['width']}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs'] / 1e9:.1f} G",
            f"{row['flops'] / 1e9:.1f} G",
            f"{100 * (base / row['macs'] - 1):+.1f} %",
            *(f"{row['parts'][name]['macs'] / 1e9:.1f} G" for name in names),
            f"{row['scan']['macs'] / 1e9:.1f} G",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_measures(rows: Sequence[dict]) -> str:
    """Latency and memory of the rows as a Markdown table."""
    lines = [
        "| model | picture | operation | seconds (median) | 20 to 80 % | peak memory |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        for name, result in row["measured"].items():
            start = f"| {row['model']} | {row['height']}x{row['width']} | {name} |"
            if result is None:
                lines.append(f"{start} out of memory | | |")
                continue
            peak = result["peak_bytes"]
            lines.append(
                f"{start} {result['seconds']:.4f} | "
                f"{result['seconds_20']:.4f} to {result['seconds_80']:.4f} | "
                f"{'unknown' if peak is None else f'{peak / 2**30:.2f} GiB'} |"
            )
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Count a network's parameters and operations, and measure its latency and "
        "memory on this machine."
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["mambavc", "convvc", "swinvc"],
        metavar="MODEL",
        help="registered names or checkpoint files (default: %(default)s)",
    )
    parser.add_argument("--size", nargs=2, type=utils.positive_int, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument(
        "--sweep", action="store_true", help="sizes from 256x256 to 4K instead of --size"
    )
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="time all but step as CUDA graphs, without waiting for the host; no memory then",
    )
    parser.add_argument(
        "--measure",
        nargs="*",
        choices=OPERATIONS,
        default=["encode", "decode", "forward"],
        help="what to time; without a name: count only (default: encode decode forward)",
    )
    parser.add_argument("--repeats", type=utils.positive_int, default=5)
    parser.add_argument("--batch-size", type=utils.positive_int, default=1, help="when measuring")
    parser.add_argument("--N", type=utils.positive_int, help="override the models' N")
    parser.add_argument("--M", type=utils.positive_int, help="override the models' M")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all numbers here")
    args = parser.parse_args(argv)
    if args.cuda_graph and not args.cuda:
        raise UsageError("--cuda-graph needs --cuda; add it")
    if args.size and args.sweep:
        raise UsageError("--size and --sweep exclude each other; give one of them")
    if args.json is not None:
        utils.check_output(args.json)
    if args.plot is not None:
        style.check_output(args.plot)
        if not args.sweep and tuple(args.size or scaling.PARTS_SIZE) != scaling.PARTS_SIZE:
            raise UsageError("--plot draws a --sweep or the size 512 768; give one of these")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    device = utils.select_device(args.cuda)
    sizes = SWEEP if args.sweep else [tuple(args.size or (512, 768))]
    overrides = {key: getattr(args, key) for key in ("N", "M") if getattr(args, key) is not None}
    content = {
        "device": device_name(device) if args.measure else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if args.cuda else None,
        },
        "batch_size": args.batch_size,
        "cuda_graph": args.cuda_graph,
        "repeats": args.repeats,
        "rows": [],
    }
    rows = content["rows"]
    for source in args.models:
        name, model = load(source, **overrides)
        counts = [count(model, *size) for size in sizes]
        if args.measure:
            model.update()
        model.to(device)
        for (height, width), counted in zip(sizes, counts, strict=True):
            if args.measure:
                utils.logger.info("measuring %s at %dx%d", name, height, width)
            measured = measure_all(
                model,
                height,
                width,
                args.measure,
                device,
                args.repeats,
                args.batch_size,
                args.cuda_graph,
            )
            size = {"model": name, "height": height, "width": width}
            rows.append({**size, **counted, "measured": measured})
            if args.json is not None:  # each time: a sweep that is cut short keeps its numbers
                with utils.atomic_write(args.json) as temporary:
                    temporary.write_text(json.dumps(content, indent=1) + "\n")
        del model
    if args.plot is not None:
        scaling.draw(content, args.plot)
    print(format_counts(rows))
    if args.measure:
        print(f"\nOn {device_name(device)}, batch size {args.batch_size}:\n")
        print(format_measures(rows))


if __name__ == "__main__":
    utils.run_main(main)
