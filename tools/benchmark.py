"""Time and memory of the scan, the SS2D block, the networks and the codec on this machine.

Every backend of the scan that can run here is measured side by side in one run, after a check
against the float64 reference; a backend that fails the check gets no times. Training, codec
and variants run on the first backend that passes. Random inputs; networks that are not
checkpoints have random weights, with A of the scans fixed at its first values.

Groups: operator (the scan), block (SS2D), network (forward passes by size and backend), training
(optimiser steps), codec (pictures to bytes and back), variants (passes, coding and steps of the
paper's three networks on one whole picture, for comparing them).
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import DeviceType

import kernels
import models
import utils
from kernels.graphs import Replay
from layers import SS2D
from layers.ss2d import is_fixed
from models.memory import give_back_memory, keep_freed_memory
from tools import networks
from train import Step
from training.criterion import RateDistortionLoss
from training.distributed import Processes
from training.optim import make_optimizers

# Of an operator that are timed together on a GPU: the time that a host takes to start the first is
# none of the operator's, and differs between hosts by a tenth of the scan's.
CALLS_IN_A_ROW = 8
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative errors of float32 against float64
KNOW_FIXED_A = ("triton", "cpu")  # backends that compute otherwise where A is fixed
MIB = 2**20
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

Sizes = Sequence[tuple[int, int]]  # height, width
Shapes = Sequence[tuple[int, int, int]]  # batch, height, width
MakeModel = Callable[[], models.SliceHyperprior]  # each measurement starts with a fresh network


@dataclass(frozen=True)
class StepKind:
    """A batch of crops, and in which way training takes a step on it."""

    batch: int
    height: int
    width: int
    amp: bool = False
    graphed: bool = False
    optimizer: str = "adam"

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.height}x{self.width}", "bf16" if self.amp else "float32"]
        words += ["graph"] * self.graphed + [self.optimizer] * (self.optimizer != "adam")
        return " ".join(words)


@dataclass(frozen=True)
class Work:
    """What is measured."""

    maps: Shapes  # of the scan and the block
    pictures: Sizes  # of forward passes
    steps: Sequence[StepKind]
    whole: Sizes = ((512, 768),)  # pictures of the codec and the variants

    def of_sizes(self, sizes: Sizes) -> "Work":
        """The same for pictures and crops of these sizes."""
        # The largest maps of a network are half as high and wide as the picture.
        maps = [(1, max(height // 2, 1), max(width // 2, 1)) for height, width in sizes]
        steps = [
            replace(kind, height=height, width=width)
            for height, width in sizes for kind in self.steps
        ]  # fmt: skip
        return Work(maps, sizes, list(dict.fromkeys(steps)), sizes)


# The fast way to train, with small crops and large ones; and in float32, for comparison.
FAST_STEPS = (
    StepKind(16, 128, 128, amp=True, graphed=True, optimizer="muon"),
    StepKind(16, 256, 256, amp=True, graphed=True, optimizer="muon"),
    StepKind(16, 256, 256, graphed=True, optimizer="muon"),
)
ON_GPU = Work(
    maps=((1, 64, 96), (1, 256, 384), (8, 128, 128), (1, 16, 24)),
    pictures=networks.SWEEP,
    steps=(
        *FAST_STEPS,
        StepKind(16, 256, 256, amp=True, optimizer="muon"),
        StepKind(8, 256, 256),  # as the published code was measured
        StepKind(8, 256, 256, graphed=True),
    ),
)
QUICK = Work(maps=((1, 256, 384),), pictures=((512, 768), (1408, 2048)), steps=FAST_STEPS)
ON_CPU = Work(maps=((1, 64, 96),), pictures=((128, 256), (256, 384)), steps=(StepKind(1, 64, 64),))


def reset_peak(device: torch.device) -> int | None:
    """Start a new measurement of the peak of memory; return the bytes held now.

    On a GPU they are PyTorch's, on a CPU those of this process; None where it does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back_memory()
    try:
        CLEAR_REFS.write_text("5")  # Linux then forgets the peak, VmHWM
    except OSError:
        return None
    return _process_memory("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _process_memory("VmHWM")


def _process_memory(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


class Bench:
    """Measures functions on one device and keeps the records.

    Args:
        device: where the functions run.
        backends: of the scan, the best first; those that there are to compare.
        seconds: to spend on one measurement.
        trained_A: A of the blocks is as training leaves it, see `set_A`.
    """

    def __init__(
        self,
        device: torch.device,
        backends: Sequence[str],
        seconds: float,
        trained_A: bool = False,
    ):
        self.device = device
        self.cuda = device.type == "cuda"
        self.backends = backends
        self.seconds = seconds
        self.trained_A = trained_A
        self.records: list[dict] = []

    def _once(self, function: Callable[[], object], calls: int = 1) -> float:
        """Milliseconds of one call, on a GPU the mean of several in a row."""
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            torch.cuda.synchronize(self.device)
            return start.elapsed_time(end) / calls
        begin = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin)

    def run(
        self,
        group: str,
        name: str,
        backend: str,
        function: Callable[[], object],
        graphed: bool = False,
        **extra: object,
    ) -> float:
        """Record median, 20th and 80th percentile in ms, and memory in MiB; return the median.

        ``total_mib`` is the most memory held at once, ``peak_mib`` what of it came on top of what
        was held before. A CUDA graph takes its memory once and for all when it is captured: what is
        ``graphed`` has the most since before its first call, and no ``peak_mib``. It has ``nodes``,
        see `gpu_operations`. A failure is recorded as ``error`` without a time.
        """
        record = {"group": group, "name": name, "backend": backend, **extra}
        self.records.append(record)
        label = f"{group:<9} {extra.get('model', '')} {name}".ljust(60) + f" {backend:<10}"
        try:
            gc.collect()  # earlier networks, which their graphs refer back to, are not to count
            if graphed:
                reset_peak(self.device)
            for _ in range(4 if self.cuda else 1):  # tuning and, by then, graphs
                self._once(function)
            held = 0 if graphed else reset_peak(self.device)
            warm = self._once(function)
            if held is not None:
                peak = peak_memory(self.device)
                record["total_mib"] = peak / MIB
                if not graphed:
                    # Linux counts with a delay: the peak may seem to be below what was held.
                    record["peak_mib"] = max(peak - held, 0) / MIB
            repeats = min(100, max(3, int(1e3 * self.seconds / max(warm, 1e-3))))
            calls = CALLS_IN_A_ROW if self.cuda and group == "operator" else 1
            times = sorted(self._once(function, calls) for _ in range(max(3, repeats // calls)))
            if graphed and (nodes := gpu_operations(function, self.device)):
                record["nodes"] = nodes
        except (RuntimeError, ValueError) as error:
            record["error"] = first_line(error)
            print(f"{label} {record['error'][:80]}", flush=True)
            return math.nan
        deciles = statistics.quantiles(times, n=10, method="inclusive")
        record |= {
            "median_ms": statistics.median(times),
            "p20_ms": deciles[1],
            "p80_ms": deciles[7],
            "repeats": len(times),
            **({"calls": calls} if calls > 1 else {}),
        }
        print(f"{label} {summary(record)}", flush=True)
        return record["median_ms"]


def gpu_operations(function: Callable[[], object], device: torch.device) -> int:
    """How many kernels, copies and memsets a GPU runs for one call: of a graph, its nodes.

    0 where the profiler sees none.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        function()
        torch.cuda.synchronize(device)
    return sum(
        event.device_type == DeviceType.CUDA and not event.is_user_annotation
        for event in profiler.events()
    )


def summary(record: dict) -> str:
    """What is printed of a record."""
    text = f"{record['median_ms']:10.2f} ms [{record['p20_ms']:.2f}, {record['p80_ms']:.2f}]"
    if "peak_mib" in record:
        text += f" {record['peak_mib']:9.0f} MiB"
    elif "total_mib" in record:
        text += f" {record['total_mib']:9.0f} MiB in all"
    if "nodes" in record:
        text += f" {record['nodes']:6} nodes"
    if "A" in record:
        text += f", A {record['A']}"
    return text


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def scan_arguments(
    batch: int, height: int, width: int, dim: int, device: torch.device
) -> list[Tensor]:
    """Random arguments of `kernels.selective_scan_2d`, from a freshly initialised SS2D."""
    block = SS2D(dim // 2).to(device)
    x = torch.randn(batch, height, width, dim, device=device)
    return [tensor.detach().requires_grad_() for tensor in (x, *block.scan_parameters())]


def with_gradients(arguments: Sequence[Tensor], fixed_A: bool) -> list[Tensor]:
    """Those of `scan_arguments` that get a gradient: all but A_logs where A is fixed."""
    *others, A_logs, Ds = arguments
    return [*others, Ds] if fixed_A else [*others, A_logs, Ds]


def known_promises(backend: str) -> tuple[bool, ...]:
    """Values of ``fixed_A`` that make a difference to a backend."""
    return (False, True) if backend in KNOW_FIXED_A else (False,)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def backend_errors(backend: str, device: torch.device) -> tuple[float, float]:
    """Relative errors of a backend in float32 against the float64 reference, A fixed or not.

    Returns:
        The largest of the results and, of all, of the gradients.
    """
    arguments = scan_arguments(1, 13, 17, 64, device)
    doubles = [argument.detach().double().requires_grad_() for argument in arguments]
    expected = kernels.selective_scan_2d(*doubles, backend="reference")
    dy = torch.randn(expected.shape, device=device)
    results, errors = [], []
    for fixed_A in known_promises(backend):
        actual = kernels.selective_scan_2d(*arguments, fixed_A=fixed_A, backend=backend)
        gradients = torch.autograd.grad(actual, with_gradients(arguments, fixed_A), dy)
        wanted = with_gradients(doubles, fixed_A)
        wanted = torch.autograd.grad(expected, wanted, dy.double(), retain_graph=True)
        results.append(relative_error(actual, expected))
        errors += map(relative_error, gradients, wanted)
    return max(results), max(errors)


def usable_backends(device: torch.device) -> list[str]:
    """Backends that run here and agree with the reference; the others are printed with why."""
    usable = []
    for backend, reason in kernels.available_backends(device).items():
        if reason is None:
            forward, gradient = backend_errors(backend, device)
            found = f"relative error {forward:.1e}, of gradients {gradient:.1e}"
            if forward < FORWARD_TOLERANCE and gradient < GRADIENT_TOLERANCE:
                usable.append(backend)
                print(f"{backend}: {found}")
                continue
            reason = f"{found}; expected {FORWARD_TOLERANCE:.0e}, {GRADIENT_TOLERANCE:.0e}"
        print(f"{backend}: not measured, {reason}")
    return usable


def exponential_floor(
    batch: int, height: int, width: int, dim: int, dstate: int = 16
) -> float | None:
    """Least ms of one forward scan on this GPU: one exp2 per state update, 16 per cycle and SM.

    None where the GPU's clock is unknown.
    """
    try:
        command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
        clock_mhz = float(subprocess.check_output(command, text=True).split("\n")[0])
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    updates = batch * height * width * 4 * dim * dstate
    return updates / (processors * 16 * clock_mhz * 1e3)


def set_A(module: nn.Module, trained: bool) -> None:
    """Fix the A of the scans that have its first values, or move it away from them.

    A that training has moved takes another kernel of the scan, and is trained further.
    """
    for scan in module.modules():
        if isinstance(scan, SS2D) and is_fixed(scan.A_logs):
            if trained:
                with torch.no_grad():
                    scan.A_logs.add_(0.01)
            else:
                scan.A_logs.requires_grad_(False)


def kind_of_A(module: nn.Module) -> dict[str, str]:
    """``A`` of a record: fixed, or trained if that of any scan is; nothing without scans."""
    known = [is_fixed(scan.A_logs) for scan in module.modules() if isinstance(scan, SS2D)]
    return {"A": "fixed" if all(known) else "trained"} if known else {}


def bench_passes(
    bench: Bench,
    group: str,
    name: str,
    backend: str,
    function: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    floor_ms: float | None = None,
    **extra: object,
) -> None:
    """Measure the forward pass of `function`, the backward pass for one random gradient, and both.

    ``floor_ms``, where it is known, goes into the forward pass's record, ``extra`` into all.
    """

    @functools.cache
    def gradient() -> Tensor:
        return torch.randn_like(function())

    @functools.cache  # the first call is not timed
    def output() -> Tensor:
        return function()

    def backward() -> None:
        torch.autograd.grad(output(), inputs, gradient(), retain_graph=True)

    def both() -> None:
        torch.autograd.grad(function(), inputs, gradient())

    floor = {} if floor_ms is None else {"floor_ms": floor_ms}
    with torch.no_grad():
        bench.run(group, f"{name} forward", backend, function, **extra, **floor)
    bench.run(group, f"{name} backward", backend, backward, **extra)
    output.cache_clear()  # with all that it keeps for its gradients
    bench.run(group, f"{name} fwd+bwd", backend, both, **extra)


def bench_operator(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """The scan, of maps with as many channels as in the network."""
    dim = 4 * make().config["N"]
    for shape in [(*shape, dim) for shape in work.maps]:
        arguments = scan_arguments(*shape, bench.device)
        label = "scan " + "x".join(map(str, shape))
        floor_ms = exponential_floor(*shape) if bench.cuda else None
        for backend in bench.backends:
            # The step-by-step reference takes minutes at full size.
            if backend == "reference" and math.prod(shape) > 64 * 96 * 512:
                continue
            for fixed_A in known_promises(backend):
                scan = functools.partial(
                    kernels.selective_scan_2d, *arguments, fixed_A=fixed_A, backend=backend
                )
                name, floor = (f"{label} A fixed", None) if fixed_A else (label, floor_ms)
                inputs = with_gradients(arguments, fixed_A)
                bench_passes(bench, "operator", name, backend, scan, inputs, floor)


def bench_block(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """SS2D, on maps with as many channels as in the network."""
    dim = 2 * make().config["N"]
    for shape in work.maps:
        block = SS2D(dim).to(bench.device)
        set_A(block, bench.trained_A)
        inputs = [parameter for parameter in block.parameters() if parameter.requires_grad]
        u = torch.randn(*shape, dim, device=bench.device, requires_grad=True)
        label = f"SS2D {dim} " + "x".join(map(str, shape))
        for backend in bench.backends:
            if backend == "reference" and bench.cuda:
                continue
            forward = functools.partial(block, u)
            with kernels.use_backend(backend):
                bench_passes(
                    bench, "block", label, backend, forward, [u, *inputs], **kind_of_A(block)
                )


def picture(height: int, width: int, device: torch.device) -> Tensor:
    """A smooth random picture (1, 3, height, width) in [0, 1]."""
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, device=device)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def bench_network(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """Forward passes over one picture of each size, on a GPU also from a CUDA graph."""
    model = make()
    extra = {"model": name, **kind_of_A(model)}
    quick = utils.chosen_precision(None, bench.device)
    # The reference would take minutes; mamba-ssm's copies of the maps grow too large.
    largest = {"reference": 100_000, "mamba_ssm": 3_000_000}
    for backend, (height, width) in itertools.product(bench.backends, work.pictures):
        if height * width > largest.get(backend, math.inf):
            continue
        x = picture(height, width, bench.device)
        label = f"forward {height}x{width}"
        with torch.inference_mode(), kernels.use_backend(backend):
            bench.run("network", label, backend, functools.partial(model, x), **extra)
            if not bench.cuda or backend != bench.backends[0]:
                continue
            for precision in dict.fromkeys((torch.float32, quick)):
                forward = functools.partial(model, precision=precision)
                replay = functools.partial(Replay(), forward, x)
                mode = f"{label} graph{_word(precision)}"
                bench.run("network", mode, backend, replay, graphed=True, **extra)


def _word(precision: torch.dtype) -> str:
    return " bf16" if precision == torch.bfloat16 else ""


def bench_training(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """Steps of training on a batch of crops, without reading pictures."""
    for kind in work.steps:
        bench_step(bench, "training", f"step {kind}", kind, name, make())


def bench_step(
    bench: Bench,
    group: str,
    label: str,
    kind: StepKind,
    name: str,
    model: models.SliceHyperprior,
) -> None:
    """A step as train.py takes it, on random pictures."""
    net, aux = make_optimizers(model.train(), kind.optimizer, lr=1e-4, aux_lr=1e-3)
    processes = Processes(bench.cuda)
    criterion = RateDistortionLoss(lmbda=0.013)
    step = Step(model, criterion, net, aux, processes, kind.amp, clip=1.0, graphs=kind.graphed)
    shape = (kind.batch, kind.height, kind.width, 3)
    crops = torch.randint(256, shape, dtype=torch.uint8, device=bench.device)

    def take() -> None:
        if not step([crops]).is_finite:  # the update is then left out
            raise RuntimeError("a step was not finite")

    extra = {"model": name, **kind_of_A(model)}
    bench.run(group, label, bench.backends[0], take, graphed=kind.graphed, **extra)


def bench_codec(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """One picture of each size to bytes and back."""
    model, best = make(), bench.backends[0]
    quick = utils.chosen_precision(None, bench.device)
    modes = [(exact, False, torch.float32) for exact in (True, False)]  # exact, graphed, precision
    if bench.cuda:
        modes += [(exact, True, torch.float32) for exact in (True, False)]
    if quick != torch.float32:
        modes += [(True, graphed, quick) for graphed in (False, True)]
    for (height, width), (exact, graphed, precision) in itertools.product(work.whole, modes):
        x = picture(height, width, bench.device)
        encode, decode = coding(model, x, exact, graphed, precision)
        mode = f"{height}x{width} {'exact' if exact else 'fast'}{' graph' if graphed else ''}"
        extra = {"graphed": graphed, "model": name, **kind_of_A(model)}
        mode += _word(precision)
        bench.run("codec", f"compress {mode}", best, encode, **extra)
        bench.run("codec", f"decompress {mode}", best, decode, **extra)


def coding(
    model: models.SliceHyperprior,
    x: Tensor,
    exact: bool = True,
    graphed: bool = False,
    precision: torch.dtype = torch.float32,
) -> tuple[Callable[[], dict], Callable[[], dict]]:
    """What encodes a picture, and what decodes that to which the picture was encoded."""
    coder = models.Coder(model, exact=exact, graphs=graphed, precision=precision)
    encode = functools.partial(coder.compress, x)
    encoded = functools.cache(encode)  # at its first use, where a failure is recorded
    return encode, lambda: coder.decompress(**encoded())


def bench_variants(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """Forward pass, encoding, decoding and training step of a whole picture of each size."""
    for height, width in work.whole:
        size = f"{height}x{width}"
        model, x = make(), picture(height, width, bench.device)
        extra = {"backend": bench.backends[0], "model": name, **kind_of_A(model)}
        run = functools.partial(bench.run, "variants", **extra)
        with torch.inference_mode():
            run(f"forward {size}", function=functools.partial(model, x))
        encode, decode = coding(model, x)
        run(f"encode {size}", function=encode)
        run(f"decode {size}", function=decode)
        del model, encode, decode
        bench_step(bench, "variants", f"step {size}", StepKind(1, height, width), name, make())


GROUPS = {
    "operator": bench_operator,
    "block": bench_block,
    "network": bench_network,
    "training": bench_training,
    "codec": bench_codec,
    "variants": bench_variants,
}


def print_ratios(records: Sequence[dict]) -> None:
    """Print how much longer than the fastest other backends took for the same work, and what part
    of the floor the fastest reaches."""
    works = defaultdict(list)
    for record in records:
        if "median_ms" in record:
            works[record["group"], record["name"], record.get("model")].append(record)
    for backends in works.values():
        best, *others = sorted(backends, key=lambda record: record["median_ms"])
        if not others:
            continue
        work = " ".join(filter(None, (best.get("model"), best["name"])))
        line = f"{work}: {best['backend']}"
        for other in others:
            ratio = other["median_ms"] / best["median_ms"]
            line += f"; {other['backend']} takes {ratio:.1f} times as long"
        if best.get("floor_ms") is not None:
            line += f"; {best['floor_ms'] / best['median_ms']:.0%} of the floor"
        print(line)


def machine(device: torch.device) -> dict:
    """What the numbers depend on."""
    record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": utils.cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
        record["commit"] = commit.strip()
    with contextlib.suppress(ImportError):
        import triton

        record["triton"] = triton.__version__
    return record


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        prog="python -m tools.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    networks.add_flags(parser)
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="on a GPU only the sizes and steps by which two versions are compared (for how, see "
        "results/README.md)",
    )
    parser.add_argument(
        "--trained-A",
        action="store_true",
        help="move the scans' A away from its first values, as training does, for which scans and "
        "their gradients take longer (default: it is left there, as with train.py --fixed-A); "
        "checkpoints that have a trained A keep theirs in any case",
    )
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to run"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records here")
    parser.add_argument(
        "--default-precision",
        action="store_true",
        help="keep PyTorch's default float32 matrix products instead of TF32 ones",
    )
    parser.add_argument(
        "--seconds",
        type=utils.number(float, 0, exclusive=True),
        default=2.0,
        help="time to spend on one measurement (default: 2)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    if args.json:
        utils.check_output(args.json)
    device = utils.select_device(args.cuda)
    keep_freed_memory()  # as codec.py and eval.py do
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # PyTorch's default, which the check needs
    backends = usable_backends(device)
    if not backends:
        raise utils.DataError(
            "no backend of the scan gives right results here; nothing is measured"
        )
    if not args.default_precision:
        torch.set_float32_matmul_precision("high")

    work = ON_CPU
    if args.cuda:
        work = QUICK if args.quick else ON_GPU
    if sizes := networks.sizes(args):
        work = work.of_sizes(sizes)

    def make(name: str) -> models.SliceHyperprior:
        model = networks.build(name, args.N, args.M)
        model.update()
        set_A(model, args.trained_A)
        return model.to(device)

    bench = Bench(device, backends, args.seconds, args.trained_A)
    record = {"machine": machine(device), "records": bench.records}
    print(json.dumps(record["machine"]))
    for group in args.only:
        names = args.models or (networks.PAPER if group == "variants" else networks.PAPER[:1])
        if group in ("operator", "block"):  # they take from a network the number of channels only
            names = names[:1]
        for name in names:
            try:
                with kernels.use_backend(backends[0]):
                    GROUPS[group](bench, work, Path(name).name, functools.partial(make, name))
            except (RuntimeError, ValueError) as error:  # memory, for one; others may have room
                reason = first_line(error)
                bench.records.append({"group": group, "name": "rest", "error": reason})
                print(f"{group:<9} the rest failed: {reason}")
            if args.json:
                with utils.atomic_write(args.json) as path:
                    path.write_text(json.dumps(record, indent=1) + "\n")
    print_ratios(bench.records)


if __name__ == "__main__":
    utils.run_main(main)
