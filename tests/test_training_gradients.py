"""gradients.py: gradients in one vector are those that PyTorch has in many tensors."""

import math

import pytest
import torch
import torch.nn as nn

from training.gradients import FlatGradients


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.Flatten())
    return model.to(memory_format=torch.channels_last)


def backward(model, factor=1.0):
    (model(torch.ones(1, 3, 5, 5)).square().sum() * factor).backward()


@pytest.mark.parametrize("max_norm", [0.1, 1e9, math.inf])
def test_clipped_gradients_are_those_of_pytorch(max_norm):
    model, other = network(), network()
    backward(other)
    norm = nn.utils.clip_grad_norm_(other.parameters(), max_norm)
    flat = FlatGradients([*model.parameters()])
    for factor in (math.nan, 1.0):  # what a bad step leaves does not stay
        flat.clear()
        backward(model, factor)
        flat.take()
        found = flat.clip(max_norm)
    torch.testing.assert_close(found, norm)
    torch.testing.assert_close(flat.vector.norm(), norm.clamp(max=max_norm))
    for p, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)
        assert p.grad.stride() == p.stride()


def test_a_change_of_the_vector_is_one_of_the_gradients():
    model = network()
    unused = nn.Parameter(torch.ones(3))
    flat = FlatGradients([*model.parameters(), unused])
    backward(model)
    flat.take()
    before = [p.grad.clone() for p in model.parameters()]
    flat.vector *= 2
    for p, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, 2 * gradient)
    assert unused.grad is None
    flat.clear()
    assert all(p.grad is None for p in model.parameters())
