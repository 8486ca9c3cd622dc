"""What the tests of the stages around the scan share: devices, tolerances, comparisons."""

import importlib.util
import os

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton with a CUDA device or TRITON_INTERPRET=1",
)

# Rounding of one operation, times about ten for the sums.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


def error(result, expected):
    expected = expected.double()
    return (result.double() - expected).norm() / expected.norm().clamp_min(1e-30)


def with_gradients(function, inputs, dout):
    """Output and all gradients in float64."""
    inputs = [value.double().detach().requires_grad_() for value in inputs]
    out = function(*inputs)
    return out.detach(), torch.autograd.grad(out, inputs, dout.double())


def check(results, expected, inputs, dtype=None):
    """Compare an output, of the first input's dtype or another, and its gradients.

    Each at the precision of its dtype.
    """
    out, gradients = results[0], results[1:]
    assert out.dtype == (dtype or inputs[0].dtype)
    assert error(out, expected[0]) < TOLERANCE[out.dtype]
    for gradient, reference, value in zip(gradients, expected[1], inputs, strict=True):
        assert gradient.shape == value.shape and gradient.dtype == value.dtype
        assert error(gradient, reference) < TOLERANCE[value.dtype]
