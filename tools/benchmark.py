"""Time and memory of the scan, the SS2D block, the network and the codec on this machine.

Every backend that can run here is measured side by side in one run, after a check against the
float64 reference; a backend that fails the check gets no times. Network, training and codec run on
the first backend that passes. Random weights, random inputs.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from compressai.losses import RateDistortionLoss
from torch import Tensor

import kernels
import models
import utils
from kernels.graphs import GraphedGradients, GraphedUpdate, Replay
from layers import SS2D
from training.optim import make_optimizers

GROUPS = ("operator", "block", "network", "scaling", "training", "codec")
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative errors of float32 against float64
REPLAY_TOLERANCE = 1e-2  # of a picture: a latent may round the other way
MIB = 2**20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups to run")
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


class Bench:
    """Measures functions on one device and keeps the records."""

    def __init__(self, device: torch.device, seconds: float):
        self.device = device
        self.seconds = seconds
        self.records: list[dict] = []

    def _once(self, function: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self.device.type == "cuda":
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
        self, group: str, name: str, backend: str, function: Callable[[], object], **extra: object
    ) -> float:
        """Record median, 20th and 80th percentile in ms, and on a GPU peak memory in MiB.

        A CUDA graph's memory is taken once and for all when it is captured: not measured.
        """
        record = {"group": group, "name": name, "backend": backend, **extra}
        try:
            warm = [self._once(function) for _ in range(2)][-1]
            if self.device.type == "cuda":
                for _ in range(2):
                    self._once(function)
                torch.cuda.reset_peak_memory_stats(self.device)
                before = torch.cuda.memory_allocated(self.device)
                warm = self._once(function)
                peak = torch.cuda.max_memory_allocated(self.device)
                if "graph" not in name:
                    record["peak_mib"] = (peak - before) / MIB
            repeats = min(100, max(3, int(1e3 * self.seconds / max(warm, 1e-3))))
            times = sorted(self._once(function) for _ in range(repeats))
        except (RuntimeError, ValueError) as error:
            record["error"] = str(error).strip().split("\n")[0]
            self.records.append(record)
            print(f"{group:<9} {name:<34} {backend:<10} {record['error'][:80]}", flush=True)
            return math.nan
        deciles = statistics.quantiles(times, n=10, method="inclusive")
        record |= {
            "median_ms": statistics.median(times),
            "p20_ms": deciles[1],
            "p80_ms": deciles[7],
            "repeats": repeats,
        }
        self.records.append(record)
        memory = f"{record['peak_mib']:9.0f} MiB" if "peak_mib" in record else ""
        print(
            f"{group:<9} {name:<34} {backend:<10} {record['median_ms']:10.2f} ms "
            f"[{record['p20_ms']:.2f}, {record['p80_ms']:.2f}] {memory}",
            flush=True,
        )
        return record["median_ms"]


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
    with full_precision():
        expected = kernels.selective_scan_2d(*doubles, backend="reference")
        actual = kernels.selective_scan_2d(*arguments, backend=backend)
        dy = torch.randn_like(actual)
        gradients = torch.autograd.grad(actual, arguments, dy)
        expected_gradients = torch.autograd.grad(expected, doubles, dy.double())
    errors = map(relative_error, gradients, expected_gradients)
    return relative_error(actual, expected), max(errors)


@contextlib.contextmanager
def automatic_backend(name: str) -> Iterator[None]:
    """Let `auto` mean this backend, so that whole layers run on it."""
    with mock.patch.dict(os.environ, MAMBAVC_SCAN_BACKEND=name):
        yield


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 matrix products without TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


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


def bench_gradients(
    bench: Bench,
    group: str,
    name: str,
    backend: str,
    function: Callable[[], Tensor],
    inputs: Sequence[Tensor],
) -> None:
    """Measure the backward pass of `function`, and both passes, for one random gradient."""

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

    bench.run(group, f"{name} backward", backend, backward)
    output.cache_clear()  # with all that it keeps for its gradients
    bench.run(group, f"{name} fwd+bwd", backend, both)


def bench_operator(bench: Bench, backends: Sequence[str]) -> None:
    cuda = bench.device.type == "cuda"
    shapes = [(1, 256, 384, 512), (8, 128, 128, 512), (1, 16, 24, 512)] if cuda else []
    for shape in [(1, 64, 96, 512), *shapes]:
        arguments = scan_arguments(*shape, bench.device)
        label = "x".join(map(str, shape))
        floor = {"floor_ms": exponential_floor(*shape)} if cuda else {}
        for backend in backends:
            # The step-by-step reference takes minutes at full size.
            if backend == "reference" and math.prod(shape) > 64 * 96 * 512:
                continue

            def scan(arguments=arguments, backend=backend) -> Tensor:
                return kernels.selective_scan_2d(*arguments, backend=backend)

            with torch.no_grad():
                bench.run("operator", f"scan {label} forward", backend, scan, **floor)
            bench_gradients(bench, "operator", f"scan {label}", backend, scan, arguments)


def bench_block(bench: Bench, backends: Sequence[str]) -> None:
    cuda = bench.device.type == "cuda"
    shapes = [(1, 256, 384), (8, 128, 128)] if cuda else [(1, 64, 96)]
    for shape in shapes:
        block = SS2D(256).to(bench.device)
        u = torch.randn(*shape, 256, device=bench.device, requires_grad=True)
        forward = functools.partial(block, u)
        label = "x".join(map(str, shape))
        for backend in backends:
            if backend == "reference" and cuda:
                continue
            with automatic_backend(backend):
                with torch.no_grad():
                    bench.run("block", f"SS2D 256 {label} forward", backend, forward)
                inputs = [u, *block.parameters()]
                bench_gradients(bench, "block", f"SS2D 256 {label}", backend, forward, inputs)


def network(bench: Bench) -> models.SliceHyperprior:
    torch.manual_seed(0)
    model = models.build_model("mambavc").to(bench.device).eval()
    model.update()
    return model


def picture(height: int, width: int, device: torch.device) -> Tensor:
    """A smooth random picture (1, 3, height, width) in [0, 1]."""
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, device=device)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def bench_network(bench: Bench, backend: str) -> None:
    model = network(bench)
    cuda = bench.device.type == "cuda"
    sizes = [(512, 768), (1024, 1024), (1408, 2048)] if cuda else [(256, 256)]
    for height, width in sizes:
        x = picture(height, width, bench.device)
        with torch.inference_mode():
            name = f"forward {height}x{width}"
            bench.run("network", name, backend, lambda x=x: model(x))
            if cuda:
                bench.run("network", f"{name} graph", backend, checked_replay(model, x))


def checked_replay(model: models.SliceHyperprior, x: Tensor) -> Callable[[], None]:
    """The network's forward pass from a CUDA graph.

    Raises:
        RuntimeError: at the third call, if it replays something else.
    """
    replay = Replay()
    results: list[Tensor] = []

    def run() -> None:
        x_hat = replay(model, x)["x_hat"]
        if len(results) < 3:  # launched as usual; captured and replayed; replayed
            results.append(x_hat)
            error = relative_error(x_hat, results[0].double())
            if not error < REPLAY_TOLERANCE:
                raise RuntimeError(f"relative error {error:.1e} of the replay")

    return run


def bench_scaling(bench: Bench, backends: Sequence[str]) -> None:
    """Forward time from 0.1 to 8 megapixels; prints the exponent of time against pixels."""
    model = network(bench)
    cuda = bench.device.type == "cuda"
    # The reference would take minutes; mamba-ssm's copies of the maps grow too large.
    largest = {"reference": 0.0, "mamba_ssm": 3.0}
    for backend in backends:
        points = []
        for megapixels in (0.1, 0.4, 1.0, 2.0, 4.0, 8.0) if cuda else (0.03, 0.1):
            if megapixels > largest.get(backend, math.inf):
                continue
            width = round(math.sqrt(megapixels * 1.5e6) / 128) * 128
            height = max(128, round(megapixels * 1e6 / width / 128) * 128)
            x = picture(height, width, bench.device)
            name, pixels = f"forward {height}x{width}", height * width
            with torch.inference_mode(), automatic_backend(backend):
                median = bench.run("scaling", name, backend, lambda x=x: model(x), pixels=pixels)
            if math.isfinite(median):
                points.append((pixels, median))
        if len(points) > 1:
            logarithms = np.log(np.array(points))
            exponent = np.polyfit(*logarithms.T, 1)[0]
            print(f"scaling: time of {backend} grows as pixels to the power of {exponent:.3f}")
            record = {"group": "scaling", "name": "exponent", "backend": backend}
            bench.records.append({**record, "value": exponent})


def bench_training(bench: Bench, backend: str) -> None:
    """One optimiser step on a batch of crops, without data loading; on a GPU also graphed."""
    cases = [(1, 64, False, False, "adam")]
    if bench.device.type == "cuda":
        both = (False, True)
        cases = list(itertools.product((8, 16), (256,), both, both, ("adam",)))
        cases += itertools.product((8,), (256,), (True,), both, ("muon",))
    for batch, side, amp, graphed, optimizer in cases:
        step = training_step(network(bench), batch, side, amp, graphed, optimizer)
        words = [f"step {batch}x{side}x{side}", "bf16" if amp else "float32"]
        words += ["graph"] * graphed + [optimizer] * (optimizer != "adam")
        bench.run("training", " ".join(words), backend, step)


def training_step(
    model: models.SliceHyperprior, batch: int, side: int, amp: bool, graphed: bool, optimizer: str
) -> Callable[[], None]:
    """A step as `train.py` takes it, on random pictures."""
    net, aux = make_optimizers(model.train(), optimizer, lr=1e-4, aux_lr=1e-3)
    optimizers = [*net.values(), aux]
    parameters = [p for o in net.values() for group in o.param_groups for p in group["params"]]
    criterion = RateDistortionLoss(lmbda=0.013)
    device = parameters[0].device
    x = torch.rand(batch, 3, side, side, device=device)

    def gradients(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output = model(x)
        output["x_hat"] = output["x_hat"].float()
        loss = criterion(output, x)["loss"] + model.aux_loss()
        loss.backward()
        return loss.detach()

    def update() -> None:
        for each in optimizers:
            each.step()

    if graphed:
        gradients = GraphedGradients(gradients, list(model.parameters()), x)
        update = GraphedUpdate(optimizers)

    def step() -> None:
        gradients(x)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        update()
        for each in optimizers:
            each.zero_grad()

    return step


def bench_codec(bench: Bench, backend: str) -> None:
    alone = not bench.records
    model = network(bench)
    cuda = bench.device.type == "cuda"
    x = picture(512, 768, bench.device)
    for graphed, exact in itertools.product((False, True) if cuda else (False,), (True, False)):
        coder = models.Coder(model, exact=exact, graphs=graphed)
        mode = ("exact" if exact else "fast") + (" graph" if graphed else "")
        encode = functools.partial(coder.compress, x)
        decode = functools.partial(coder.decompress, **encode())
        bench.run("codec", f"compress 512x768 {mode}", backend, encode)
        bench.run("codec", f"decompress 512x768 {mode}", backend, decode)
    if alone and not cuda:  # else it is that of an earlier group
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
        print(f"codec: peak memory of the process {peak:.0f} MiB")
        bench.records.append({"group": "codec", "name": "peak process memory", "peak_mib": peak})


def add_ratios(records: Sequence[dict]) -> None:
    """Add to the records what part of the floor each reaches, and how much slower its peers are.

    ``of_floor`` is the floor divided by the median; ``slower`` has, for each other backend that
    did the same work, its median divided by this one's.
    """
    timed = [record for record in records if "median_ms" in record]
    for record in timed:
        work = (record["group"], record["name"])
        if record.get("floor_ms") is not None:
            record["of_floor"] = record["floor_ms"] / record["median_ms"]
        record["slower"] = {
            peer["backend"]: peer["median_ms"] / record["median_ms"]
            for peer in timed
            if (peer["group"], peer["name"]) == work and peer is not record
        }


def print_ratios(records: Sequence[dict]) -> None:
    """Print the ratios of those backends that are the fastest of several."""
    for record in records:
        slower = record.get("slower")
        if slower and min(slower.values()) >= 1:
            peers = ", ".join(
                f"{peer} takes {ratio:.1f} times as long" for peer, ratio in slower.items()
            )
            floor = f"; {record['of_floor']:.0%} of the floor" if "of_floor" in record else ""
            print(f"{record['name']}: {record['backend']}; {peers}{floor}")


def machine(device: torch.device) -> dict:
    """What the numbers depend on."""
    try:
        commit = subprocess.check_output(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent.parent,
            text=True,
            stderr=subprocess.DEVNULL,
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": utils.cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "commit": commit,
    }
    with contextlib.suppress(ImportError):
        import triton

        record["triton"] = triton.__version__
    return record


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    if args.json:
        utils.check_output(args.json)
    device = utils.select_device(args.cuda)
    if not args.default_precision:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    bench = Bench(device, args.seconds)
    record = {"machine": machine(device), "records": bench.records}
    print(json.dumps(record["machine"]))
    backends = usable_backends(device)
    if not backends:
        raise utils.DataError(
            "no backend of the scan gives right results here; nothing is measured"
        )
    for group in args.only:
        run = globals()[f"bench_{group}"]
        try:
            if group in ("operator", "block", "scaling"):
                run(bench, backends)
            else:
                with automatic_backend(backends[0]):
                    run(bench, backends[0])
        except (RuntimeError, ValueError) as error:  # memory, for one; other groups may have room
            reason = str(error).strip().split("\n")[0]
            bench.records.append({"group": group, "name": "rest", "error": reason})
            print(f"{group:<9} the rest failed: {reason}")
        add_ratios(bench.records)
        if args.json:
            with utils.atomic_write(args.json) as path:
                path.write_text(json.dumps(record, indent=1) + "\n")
    print_ratios(bench.records)


if __name__ == "__main__":
    utils.run_main(main)
