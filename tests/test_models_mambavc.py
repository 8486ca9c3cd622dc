"""The network against the published one, its state dicts and its constructor."""

import json
from pathlib import Path

import numpy as np
import parity_fill
import pytest
import torch
from conftest import TINY

import models
from models import MambaVC, build_model

ASSETS = Path(__file__).parent / "assets"


def fill_(model, seed=0):
    """Give a model the parity weights, which depend on the names in its state dict only."""
    filled = {}
    for key, value in model.state_dict().items():
        if key.startswith("entropy_bottleneck.biases."):
            draw = parity_fill._rng(key, seed).uniform(-0.5, 0.5, value.shape)
            filled[key] = torch.from_numpy(draw.astype(np.float32))
        elif (weight := parity_fill.fill(key, tuple(value.shape), seed)) is not None:
            filled[key] = torch.from_numpy(np.asarray(weight)).reshape(value.shape)
    model.load_state_dict(filled, strict=False)
    return model


@pytest.fixture(scope="module")
def published():
    return fill_(build_model("mambavc")).eval()


def test_state_dict_is_that_of_the_published_network(published):
    shapes = json.loads((ASSETS / "published_state_dict_shapes.json").read_text())
    assert {key: list(value.shape) for key, value in published.state_dict().items()} == shapes


@torch.no_grad()
def test_outputs_are_those_of_the_published_network(published):
    """Expected means and scales hold every fifth channel, x_hat every fourth pixel.

    What follows y is compared on the published y, whose 45 elements within 2e-4 of a rounding
    boundary were moved to that distance, on the side the published network rounded to. One of
    them lies on the boundary to the last bit of float32 (2.5 from its mean; float64 gives
    2.5000089), so that any other rounding error changes its symbol and all slices after it.
    """
    stored = np.load(ASSETS / "published_256x256.npz")
    expected = {key: torch.from_numpy(value) for key, value in stored.items()}
    x = torch.from_numpy(parity_fill.image(256, 256, seed=0))
    predictions = []
    y = published.g_a(x)
    hooks = [
        published.g_a.register_forward_hook(lambda *_: expected["y"]),
        published.gaussian_conditional.register_forward_pre_hook(
            lambda _, inputs: predictions.append(inputs)
        ),
    ]
    output = published(x)
    for hook in hooks:
        hook.remove()
    actual = {
        "y": y,
        "z": published.h_a(y),
        "means": torch.cat([mean for _, _, mean in predictions], dim=1)[:, ::5],
        "scales": torch.cat([scale for _, scale, _ in predictions], dim=1)[:, ::5],
        "x_hat": output["x_hat"][..., ::4, ::4],
    }
    # Float32 rounding through 50 layers leaves about 1e-5; a wrong layer leaves 1e-1.
    for name, value in actual.items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name
    for name, likelihoods in output["likelihoods"].items():
        bits = -likelihoods.log2().sum().item()
        assert bits == pytest.approx(expected[f"bits_{name}"].item(), rel=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (65, 64), (97, 131)])
def test_any_size_is_reconstructed_at_its_size(size):
    model = build_model("mambavc", **TINY).eval()
    output = model(torch.rand(1, 3, *size))
    assert output["x_hat"].shape == (1, 3, *size)
    assert output["likelihoods"]["y"].shape[-2:] == tuple(-(-side // 64) * 4 for side in size)


def test_gradients_reach_every_parameter():
    model = build_model("mambavc", **TINY, drop_path_rate=0).train()
    with torch.no_grad():
        model.h_a[-1].weight *= 100  # z rounds to zero at first, which feeds h_mean_s nothing
    output = model(torch.rand(2, 3, 64, 64))
    rate = sum(-likelihood.log2().sum() for likelihood in output["likelihoods"].values())
    (output["x_hat"].square().mean() + rate + model.aux_loss()).backward()
    unreached = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()
    ]
    # A scale below its lower bound passes a gradient only if that would raise it, so the path to
    # the scales may rest in one step; nothing else may.
    assert [name for name in unreached if "scale" not in name] == []


def test_state_dict_round_trip_keeps_tables_and_outputs():
    model = build_model("mambavc", **TINY).eval()
    model.update()
    twin = build_model("mambavc", **TINY).eval()
    twin.update()
    twin.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 70, 50)
    assert torch.equal(model(x)["x_hat"], twin(x)["x_hat"])
    assert model.compress(x) == twin.compress(x)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "checkpoint"])
def test_from_state_dict_recovers_the_architecture(prefix, wrap):
    model = build_model("mambavc", **TINY, num_slices=4, max_support_slices=2)
    state_dict = {prefix + key: value for key, value in model.state_dict().items()}
    twin = MambaVC.from_state_dict({"state_dict": state_dict} if wrap else state_dict)
    assert twin.config == model.config
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_wrong_state_dict_names_what_is_wrong():
    model = build_model("mambavc", **TINY)
    state_dict = model.state_dict()
    state_dict["g_a.0.bias"] = torch.zeros(3)
    state_dict["h_x.weight"] = state_dict.pop("g_s.0.weight")
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state_dict)
    message = str(error.value)
    assert "missing g_s.0.weight" in message
    assert "unexpected h_x.weight" in message
    assert "g_a.0.bias has shape (3,), expected (16,)" in message
    assert "\n" not in message


def test_foreign_state_dict_is_refused_by_from_state_dict():
    with pytest.raises(RuntimeError, match="not a state dict of MambaVC"):
        MambaVC.from_state_dict({"conv1.weight": torch.zeros(3)})


def test_registry():
    assert "mambavc" in models.list_models()
    with pytest.raises(ValueError, match="already registered"):
        models.register_model("mambavc")(MambaVC)
    with pytest.raises(ValueError, match=r"unknown model 'mamba'; choose from .*mambavc"):
        build_model("mamba")
    from compressai.registry import MODELS

    assert MODELS["mambavc"] is MambaVC


def test_constructor_refuses_uneven_slices():
    with pytest.raises(ValueError, match="M=21 is not a multiple of num_slices=5"):
        MambaVC(N=8, M=21)
    with pytest.raises(ValueError, match="M=20 is not a multiple of num_slices=0"):
        MambaVC(N=8, M=20, num_slices=0)


@pytest.mark.parametrize("training", [False, True])
def test_transforms_compile_without_graph_breaks(training):
    model = models.build_model("mambavc", drop_path_rate=0.0, **TINY).train(training)
    x = torch.rand(1, 3, 64, 64)
    for name, value in (("g_a", x), ("g_s", model.g_a(x).detach())):
        transform = getattr(model, name)
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(training):
            actual, expected = compiled(value), transform(value)
        torch.testing.assert_close(actual, expected)
        if training:
            weights = list(transform.parameters())
            gradients = torch.autograd.grad(actual.square().sum(), weights)
            for ours, wanted in zip(
                gradients, torch.autograd.grad(expected.square().sum(), weights), strict=True
            ):
                torch.testing.assert_close(
                    ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
                )


@torch.no_grad()
def test_network_compiles():
    model = models.build_model("mambavc", **TINY).eval()
    x = torch.rand(1, 3, 64, 64)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x)["x_hat"], model(x)["x_hat"])
