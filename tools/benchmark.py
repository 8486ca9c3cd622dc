"""Time and memory of the scan, the SS2D block, the networks and the codec on this machine.

Every backend of the scan that can run here is measured side by side in one run, after a check
against the float64 reference; a backend that fails the check gets no times. Training, codec
and variants run on the first backend that passes. Random weights, random inputs.

Groups: operator (the scan), block (SS2D), network (forward passes by size and backend), training
(optimiser steps), codec (pictures to bytes and back), variants (passes, coding and steps of the
paper's three networks on one whole picture, for comparing them).
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import kernels
import models
import utils
from kernels.graphs import Replay
from layers import SS2D
from models.memory import give_back_memory, keep_freed_memory
from tools import networks
from train import Step
from training.criterion import RateDistortionLoss
from training.distributed import Processes
from training.optim import make_optimizers

FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative errors of float32 against float64
MIB = 2**20
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

Sizes = Sequence[tuple[int, int]]  # height, width
Shapes = Sequence[tuple[int, int, int]]  # batch, height, width
MakeModel = Callable[[], models.SliceHyperprior]  # each measurement starts with a fresh network


@dataclass(frozen=True)
class Work:
    """The sizes that are measured."""

    maps: Shapes  # of the scan and the block
    pictures: Sizes  # of forward passes
    crops: Sizes  # of training
    batches: Sequence[int]  # crops of a step
    whole: Sizes = ((512, 768),)  # pictures of the codec and the variants


ON_GPU = Work(
    maps=((1, 64, 96), (1, 256, 384), (8, 128, 128), (1, 16, 24)),
    pictures=networks.SWEEP,
    crops=((256, 256),),
    batches=(8, 16),
)
ON_CPU = Work(
    maps=((1, 64, 96),), pictures=((128, 256), (256, 384)), crops=((64, 64),), batches=(1,)
)


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
    """

    def __init__(self, device: torch.device, backends: Sequence[str], seconds: float):
        self.device = device
        self.cuda = device.type == "cuda"
        self.backends = backends
        self.seconds = seconds
        self.records: list[dict] = []

    def _once(self, function: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize(self.device)
            return start.elapsed_time(end)
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
        was held before. That of a CUDA graph is taken once and for all when it is captured, and
        is not measured: say so with ``graphed``. A failure is recorded as ``error`` without a time.
        """
        record = {"group": group, "name": name, "backend": backend, **extra}
        self.records.append(record)
        label = f"{group:<9} {extra.get('model', '')} {name}".ljust(50) + f" {backend:<10}"
        try:
            for _ in range(4 if self.cuda else 1):  # tuning and, by then, graphs
                self._once(function)
            held = reset_peak(self.device)
            warm = self._once(function)
            if held is not None and not graphed:
                peak = peak_memory(self.device)
                # Linux counts with a delay: the peak may seem to be below what was held.
                record |= {"peak_mib": max(peak - held, 0) / MIB, "total_mib": peak / MIB}
            repeats = min(100, max(3, int(1e3 * self.seconds / max(warm, 1e-3))))
            times = sorted(self._once(function) for _ in range(repeats))
        except (RuntimeError, ValueError) as error:
            record["error"] = first_line(error)
            print(f"{label} {record['error'][:80]}", flush=True)
            return math.nan
        deciles = statistics.quantiles(times, n=10, method="inclusive")
        record |= {
            "median_ms": statistics.median(times),
            "p20_ms": deciles[1],
            "p80_ms": deciles[7],
            "repeats": repeats,
        }
        memory = f" {record['peak_mib']:9.0f} MiB" if "peak_mib" in record else ""
        print(
            f"{label} {record['median_ms']:10.2f} ms "
            f"[{record['p20_ms']:.2f}, {record['p80_ms']:.2f}]{memory}",
            flush=True,
        )
        return record["median_ms"]


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def scan_arguments(
    batch: int, height: int, width: int, dim: int, device: torch.device
) -> list[Tensor]:
    """Random arguments of `kernels.selective_scan_2d`, from a freshly initialised SS2D."""
    block = SS2D(dim // 2).to(device)
    x = torch.randn(batch, height, width, dim, device=device)
    return [tensor.detach().requires_grad_() for tensor in (x, *block.scan_parameters())]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def backend_errors(backend: str, device: torch.device) -> tuple[float, float]:
    """Relative errors of a backend in float32 against the float64 reference.

    Returns:
        Those of the result and, the largest of all, of the gradients.
    """
    arguments = scan_arguments(1, 13, 17, 64, device)
    doubles = [argument.detach().double().requires_grad_() for argument in arguments]
    expected = kernels.selective_scan_2d(*doubles, backend="reference")
    actual = kernels.selective_scan_2d(*arguments, backend=backend)
    dy = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, arguments, dy)
    expected_gradients = torch.autograd.grad(expected, doubles, dy.double())
    errors = map(relative_error, gradients, expected_gradients)
    return relative_error(actual, expected), max(errors)


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


def bench_passes(
    bench: Bench,
    group: str,
    name: str,
    backend: str,
    function: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    **extra: object,
) -> None:
    """Measure the forward pass of `function`, the backward pass for one random gradient, and both.

    ``extra`` goes into the forward pass's record.
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

    with torch.no_grad():
        bench.run(group, f"{name} forward", backend, function, **extra)
    bench.run(group, f"{name} backward", backend, backward)
    output.cache_clear()  # with all that it keeps for its gradients
    bench.run(group, f"{name} fwd+bwd", backend, both)


def bench_operator(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """The scan, of maps with as many channels as in the network."""
    dim = 4 * make().config["N"]
    for shape in [(*shape, dim) for shape in work.maps]:
        arguments = scan_arguments(*shape, bench.device)
        label = "scan " + "x".join(map(str, shape))
        floor = {"floor_ms": exponential_floor(*shape)} if bench.cuda else {}
        for backend in bench.backends:
            # The step-by-step reference takes minutes at full size.
            if backend == "reference" and math.prod(shape) > 64 * 96 * 512:
                continue
            scan = functools.partial(kernels.selective_scan_2d, *arguments, backend=backend)
            bench_passes(bench, "operator", label, backend, scan, arguments, **floor)


def bench_block(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """SS2D, on maps with as many channels as in the network."""
    dim = 2 * make().config["N"]
    for shape in work.maps:
        block = SS2D(dim).to(bench.device)
        u = torch.randn(*shape, dim, device=bench.device, requires_grad=True)
        label = f"SS2D {dim} " + "x".join(map(str, shape))
        for backend in bench.backends:
            if backend == "reference" and bench.cuda:
                continue
            forward = functools.partial(block, u)
            with kernels.use_backend(backend):
                bench_passes(bench, "block", label, backend, forward, [u, *block.parameters()])


def picture(height: int, width: int, device: torch.device) -> Tensor:
    """A smooth random picture (1, 3, height, width) in [0, 1]."""
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, device=device)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def bench_network(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """Forward passes over one picture of each size, on a GPU also from a CUDA graph."""
    model = make()
    # The reference would take minutes; mamba-ssm's copies of the maps grow too large.
    largest = {"reference": 100_000, "mamba_ssm": 3_000_000}
    for backend, (height, width) in itertools.product(bench.backends, work.pictures):
        if height * width > largest.get(backend, math.inf):
            continue
        x = picture(height, width, bench.device)
        label = f"forward {height}x{width}"
        with torch.inference_mode(), kernels.use_backend(backend):
            bench.run("network", label, backend, functools.partial(model, x), model=name)
            if bench.cuda and backend == bench.backends[0]:
                replay = functools.partial(Replay(), model, x)
                bench.run("network", f"{label} graph", backend, replay, graphed=True, model=name)


def bench_training(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """One step of training on a batch of crops, without reading pictures; on a GPU in all ways."""
    best = bench.backends[0]
    cases = [(batch, False, False, "adam") for batch in work.batches]
    if bench.cuda:
        both = (False, True)
        cases = list(itertools.product(work.batches, both, both, ("adam",)))
        cases += itertools.product(work.batches[:1], (True,), both, ("muon",))
    for (height, width), case in itertools.product(work.crops, cases):
        batch, amp, graphed, optimizer = case
        step = training_step(make(), batch, height, width, amp, graphed, optimizer)
        words = [f"step {batch}x{height}x{width}", "bf16" if amp else "float32"]
        words += ["graph"] * graphed + [optimizer] * (optimizer != "adam")
        bench.run("training", " ".join(words), best, step, graphed=graphed, model=name)


def training_step(
    model: models.SliceHyperprior,
    batch: int,
    height: int,
    width: int,
    amp: bool = False,
    graphed: bool = False,
    optimizer: str = "adam",
) -> Callable[[], object]:
    """A step as train.py takes it, on random pictures."""
    net, aux = make_optimizers(model.train(), optimizer, lr=1e-4, aux_lr=1e-3)
    device = next(model.parameters()).device
    processes = Processes(device.type == "cuda")
    criterion = RateDistortionLoss(lmbda=0.013)
    step = Step(model, criterion, net, aux, processes, amp=amp, clip=1.0, graphs=graphed)
    crops = torch.randint(256, (batch, height, width, 3), dtype=torch.uint8, device=device)
    return functools.partial(step, [crops])


def bench_codec(bench: Bench, work: Work, name: str, make: MakeModel) -> None:
    """One picture of each size to bytes and back."""
    model, best = make(), bench.backends[0]
    quick = utils.chosen_precision(None, bench.device)
    precisions = dict.fromkeys((torch.float32, quick))
    graphs = (False, True) if bench.cuda else (False,)
    modes = itertools.product(work.whole, graphs, (True, False), precisions)
    for (height, width), graphed, exact, precision in modes:
        x = picture(height, width, bench.device)
        encode, decode = coding(model, x, exact, graphed, precision)
        mode = f"{height}x{width} {'exact' if exact else 'fast'}{' graph' if graphed else ''}"
        mode += " bf16" if precision == torch.bfloat16 else ""
        bench.run("codec", f"compress {mode}", best, encode, graphed=graphed, model=name)
        bench.run("codec", f"decompress {mode}", best, decode, graphed=graphed, model=name)


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
    run = functools.partial(bench.run, "variants", backend=bench.backends[0], model=name)
    for height, width in work.whole:
        size = f"{height}x{width}"
        model, x = make(), picture(height, width, bench.device)
        with torch.inference_mode():
            run(f"forward {size}", function=functools.partial(model, x))
        encode, decode = coding(model, x)
        run(f"encode {size}", function=encode)
        run(f"decode {size}", function=decode)
        del model, encode, decode
        run(f"step {size}", function=training_step(make(), 1, height, width))


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
        line = f"{best['name']}: {best['backend']}"
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
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to run"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records to this file")
    parser.add_argument(
        "--default-precision",
        action="store_true",
        help="keep PyTorch's default float32 matrix products instead of TF32 ones",
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time to spend on one measurement (default: 2)"
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

    work = ON_GPU if args.cuda else ON_CPU
    if sizes := networks.sizes(args):
        # The largest maps of a network are half as high and wide as the picture.
        maps = [(1, max(height // 2, 1), max(width // 2, 1)) for height, width in sizes]
        work = Work(maps, sizes, sizes, work.batches, sizes)

    def make(name: str) -> models.SliceHyperprior:
        model = networks.build(name, args.N, args.M)
        model.update()
        return model.to(device)

    bench = Bench(device, backends, args.seconds)
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
