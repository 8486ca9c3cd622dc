"""Chains of convolutions: kernels and gradients against PyTorch's layers in float64."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from stage_checks import (
    CUDA,
    DEVICE,
    TOLERANCE,
    check,
    error,
    needs_kernels,
    with_gradients,
)

from kernels import backends, conv_chain, fuses_convolutions, fuses_products
from layers.conv_chain import ConvChain, at_each_pixel

pytestmark = needs_kernels

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, None: lambda x: x}
UNIT = [(12, 1), (12, 3), (24, 1)]
CASES = {  # x, (width, side) of layers, activations, which layers add which maps
    "residual-unit": ((2, 24, 5, 7), UNIT, ["relu"] * 3, {2: 0}),
    "two-units": ((1, 24, 4, 4), [*UNIT, *UNIT, (8, 1)], ["relu"] * 6 + [None], {2: 0, 5: 3}),
    "slice-transform": ((1, 40, 8, 8), [(33, 3), (20, 3), (4, 3)], ["gelu", "gelu", None], {}),
    "one-pixel": ((1, 16, 1, 1), [(16, 3)], ["gelu"], {0: 0}),
    "pixels-in-shares": ((4, 8, 16, 16), [(16, 1), (8, 3)], ["relu", None], {1: 0}),
}


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """On a CPU in the interpreter."""
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: True)


@pytest.mark.parametrize("case", CASES)
def test_chain_is_pytorchs(case, monkeypatch):
    """In float32: rounded to half precision, some values would pass a ReLU on one side only."""
    shape, layers, activations, skips = CASES[case]
    dtype = torch.float32
    monkeypatch.setattr(backends, "fused_precision", lambda x: dtype)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    weights, biases, width = [], [], shape[1]
    for out, side in layers:
        weights.append((torch.randn(out, width, side, side) / (width * side**2) ** 0.5).to(x))
        biases.append(torch.randn(out).to(x))
        width = out

    def reference(x, *parameters):
        maps = [x]
        for i, name in enumerate(activations):
            weight, bias = parameters[2 * i : 2 * i + 2]
            y = F.conv2d(maps[-1], weight, bias, padding=weight.shape[-1] // 2)
            maps.append(ACTIVATIONS[name](y + maps[skips[i]] if i in skips else y))
        return maps[-1]

    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair]
    inputs = [value.requires_grad_() for value in (x, *parameters)]
    out = conv_chain(x, weights, biases, activations, skips=skips)
    dout = torch.randn_like(out)
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)
    check(results, with_gradients(reference, inputs, dout), inputs)


def test_linear_layers_run_the_kernels(monkeypatch):
    """With a residual that is not the chain's own map."""
    layers = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 12)).to(DEVICE)
    x, residual = (torch.randn(2, 3, 5, width, device=DEVICE) for width in (20, 12))
    inputs = [value.requires_grad_() for value in (x, residual, *layers.parameters())]
    dout = torch.randn(2, 3, 5, 12, device=DEVICE)
    expected = layers(x) + residual
    expected = expected.detach(), torch.autograd.grad(expected, inputs, dout)
    monkeypatch.setattr(backends, "fused_precision", lambda x: x.dtype)
    out = at_each_pixel(layers, x, residual)
    check((out.detach(), *torch.autograd.grad(out, inputs, dout)), expected, inputs)


def test_many_pixels_are_left_to_libraries_where_one_product_is_asked_for():
    x = torch.empty(1, 1, device=DEVICE, dtype=torch.bfloat16)
    assert fuses_products(x.expand(1, 8, 128, 256))
    assert not fuses_products(x.expand(1, 8, 129, 256))


def test_float32_trains_with_the_factors_that_pytorch_may_take(tf32):
    """Without a ReLU, which rounded sums would pass on the other side."""
    layers = [nn.Conv2d(40, 33, 3, padding=1), nn.GELU(), nn.Conv2d(33, 4, 3, padding=1)]
    layers = ConvChain(*layers).to(DEVICE)
    x = torch.randn(2, 40, 8, 8, device=DEVICE)
    inputs = [value.requires_grad_() for value in (x, *layers.parameters())]
    assert fuses_convolutions(x)
    out = layers(x)
    dout = torch.randn_like(out)
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)

    def reference(x, *parameters):
        first, second = parameters[:2], parameters[2:]
        return F.conv2d(F.gelu(F.conv2d(x, *first, padding=1)), *second, padding=1)

    expected, gradients = with_gradients(reference, inputs, dout)
    # TF32 cuts factors to 10 bits of their fraction: by less than 1e-3, twice in each product.
    tolerance = 2e-3 if CUDA else TOLERANCE[torch.float32]
    for result, each in zip(results, (expected, *gradients), strict=True):
        assert error(result, each) < tolerance


def test_only_these_precisions_are_taken_over():
    x = torch.randn(1, 8, 4, 4, device=DEVICE)
    assert not fuses_convolutions(x)
    assert not fuses_convolutions(x.double())
    assert fuses_convolutions(x.bfloat16())
    assert not fuses_convolutions(x[:0].bfloat16())
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fuses_convolutions(x)
        assert not fuses_convolutions(x.double())  # the exact entropy path
