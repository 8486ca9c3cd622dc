"""What the benchmark records, and that it gives no time to a wrong result."""

import functools
import json

import pytest
import torch
from conftest import SHALLOW, save_checkpoint, tiny_model

import kernels
from kernels import scan_cpu
from kernels.backends import choose_scan
from kernels.graphs import Replay
from tools import benchmark

CPU = torch.device("cpu")


def test_a_backend_with_a_wrong_result_is_not_measured(monkeypatch, capsys):
    scan = kernels.selective_scan_2d

    def wrong(*args, backend, **promise):
        return scan(*args, backend="reference") * (1.001 if backend == "cpu" else 1)

    monkeypatch.setattr(kernels, "selective_scan_2d", wrong)
    assert benchmark.usable_backends(CPU) == ["reference"]
    assert "cpu: not measured, relative error 1.0e-03" in capsys.readouterr().out


def test_a_backend_with_wrong_gradients_is_not_measured(monkeypatch):
    scan = kernels.selective_scan_2d

    def wrong(x, *parameters, backend, **promise):
        y = scan(x, *parameters, backend="reference")
        return y + 1e-3 * (x - x.detach()) if backend == "cpu" else y

    monkeypatch.setattr(kernels, "selective_scan_2d", wrong)
    assert benchmark.usable_backends(CPU) == ["reference"]


@pytest.mark.parametrize("right", [True, False])
def test_a_backend_is_checked_with_A_fixed_too(monkeypatch, right):
    scan = kernels.selective_scan_2d

    def wrong(*args, backend, fixed_A=False):
        y = scan(*args, fixed_A=fixed_A, backend=backend)
        return y * 1.001 if fixed_A and not right else y

    monkeypatch.setattr(kernels, "selective_scan_2d", wrong)
    assert ("cpu" in benchmark.usable_backends(CPU)) == right


TINY_FLAGS = ["--N", "8", "--M", "20", "--size", "64", "64", "--seconds", "0.01"]
PASSES = ("forward", "backward", "fwd+bwd")
# What each group does: maps are 32x32 at most, with 16 channels, the scan's with 32.
WORK = {
    "operator": [f"scan 1x32x32x32{A} {work}" for A in ("", " A fixed") for work in PASSES],
    "block": [f"SS2D 16 1x32x32 {work}" for work in PASSES],
    "network": ["forward 64x64"],
    "training": ["step 1x64x64 float32"],
    "codec": [
        f"{work} 64x64 {mode}" for mode in ("exact", "fast") for work in ("compress", "decompress")
    ],
    "variants": [f"{work} 64x64" for work in ("forward", "encode", "decode", "step")],
}


@pytest.mark.parametrize("group", benchmark.GROUPS)
def test_every_group_runs_whole(tmp_path, group):
    """All its work is measured, by the backends and networks that it is for, with its memory."""
    file = tmp_path / "b.json"
    benchmark.main(["--only", group, *TINY_FLAGS, "--json", str(file)])
    records = json.loads(file.read_text())["records"]
    assert not any("error" in record for record in records)
    backends = ["cpu", "reference"] if group in ("operator", "block", "network") else ["cpu"]
    nets = {"operator": [None], "block": [None], "variants": ["mambavc", "convvc", "swinvc"]}
    assert [(r.get("model"), r["backend"], r["name"]) for r in records] == [
        (net, backend, name)
        for net in nets.get(group, ["mambavc"]) for backend in backends for name in WORK[group]
        if "A fixed" not in name or backend == "cpu"
    ]  # fmt: skip
    for record in records:
        assert record["group"] == group
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        if benchmark.reset_peak(CPU) is not None:
            assert 0 <= record["peak_mib"] < record["total_mib"]
        has_scans = group != "operator" and record.get("model") not in ("convvc", "swinvc")
        assert record.get("A") == ("fixed" if has_scans else None)


@pytest.mark.parametrize("A", ["fixed", "trained"])
@pytest.mark.parametrize("group", ["block", "network", "training"])
def test_A_is_as_the_record_says(tmp_path, monkeypatch, group, A):
    """In all scans that the kernel does, whether gradients are wanted or not."""
    promises = set()
    forward = scan_cpu.scan_2d_forward

    def spy(inputs, fixed_A):
        promises.add(fixed_A)
        return forward(inputs, fixed_A)

    monkeypatch.setattr(benchmark, "usable_backends", lambda device: ["cpu"])
    monkeypatch.setattr(scan_cpu, "scan_2d_forward", spy)
    file = tmp_path / "b.json"
    flags = ["--trained-A"] if A == "trained" else []
    benchmark.main(["--only", group, *flags, *TINY_FLAGS, "--json", str(file)])
    assert {record["A"] for record in json.loads(file.read_text())["records"]} == {A}
    assert promises == {A == "fixed"}


def test_a_checkpoint_keeps_its_trained_A(tmp_path):
    model = tiny_model(**SHALLOW)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_logs"):
                parameter *= 1.1
    file = tmp_path / "b.json"
    flags = ["--models", save_checkpoint(model, tmp_path / "c.pth.tar"), "--only", "training"]
    benchmark.main([*flags, *TINY_FLAGS[4:], "--json", str(file)])
    (record,) = json.loads(file.read_text())["records"]
    assert (record["model"], record["A"]) == ("c.pth.tar", "trained")


def test_sizes_that_are_asked_for_replace_those_of_the_machine():
    work = benchmark.ON_GPU.of_sizes([(64, 128)])
    assert (work.maps, work.pictures, work.whole) == ([(1, 32, 64)], [(64, 128)], [(64, 128)])
    assert [str(kind) for kind in work.steps] == [
        "16x64x128 bf16 graph muon",
        "16x64x128 float32 graph muon",
        "16x64x128 bf16 muon",
        "8x64x128 float32",
        "8x64x128 float32 graph",
    ]


