"""The compiled CPU scan and its gradients against the reference in float64."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from kernels import scan_reference as reference

pytest.importorskip("numba", reason="needs Numba")

from kernels import scan_cpu as cpu_scan
from kernels.scan_reference import ScanInputs

NAMES = ScanInputs._fields

# What the operator promises, forward and for every gradient. Low precision rounds only its inputs
# and results: one half unit in the last of 8 or 11 bits, relative to the largest number.
TOLERANCE = {
    torch.float32: (1e-5, 1e-4),
    torch.float64: (1e-13, 1e-13),
    torch.bfloat16: (2**-8, 2**-8),
    torch.float16: (2**-11, 2**-11),
}

# batch, height, width, dim, dstate, dt_rank
SHAPES = [
    pytest.param((1, 1, 1, 32, 16, 2), id="one-pixel"),
    pytest.param((1, 1, 17, 64, 16, 4), id="one-row-one-past-a-chunk"),
    pytest.param((2, 15, 1, 64, 1, 1), id="one-column-one-state-one-short-of-a-chunk"),
    pytest.param((1, 4, 8, 128, 8, 8), id="whole-chunks-two-blocks"),
    pytest.param((3, 3, 5, 160, 16, 6), id="batch-of-three-and-part-of-a-block"),
    pytest.param((1, 7, 13, 65, 3, 5), id="primes-and-one-channel-past-a-block"),
    pytest.param((1, 5, 6, 768, 16, 24), id="more-blocks-than-directions"),
]


def make_inputs(shape, dtype=torch.float32, bias=None, fixed_A=False):
    """Arguments of the scan, with steps like those of a trained network, and a gradient of y."""
    batch, height, width, dim, dstate, rank = shape
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size):
        return torch.randn(size, dtype=torch.float64)

    first = torch.arange(1, dstate + 1, dtype=torch.float64).log()
    inputs = ScanInputs(
        normal(batch, height, width, dim).to(dtype),
        normal(batch, height, width, 4, rank + 2 * dstate).to(dtype),
        (normal(4, dim, rank) * rank**-0.5).to(parameter),
        (normal(4, dim) - 3 if bias is None else torch.full((4, dim), bias)).to(parameter),
        (first + (0 if fixed_A else 0.1) * normal(4 * dim, dstate)).to(parameter),
        (1 + 0.1 * normal(4 * dim)).to(parameter),
    )
    return inputs, normal(batch, height, width, dim).to(dtype)


def expected(inputs, dy):
    inputs = ScanInputs(*(value.detach().double().requires_grad_() for value in inputs))
    y = reference.scan_2d(inputs)
    return y.detach(), torch.autograd.grad(y, inputs, dy.double())


def error(result, truth):
    """Largest difference, relative to the largest number."""
    return (result.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)


def assert_matches(inputs, dy, tolerance, gradient_tolerance, fixed_A=False):
    y_truth, truths = expected(inputs, dy)
    y = cpu_scan.scan_2d_forward(inputs, fixed_A)
    assert y.dtype == inputs[0].dtype
    assert error(y, y_truth) <= tolerance
    gradients = cpu_scan.scan_2d_backward(dy, inputs, fixed_A)
    for name, value, gradient, truth in zip(NAMES, inputs, gradients, truths, strict=True):
        if fixed_A and name == "A_logs":
            assert gradient.shape == (0,)
            continue
        assert (gradient.shape, gradient.dtype) == (value.shape, value.dtype), name
        assert error(gradient, truth) <= gradient_tolerance, name


GENERAL_AND_FIXED = pytest.mark.parametrize("fixed_A", [False, True], ids=["general", "fixed"])


@GENERAL_AND_FIXED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape, dtype, fixed_A):
    inputs = make_inputs(shape, dtype, fixed_A=fixed_A)
    assert_matches(*inputs, *TOLERANCE[dtype], fixed_A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype):
    assert_matches(*make_inputs((2, 4, 5, 96, 16, 6), dtype), *TOLERANCE[dtype])


@GENERAL_AND_FIXED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [-20.0, 0.0, 12.0, 19.0, 21.0], ids=str)
def test_small_and_large_steps_match(bias, dtype, fixed_A):
    # At 19 and 21 the projection puts some steps on either side of softplus' threshold of 20.
    inputs = make_inputs((1, 3, 6, 64, 16, 4), dtype, bias, fixed_A)
    assert_matches(*inputs, *TOLERANCE[dtype], fixed_A)


@GENERAL_AND_FIXED
def test_slow_decays_match_over_many_steps(fixed_A):
    # Delta of about 1e-3, the least that a layer starts with: states keep hundreds of steps, over
    # which errors of their decays add up.
    inputs = make_inputs((1, 48, 48, 32, 16, 2), bias=-7.0, fixed_A=fixed_A)
    inputs[0].dt_projs_weight.mul_(0.1)
    assert_matches(*inputs, *TOLERANCE[torch.float32], fixed_A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_steps_keep_their_relative_precision(dtype):
    # Without the D term the result is proportional to delta, about e^-60.
    inputs, _ = make_inputs((1, 3, 6, 64, 16, 4), dtype, bias=-60.0)
    inputs.Ds.zero_()
    truth = reference.scan_2d(ScanInputs(*(value.double() for value in inputs)))
    assert truth.abs().max() < 1e-22
    # Rounding z = -60 by half a unit in the last place changes e^z by 60 times that.
    tolerance = 60 * 4 * torch.finfo(dtype).eps
    assert error(cpu_scan.scan_2d_forward(inputs), truth) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_steps_leave_only_the_skip(dtype):
    inputs, _ = make_inputs((1, 3, 6, 64, 16, 4), dtype, bias=-float("inf"))
    y = cpu_scan.scan_2d_forward(inputs)
    skip = inputs.x * inputs.Ds.view(4, -1).sum(0)
    torch.testing.assert_close(y, skip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_steps_forget_the_past_exactly(dtype):
    inputs, dy = make_inputs((1, 3, 6, 64, 16, 4), dtype, bias=1e6)
    inputs.A_logs.fill_(0.0)
    assert_matches(inputs, dy, *TOLERANCE[dtype])
    before = cpu_scan.scan_2d_forward(inputs)
    inputs.x[:, 0, 0] += 1e3
    after = cpu_scan.scan_2d_forward(inputs)
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert torch.equal(before[:, 0, 1:], after[:, 0, 1:])


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_lost(name):
    inputs, _ = make_inputs((1, 2, 3, 64, 4, 4))
    getattr(inputs, name).flatten()[0] = float("nan")
    assert cpu_scan.scan_2d_forward(inputs).isnan().any()


def test_gradients_match_differences():
    inputs, _ = make_inputs((1, 2, 3, 2, 2, 1), torch.float64)

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return cpu_scan.scan_2d_forward(ScanInputs(*inputs))

        @staticmethod
        def backward(ctx, dy):
            return cpu_scan.scan_2d_backward(dy, ScanInputs(*ctx.saved_tensors))

    assert torch.autograd.gradcheck(Scan.apply, [value.requires_grad_() for value in inputs])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(inputs, dy, fixed_A=False):
    y = cpu_scan.scan_2d_forward(inputs, fixed_A)
    return y, *cpu_scan.scan_2d_backward(dy, inputs, fixed_A)


@GENERAL_AND_FIXED
def test_results_do_not_depend_on_threads(threads, monkeypatch, fixed_A):
    monkeypatch.setattr(cpu_scan, "SMALL", 0)
    inputs, dy = make_inputs((2, 7, 9, 200, 16, 4), fixed_A=fixed_A)
    threads(1)
    alone = run(inputs, dy, fixed_A)
    for count in (2, 3, 9):  # with 9 the forward jobs have fewer channels
        threads(count)
        for a, b in zip(alone, run(inputs, dy, fixed_A), strict=True):
            assert torch.equal(a, b)


def test_several_threads_may_call_at_once(threads, monkeypatch):
    monkeypatch.setattr(cpu_scan, "SMALL", 0)
    threads(2)
    inputs, dy = make_inputs((1, 6, 7, 128, 16, 4))
    alone = run(inputs, dy)
    results = []
    callers = [threading.Thread(target=lambda: results.append(run(inputs, dy))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    assert all(torch.equal(a, b) for result in results for a, b in zip(alone, result, strict=True))


def test_runs_where_no_cache_can_be_written(tmp_path):
    shutil.copy(cpu_scan.__file__, tmp_path)
    (tmp_path / "__pycache__").touch()  # a file where Numba would make its folder
    environment = {**os.environ, "HOME": os.devnull, "XDG_CACHE_HOME": os.devnull}
    environment.pop("NUMBA_CACHE_DIR", None)
    environment["PYTHONPATH"] = str(Path(cpu_scan.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", "import scan_cpu; assert scan_cpu._pixel(1, 1, 2, 3) == 3"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_compiled_code_is_not_taken_from_the_cache_when_the_vectors_have_changed(tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(
        Path(cpu_scan.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    vectors = folder / "scan_cpu_vectors.py"

    def cached() -> set[str]:
        program = "from kernels import scan_cpu; assert scan_cpu._pixel(1, 1, 2, 3) == 3"
        environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
        return {path.name for path in folder.glob("__pycache__/*.nbi")}

    first = cached()
    assert first and cached() == first
    vectors.write_text(vectors.read_text() + "# changed\n")
    assert cached() > first
