"""Chains of convolutions: kernels and gradients against PyTorch's layers in float64."""

import pytest
import torch
import torch.nn.functional as F
from stage_checks import DEVICE, check, needs_kernels, with_gradients

from kernels import backends, conv_chain, fuses_convolutions

pytestmark = needs_kernels

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, None: lambda x: x}
CASES = {
    "residual-unit": ((2, 24, 5, 7), [(12, 1), (12, 3), (24, 1)], ["relu"] * 3, True),
    "slice-transform": ((1, 40, 8, 8), [(33, 3), (20, 3), (4, 3)], ["gelu", "gelu", None], False),
    "one-pixel": ((1, 16, 1, 1), [(16, 3)], ["gelu"], True),
    "pixels-in-shares": ((4, 8, 16, 16), [(16, 1), (8, 3)], ["relu", None], True),
}


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """On a CPU in the interpreter."""
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: True)


@pytest.mark.parametrize("case", CASES)
def test_chain_is_pytorchs(case, monkeypatch):
    """In float32: rounded to half precision, some values would pass a ReLU on one side only."""
    shape, layers, activations, residual = CASES[case]
    dtype = torch.float32
    monkeypatch.setattr(backends, "half_precision", lambda x: dtype)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    weights, biases, width = [], [], shape[1]
    for out, side in layers:
        weights.append((torch.randn(out, width, side, side) / (width * side**2) ** 0.5).to(x))
        biases.append(torch.randn(out).to(x))
        width = out

    def reference(x, *parameters):
        y = x
        for i, name in enumerate(activations):
            weight, bias = parameters[2 * i : 2 * i + 2]
            y = F.conv2d(y, weight, bias, padding=weight.shape[-1] // 2)
            y = ACTIVATIONS[name](y + x if residual and i == len(activations) - 1 else y)
        return y

    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair]
    inputs = [value.requires_grad_() for value in (x, *parameters)]
    out = conv_chain(x, weights, biases, activations, residual)
    dout = torch.randn_like(out)
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)
    check(results, with_gradients(reference, inputs, dout), inputs)


def test_only_half_precision_is_taken_over():
    x = torch.randn(1, 8, 4, 4, device=DEVICE)
    assert not fuses_convolutions(x)
    assert not fuses_convolutions(x.double())
    assert fuses_convolutions(x.bfloat16())
    assert not fuses_convolutions(x[:0].bfloat16())
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fuses_convolutions(x)
        assert not fuses_convolutions(x.double())  # the exact entropy path