def test_a_step_that_was_skipped_gets_no_time():
    """Where the loss is not finite the optimisers do nothing, in no time."""
    model = tiny_model(**SHALLOW)
    with torch.no_grad():
        model.g_s[-1].bias.fill_(torch.inf)
    bench = benchmark.Bench(CPU, ["cpu"], 0.01)
    kind = benchmark.StepKind(1, 64, 64)
    benchmark.bench_step(bench, "training", "step", kind, "mambavc", model)
    (record,) = bench.records
    assert "median_ms" not in record
    assert record["error"] == "a step was not finite"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_has_its_nodes_and_the_memory_of_its_capture():
    bench = benchmark.Bench(torch.device("cuda"), ["triton"], 0.01)
    x = torch.rand(2**10, device="cuda")

    def double(times, x):
        room = torch.cat([x] * 2**14)  # 64 MiB, which no replay takes anew
        for _ in range(times):
            room.mul_(2)
        return room.sum()

    for times in (3, 10):
        replay = functools.partial(Replay(), functools.partial(double, times), x)
        bench.run("network", "double", "triton", replay, graphed=True)
    few, many = bench.records
    assert many["nodes"] - few["nodes"] == 7
    assert few["nodes"] < 20
    for record in bench.records:
        assert "peak_mib" not in record
        assert record["total_mib"] > 64


def test_any_network_is_measured_at_any_size(tmp_path):
    file = tmp_path / "b.json"
    flags = ["--only", "network", "--models", "mambavc-light", "convvc", *TINY_FLAGS]
    benchmark.main([*flags, "--size", "64", "128", "--json", str(file)])
    records = json.loads(file.read_text())["records"]
    assert [(record["model"], record["name"]) for record in records] == [
        ("mambavc-light", "forward 64x128"),
        ("mambavc-light", "forward 64x128"),
        ("convvc", "forward 64x128"),
        ("convvc", "forward 64x128"),
    ]


def test_networks_run_on_a_backend_that_passed(monkeypatch):
    used = []
    monkeypatch.setattr(benchmark, "usable_backends", lambda device: ["reference"])
    monkeypatch.setattr(
        benchmark.Bench,
        "run",
        lambda self, group, name, backend, function, **extra: used.append(
            (backend, choose_scan("auto", "cpu"))
        ),
    )
    benchmark.main(["--only", "codec", *TINY_FLAGS])
    assert set(used) == {("reference", "reference")}


def test_a_failure_is_recorded_without_a_time():
    bench = benchmark.Bench(CPU, ["cpu"], 0.01)

    def fail():
        raise RuntimeError("no room\nand more")

    bench.run("operator", "scan", "cpu", fail)
    assert bench.records == [
        {"group": "operator", "name": "scan", "backend": "cpu", "error": "no room"}
    ]


def test_memory_is_that_of_the_measured_function():
    """256 MiB that are held for a moment show up once, and are forgotten by the next."""
    if benchmark.reset_peak(CPU) is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    bench = benchmark.Bench(CPU, ["cpu"], 0.01)
    bench.run("operator", "large", "cpu", lambda: torch.ones(2**26).sum())
    bench.run("operator", "small", "cpu", lambda: None)
    large, small = bench.records
    # Something else may be returned to the system meanwhile.
    assert large["peak_mib"] > 0.9 * 256
    assert small["peak_mib"] < 0.1 * 256
    assert large["total_mib"] - small["total_mib"] > 0.8 * 256


def test_passes_are_measured_apart_and_together():
    bench = benchmark.Bench(CPU, ["cpu"], 0.01)
    x = torch.rand(10, requires_grad=True)
    benchmark.bench_passes(bench, "operator", "square", "cpu", lambda: x * x, [x], floor_ms=1)
    names = [record["name"] for record in bench.records]
    assert names == ["square forward", "square backward", "square fwd+bwd"]
    assert ["floor_ms" in record for record in bench.records] == [True, False, False]
    for record in bench.records:
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]


def test_ratios_to_floor_and_peers(capsys):
    fast = {"group": "g", "name": "scan", "backend": "a", "median_ms": 2.0, "floor_ms": 1.0}
    slow = {"group": "g", "name": "scan", "backend": "b", "median_ms": 6.0, "floor_ms": 1.0}
    failed = {"group": "g", "name": "scan", "backend": "c", "error": "no room"}
    alone = {"group": "g", "name": "another", "backend": "b", "median_ms": 1.0}
    of_network = [{**each, "model": "m", "floor_ms": None} for each in (fast, slow)]
    benchmark.print_ratios([slow, fast, failed, alone, *of_network])
    assert capsys.readouterr().out == (
        "scan: a; b takes 3.0 times as long; 50% of the floor\n"
        "m scan: a; b takes 3.0 times as long\n"
    )


def test_what_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def no_room(*args):
        raise RuntimeError("no room")

    monkeypatch.setitem(benchmark.GROUPS, "block", no_room)
    file = tmp_path / "b.json"
    benchmark.main(["--only", "block", "network", *TINY_FLAGS, "--json", str(file)])
    content = json.loads(file.read_text())
    assert content["machine"]["device"] == "CPU"
    assert content["machine"]["torch"] == str(torch.__version__)
    assert content["records"][0] == {"group": "block", "name": "rest", "error": "no room"}
    assert content["records"][1]["name"] == "forward 64x64"
    assert "block     the rest failed: no room" in capsys.readouterr().out
