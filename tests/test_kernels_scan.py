"""The public scan: checks of its arguments, precision, agreement of the backends."""

import subprocess
import sys

import pytest
import torch

import kernels
from kernels import selective_scan_2d

CUDA = torch.cuda.is_available()
needs_numba = pytest.mark.skipif(
    kernels.available_backends("cpu")["cpu"] is not None, reason="needs Numba"
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_numba)]


def make_inputs(batch=1, height=3, width=4, dim=32, dstate=4, rank=2, dtype=torch.float32):
    def normal(*size):
        return torch.randn(size, dtype=dtype)

    return [
        normal(batch, height, width, dim),
        normal(4, rank + 2 * dstate, dim) * dim**-0.5,
        normal(4, dim, rank),
        normal(4, dim) - 3,
        normal(4 * dim, dstate) * 0.1,
        normal(4 * dim),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_all_arguments_match_differences(backend):
    inputs = make_inputs(1, 2, 3, 3, 2, 2, torch.float64)
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(lambda *a: selective_scan_2d(*a, backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_are_taken(backend):
    inputs = make_inputs(2, 5, 3, 24)
    expected = selective_scan_2d(*inputs, backend=backend)
    image = inputs[0].permute(0, 3, 1, 2).contiguous()  # as a convolution leaves it
    inputs[0] = image.permute(0, 2, 3, 1)
    inputs[1] = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[3] = inputs[3].repeat(1, 2)[:, :24]
    assert not any(inputs[i].is_contiguous() for i in (0, 1, 3))
    # Only the matrix product may see the strides.
    torch.testing.assert_close(selective_scan_2d(*inputs, backend=backend), expected)


@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_maps(backend, dtype, parameter):
    inputs = make_inputs()
    inputs = [inputs[0].to(dtype), *(value.to(parameter) for value in inputs[1:])]
    y = selective_scan_2d(*inputs, backend=backend)
    assert y.dtype == dtype
    truth = selective_scan_2d(*(value.double() for value in inputs), backend="reference")
    # The projection is rounded to 8 or 11 bits, and so is the result.
    assert (y - truth).abs().max() <= 2e-2 * truth.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_lowers_the_projection_only(backend):
    inputs = [value.requires_grad_() for value in make_inputs(2, 4, 5)]
    full = selective_scan_2d(*inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan_2d(*inputs, backend=backend)
    assert y.dtype == torch.float32
    assert not torch.equal(y, full)
    assert (y - full).abs().max() <= 2e-2 * full.abs().max()
    for gradient in torch.autograd.grad(y.sum(), inputs):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


def test_float64_maps_are_scanned_in_float64():
    inputs = make_inputs(dtype=torch.float64)
    truth = selective_scan_2d(*inputs, backend="reference")
    inputs[1:] = [value.float() for value in inputs[1:]]
    y = selective_scan_2d(*inputs, backend="reference")
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)  # the parameters were rounded


@needs_numba
def test_a_promised_A_is_not_taken_for_exact_in_float64():
    inputs = make_inputs()
    inputs[4] = torch.arange(1, 5).log().expand(128, 4)  # rounded to float32
    inputs = [value.double() for value in inputs]
    expected = selective_scan_2d(*inputs, backend="cpu")
    assert torch.equal(selective_scan_2d(*inputs, fixed_A=True, backend="cpu"), expected)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (3, 4, 32), r"x must be \(batch, height, width, dim\).*got \(3, 4, 32\)"),
        (0, (1, 0, 4, 32), r"not empty, got \(1, 0, 4, 32\)"),
        (1, (4, 10, 31), r"x_proj_weight must be \(4, 10, 32\).*got \(4, 10, 31\)"),
        (2, (2, 32, 2), r"dt_projs_weight must be \(4, 32, 2\).*got \(2, 32, 2\)"),
        (2, (4, 32), r"dt_projs_weight must be \(4, dim, dt_rank\).*got \(4, 32\)"),
        (3, (128,), r"dt_projs_bias must be \(4, 32\).*got \(128,\)"),
        (4, (32, 4), r"A_logs must be \(128, 4\).*got \(32, 4\)"),
        (5, (4, 32), r"Ds must be \(128,\).*got \(4, 32\)"),
    ],
)
def test_wrong_shapes_are_named(index, shape, message):
    inputs = make_inputs()
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        selective_scan_2d(*inputs)


@pytest.mark.parametrize("sizes", [{"rank": 0}, {"dstate": 0}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rank_and_no_states_are_refused(backend, sizes):
    with pytest.raises(ValueError, match="dt_rank and dstate must be at least 1, got"):
        selective_scan_2d(*make_inputs(**sizes), backend=backend)


def test_wrong_dtype_is_named():
    x, *parameters = make_inputs()
    with pytest.raises(ValueError, match=r"x must be one of float32.*got torch.int64"):
        selective_scan_2d(x.long(), *parameters)


def test_needs_nothing_but_pytorch():
    program = (
        "import sys\n"
        "for name in ('numba', 'triton', 'mamba_ssm', 'timm', 'einops', 'compressai'):\n"
        "    sys.modules[name] = None\n"
        "import torch, kernels\n"
        "sizes = [(1, 2, 3, 8), (4, 5, 8), (4, 8, 1), (4, 8), (32, 2), (32,)]\n"
        "y = kernels.selective_scan_2d(*(torch.randn(size) for size in sizes))\n"
        "assert y.shape == (1, 2, 3, 8) and y.isfinite().all()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "mamba_ssm", "reference"])
def test_cuda_backends_agree_with_the_reference(backend):
    reason = kernels.available_backends("cuda")[backend]
    if reason is not None:
        pytest.skip(reason)
    inputs = [value.cuda().requires_grad_() for value in make_inputs(2, 5, 7, 64, 16, 4)]
    truth_inputs = [value.detach().double().requires_grad_() for value in inputs]
    truth = selective_scan_2d(*truth_inputs, backend="reference")
    y = selective_scan_2d(*inputs, backend=backend)
    assert (y - truth).abs().max() <= 1e-5 * truth.abs().max()
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, dy)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(truth, truth_inputs, dy.double()), strict=True
    ):
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()
