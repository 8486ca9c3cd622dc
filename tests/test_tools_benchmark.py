"""benchmark.py: what it records, and that it gives no time to a wrong result."""

import json
import os

import pytest
import torch

import kernels
from tools import benchmark

CPU = torch.device("cpu")


def test_a_backend_with_a_wrong_result_is_not_measured(monkeypatch, capsys):
    scan = kernels.selective_scan_2d

    def wrong(*args, backend):
        return scan(*args, backend="reference") * (1.001 if backend == "cpu" else 1)

    monkeypatch.setattr(kernels, "selective_scan_2d", wrong)
    assert benchmark.usable_backends(CPU) == ["reference"]
    assert "cpu: not measured, relative error 1.0e-03" in capsys.readouterr().out


def test_a_backend_with_wrong_gradients_is_not_measured(monkeypatch):
    scan = kernels.selective_scan_2d

    def wrong(x, *parameters, backend):
        y = scan(x, *parameters, backend="reference")
        return y + 1e-3 * (x - x.detach()) if backend == "cpu" else y

    monkeypatch.setattr(kernels, "selective_scan_2d", wrong)
    assert benchmark.usable_backends(CPU) == ["reference"]


def test_networks_run_on_a_backend_that_passed(monkeypatch):
    used = []
    monkeypatch.setattr(benchmark, "usable_backends", lambda device: ["reference"])
    monkeypatch.setattr(
        benchmark,
        "bench_network",
        lambda bench, backend: used.append((backend, os.environ["MAMBAVC_SCAN_BACKEND"])),
    )
    benchmark.main(["--only", "network"])
    assert used == [("reference", "reference")]


def test_a_failure_is_recorded_without_a_time():
    bench = benchmark.Bench(CPU, 0.01)

    def fail():
        raise RuntimeError("no room\nand more")

    bench.run("operator", "scan", "cpu", fail)
    assert bench.records == [
        {"group": "operator", "name": "scan", "backend": "cpu", "error": "no room"}
    ]


def test_gradients_are_measured_apart_and_together():
    bench = benchmark.Bench(CPU, 0.01)
    x = torch.rand(10, requires_grad=True)
    benchmark.bench_gradients(bench, "operator", "square", "cpu", lambda: x * x, [x])
    assert [record["name"] for record in bench.records] == ["square backward", "square fwd+bwd"]
    for record in bench.records:
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]


def test_ratios_to_floor_and_peers(capsys):
    fast = {"group": "g", "name": "scan", "backend": "a", "median_ms": 2.0, "floor_ms": 1.0}
    slow = {"group": "g", "name": "scan", "backend": "b", "median_ms": 6.0, "floor_ms": 1.0}
    failed = {"group": "g", "name": "scan", "backend": "c", "error": "no room"}
    other = {"group": "g", "name": "another", "backend": "b", "median_ms": 1.0}
    records = [fast, slow, failed, other]
    benchmark.add_ratios(records)
    assert fast["slower"] == {"b": pytest.approx(3)}
    assert fast["of_floor"] == pytest.approx(0.5)
    assert slow["slower"] == {"a": pytest.approx(1 / 3)}
    assert other["slower"] == {}
    benchmark.print_ratios(records)
    assert capsys.readouterr().out == "scan: a; b takes 3.0 times as long; 50% of the floor\n"


def test_records_are_written_with_the_machine(tmp_path, monkeypatch, capsys):
    def no_room(bench, backends):
        raise RuntimeError("no room")

    monkeypatch.setattr(benchmark, "bench_block", no_room)
    monkeypatch.setattr(
        benchmark, "bench_codec", lambda bench, backend: bench.run("codec", "made-up", backend, int)
    )
    file = tmp_path / "b.json"
    benchmark.main(["--only", "block", "codec", "--seconds", "0.01", "--json", str(file)])
    content = json.loads(file.read_text())
    assert content["machine"]["device"] == "CPU"
    assert content["machine"]["torch"] == str(torch.__version__)
    assert content["records"][0] == {"group": "block", "name": "rest", "error": "no room"}
    assert (content["records"][1]["name"], content["records"][1]["backend"]) == ("made-up", "cpu")
    assert "made-up" in capsys.readouterr().out
