"""Which backend runs: by name, by the environment, inside `use_backend`, by device."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backends, selective_scan_2d, use_backend

ROOT = Path(__file__).parent.parent

needs_numba = pytest.mark.skipif(
    kernels.available_backends("cpu")["cpu"] is not None, reason="needs Numba"
)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv("MAMBAVC_SCAN_BACKEND", raising=False)
    backends._log_choice.cache_clear()
    yield
    backends._log_choice.cache_clear()


def make_inputs():
    """Arguments of `selective_scan_2d` for a map with 32 channels, 4 states and rank 2."""
    sizes = [(1, 3, 4, 32), (4, 10, 32), (4, 32, 2), (4, 32), (128, 4), (128,)]
    return [torch.randn(size) * 0.2 for size in sizes]


def without(monkeypatch, *missing):
    monkeypatch.setattr(backends, "_INSTALLED", backends._INSTALLED - set(missing))


@needs_numba
def test_auto_takes_the_compiled_backend_and_says_so_once(caplog):
    inputs = make_inputs()
    with caplog.at_level(logging.INFO, "mambavc"):
        y = selective_scan_2d(*inputs)
        selective_scan_2d(*inputs)
    assert torch.equal(y, selective_scan_2d(*inputs, backend="cpu"))
    assert [record.getMessage() for record in caplog.records] == [
        "scan backend for cpu tensors: cpu"
    ]


def test_auto_falls_back_to_the_reference_and_says_why_once(monkeypatch, caplog):
    without(monkeypatch, "numba")
    inputs = make_inputs()
    with caplog.at_level(logging.INFO, "mambavc"):
        y = selective_scan_2d(*inputs)
        selective_scan_2d(*inputs)
    assert torch.equal(y, selective_scan_2d(*inputs, backend="reference"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "reference" in record.getMessage()
    assert "pip install numba" in record.getMessage()


@pytest.mark.parametrize(
    ("backend", "missing", "message"),
    [
        ("cpu", ["numba"], "'cpu' cannot run: numba is not installed; run: pip install numba"),
        pytest.param("triton", [], "cuda tensors only, got cpu"),
        pytest.param("mamba_ssm", [], "cuda tensors only, got cpu"),
    ],
)
def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch, backend, missing, message):
    without(monkeypatch, *missing)
    with pytest.raises(RuntimeError, match=message):
        selective_scan_2d(*make_inputs(), backend=backend)


def test_missing_cuda_packages_are_named_with_their_install_command(monkeypatch):
    without(monkeypatch, "triton", "mamba_ssm")
    reasons = kernels.available_backends("cuda")
    assert "pip install triton" in reasons["triton"]
    assert "requirements-cuda.txt" in reasons["mamba_ssm"]
    assert reasons["reference"] is None


def test_unknown_backend_lists_the_known():
    known = "choose auto, triton, cpu, mamba_ssm, reference"
    with pytest.raises(ValueError, match=f"'cuda'; {known}"):
        selective_scan_2d(*make_inputs(), backend="cuda")


def test_environment_variable_stands_for_auto_only(monkeypatch):
    inputs = make_inputs()
    expected = selective_scan_2d(*inputs, backend="reference")
    monkeypatch.setenv("MAMBAVC_SCAN_BACKEND", "reference")
    assert torch.equal(selective_scan_2d(*inputs), expected)
    monkeypatch.setenv("MAMBAVC_SCAN_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"MAMBAVC_SCAN_BACKEND: .* 'fastest'"):
        selective_scan_2d(*inputs)
    assert torch.equal(selective_scan_2d(*inputs, backend="reference"), expected)


def test_use_backend_stands_for_auto_until_it_ends(monkeypatch):
    monkeypatch.setenv("MAMBAVC_SCAN_BACKEND", "fastest")
    with use_backend("reference"):
        assert backends.choose_scan("auto", "cpu") == "reference"
        with pytest.raises(KeyError), use_backend("auto"):
            assert backends.choose_scan("auto", "meta") == "reference"
            assert not backends.runs_stage_kernels("cpu")
            raise KeyError
        assert backends.choose_scan("auto", "cuda") == "reference"
    with pytest.raises(ValueError, match="'fastest'"):
        backends.choose_scan("auto", "cpu")


def test_use_backend_refuses_an_unknown_name_and_one_that_cannot_run():
    with pytest.raises(ValueError, match="'fastest'; choose auto, triton"), use_backend("fastest"):
        pass
    with use_backend("triton"), pytest.raises(RuntimeError, match="cuda tensors only, got cpu"):
        selective_scan_2d(*make_inputs())


def test_reference_turns_the_kernels_of_the_stages_off(monkeypatch):
    packages = {backend.package for backend in backends._BACKENDS.values()}
    monkeypatch.setattr(backends, "_INSTALLED", packages)
    assert backends.runs_stage_kernels("cuda") and not backends.runs_stage_kernels("cpu")
    with use_backend("reference"):
        assert not backends.runs_stage_kernels("cuda")
    monkeypatch.setenv("MAMBAVC_SCAN_BACKEND", "reference")
    assert not backends.runs_stage_kernels("cuda")
    monkeypatch.setenv("MAMBAVC_SCAN_BACKEND", "mamba_ssm")
    assert backends.runs_stage_kernels("cuda")
    without(monkeypatch, "triton")
    assert not backends.runs_stage_kernels("cuda")


def test_float32_is_fused_where_it_may_take_tf32_only(monkeypatch, tf32):
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: True)
    x = torch.empty(1)
    assert backends.fused_precision(x) == torch.float32
    with torch.no_grad():
        assert backends.fused_precision(x) == torch.float32
    for precision in ("highest", "high"):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "highest"):
            torch.set_float32_matmul_precision(precision)
            assert backends.fused_precision(x) is None
            assert backends.product_precision(x.dtype) == "ieee"
    assert backends.product_precision(torch.float32) == "tf32"
    assert backends.product_precision(torch.float64) == "ieee"


def test_other_precisions_are_fused_whatever_the_settings(monkeypatch):
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: True)
    half, double = torch.empty(1, dtype=torch.float16), torch.empty(1, dtype=torch.float64)
    assert backends.fused_precision(half) == torch.float16
    assert backends.fused_precision(double) is None
    with torch.no_grad():
        assert backends.fused_precision(double) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert backends.fused_precision(torch.empty(1)) == torch.bfloat16
        assert backends.fused_precision(half) == torch.float16
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: False)
    assert backends.fused_precision(half) is None


@needs_numba
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_a_compiled_call_runs_what_is_asked_for_at_its_time(backend):
    torch._dynamo.reset()
    inputs = make_inputs()
    compiled = torch.compile(selective_scan_2d, fullgraph=True, backend="eager")
    expected = {name: selective_scan_2d(*inputs, backend=name) for name in ("cpu", "reference")}
    assert not torch.equal(expected["cpu"], expected["reference"])
    named = "cpu" if backend == "auto" else backend
    assert torch.equal(compiled(*inputs, backend=backend), expected[named])
    with use_backend("reference"):
        named = "reference" if backend == "auto" else backend
        assert torch.equal(compiled(*inputs, backend=backend), expected[named])


def test_available_backends_tells_what_runs_on_cpu_tensors():
    backends = kernels.available_backends()
    assert list(backends) == ["triton", "cpu", "mamba_ssm", "reference"]
    assert backends["reference"] is None
    assert "cuda" in backends["triton"]


def test_operators_do_not_import_pytorchs_compiler():
    """Which takes seconds, and what codes pictures needs none."""
    pytest.importorskip("triton", reason="needs Triton")
    program = (
        "import sys, torch, kernels\n"
        "x = torch.randn(1, 8, 8, 96)\n"
        "ones = torch.ones(96)\n"
        "ops = torch.ops.mambavc\n"
        "ops.norm_gate(x, x, ones, ones, 1e-5)\n"
        "ops.layer_norm(x, ones, ones, 1e-5, torch.float32)\n"
        "ops.depthwise_conv_silu(x, torch.randn(96, 1, 3, 3), ones)\n"
        "ops.window_attention(x, torch.zeros(2, 7, 7), 2)\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
