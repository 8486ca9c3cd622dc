"""Weights cast together are autocast's own."""

import pytest
import torch
from conftest import SHALLOW

import models
from training.precision import LowPrecision


@pytest.mark.parametrize("name", ["mambavc", "swinvc"])
def test_results_and_gradients_are_autocasts(name):
    model = models.build_model(name, **SHALLOW).train()
    x = torch.rand(2, 3, 64, 64)

    def run(network):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            output = network(x)
        parts = [output["x_hat"].float(), *output["likelihoods"].values()]
        (sum(part.sum() for part in parts) + model.aux_loss()).backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        model.zero_grad()
        return parts, gradients

    (expected, expected_gradients), (found, gradients) = run(model), run(LowPrecision(model))
    assert all(map(torch.equal, found, expected))
    for key, gradient in expected_gradients.items():
        assert gradients[key].dtype == torch.float32
        assert gradients[key].stride() == gradient.stride(), key
        assert torch.equal(gradients[key], gradient), key
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
