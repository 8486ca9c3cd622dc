"""kernels/project.py: the product and its gradients, whatever the map looks like in memory."""

import pytest
import torch
import torch.nn.functional as F

from kernels import backends, project, project_halves
from kernels.project import fork_project

MAPS = {
    "dense": lambda: torch.randn(2, 5, 7, 24),
    "one pixel": lambda: torch.randn(1, 1, 1, 24),
    "one row": lambda: torch.randn(2, 1, 9, 24),
    "one column": lambda: torch.randn(2, 9, 1, 24),
    "slice": lambda: torch.randn(2, 5, 14, 48)[:, :, ::2, 12:36],
    "channels first": lambda: torch.randn(2, 24, 5, 7).permute(0, 2, 3, 1),
    "expanded": lambda: torch.randn(2, 1, 1, 24).expand(2, 5, 7, 24),
    "float64": lambda: torch.randn(2, 5, 7, 24, dtype=torch.float64),
}


@pytest.mark.parametrize("name", MAPS)
def test_it_is_a_linear_layer(name):
    x = MAPS[name]().requires_grad_()
    weight = torch.randn(10, 24, dtype=x.dtype, requires_grad=True)
    dy = torch.randn(*x.shape[:-1], 10, dtype=x.dtype)
    y, expected = project(x, weight), F.linear(x, weight)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y, (x, weight), dy)
    # Sums of up to 70 products of normal numbers: 1e-5 is what float32 leaves.
    for actual, wanted in zip(
        gradients, torch.autograd.grad(expected, (x, weight), dy), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "slice", "channels first"])
@pytest.mark.parametrize("fused", [True, False])
def test_halves_are_two_products(name, fused, monkeypatch):
    monkeypatch.setattr(backends, "fused_precision", lambda x: x.dtype if fused else None)
    x = MAPS[name]().requires_grad_()
    weight = torch.randn(10, 24, requires_grad=True)
    halves = project_halves(x, weight)
    expected = F.linear(x, weight)
    torch.testing.assert_close(torch.cat(halves, dim=-1), expected)
    dout = torch.randn_like(expected)
    for actual, wanted in zip(
        torch.autograd.grad(halves, (x, weight), dout.chunk(2, dim=-1)),
        torch.autograd.grad(expected, (x, weight), dout),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "slice", "channels first"])
@pytest.mark.parametrize("fused", [True, False])
def test_fork_adds_both_gradients(name, fused, monkeypatch):
    monkeypatch.setattr(backends, "fused_precision", lambda x: x.dtype if fused else None)
    x = MAPS[name]().requires_grad_()
    weight = torch.randn(10, 24, requires_grad=True)
    same, product = fork_project(x, weight)
    assert torch.equal(same, x)
    torch.testing.assert_close(product, F.linear(x, weight))
    expected = F.linear(x, weight).sum() + x.square().sum()
    found = product.sum() + same.square().sum()
    for actual, wanted in zip(
        torch.autograd.grad(found, (x, weight)),
        torch.autograd.grad(expected, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
