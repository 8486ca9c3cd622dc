"""The comparison networks: the codec's contract, and that they differ in the block only."""

import pytest
import torch
from conftest import TINY

import models
from layers import VSSBlock

VARIANTS = ["convvc", "swinvc"]


@pytest.fixture(params=VARIANTS)
def variant(request):
    return models.build_model(request.param, **TINY, drop_path_rate=0.0)


def blocks(model):
    """The modules of g_a that are not convolutions, by position."""
    return {i: m for i, m in enumerate(model.g_a) if not isinstance(m, torch.nn.Conv2d)}


def test_everything_but_the_blocks_is_that_of_mambavc(variant):
    mambavc = models.build_model("mambavc", **TINY)
    positions = [i for i, m in enumerate(mambavc.g_a) if isinstance(m, VSSBlock)]
    assert list(blocks(variant)) == positions

    def skeleton(model):
        inside = tuple(f"{name}." for name, m in model.named_modules() if is_block(name, model))
        items = model.state_dict().items()
        return {key: value.shape for key, value in items if not key.startswith(inside)}

    def is_block(name, model):
        transform, _, position = name.partition(".")
        return (
            transform in ("g_a", "g_s", "h_a", "h_mean_s", "h_scale_s")
            and position.isdecimal()
            and not isinstance(
                model.get_submodule(name), torch.nn.Conv2d | torch.nn.ConvTranspose2d
            )
        )

    assert skeleton(variant) == skeleton(mambavc)


@pytest.mark.parametrize("size", [(1, 1), (70, 100), (128, 64)])
def test_decompress_returns_what_compress_coded(variant, size):
    variant.eval()
    variant.update()
    x = torch.rand(2, 3, *size)
    coded = variant.compress(x)
    decoded = variant.decompress(**coded)
    assert decoded["x_hat"].shape == x.shape
    estimated = variant(x)["x_hat"].clamp(0, 1)
    # The entropy path runs in float64 when coding; on untrained weights both round alike.
    torch.testing.assert_close(decoded["x_hat"], estimated, atol=1e-4, rtol=0)


def test_gradients_reach_every_parameter(variant):
    # Fresh weights round every z to 0, and a convolution of zeros has no gradient.
    torch.nn.init.uniform_(variant.h_a[-1].bias, -5, 5)
    with torch.no_grad():
        for name, parameter in variant.named_parameters():
            if ".conv_" in name and name.endswith("bias"):
                parameter += 1  # a ReLU that is off everywhere passes no gradient either
    out = variant(torch.rand(2, 3, 96, 64))
    rate = -sum(likelihood.log().sum() for likelihood in out["likelihoods"].values())
    (out["x_hat"].square().sum() + rate + variant.aux_loss()).backward()
    without = [
        name
        for name, parameter in variant.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("overrides", [{}, {"depths": (2, 1, 1, 2), "max_support_slices": 2}])
def test_from_state_dict_recovers_the_model(name, overrides):
    model = models.build_model(name, **{**TINY, **overrides}).eval()
    model.update()
    again = type(model).from_state_dict(model.state_dict()).eval()
    assert type(again) is type(model)
    assert again.config == {**model.config, "drop_path_rate": again.config["drop_path_rate"]}
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(x)["x_hat"], model(x)["x_hat"])


def test_state_dict_of_another_variant_is_refused(variant):
    other = next(
        name for name in VARIANTS if type(models.build_model(name, **TINY)) is not type(variant)
    )
    with pytest.raises(RuntimeError, match="missing"):
        models.build_model(other, **TINY).load_state_dict(variant.state_dict())


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_are_dropped_in_training_only(name):
    """At a rate of 1 the last block of a path is the identity in training, and not in use."""
    model = models.build_model(name, **{**TINY, "drop_path_rate": 1.0 - 1e-7})
    last = list(model.h_a)[-2]
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(last.train()(x), x)
    assert not torch.equal(last.eval()(x), x)


def test_every_second_swin_block_of_a_stage_is_shifted():
    model = models.build_model("swinvc", **{**TINY, "depths": (1, 3, 2, 1)})
    assert [block.msa.shift for block in blocks(model).values()] == [0, 0, 4, 0, 0, 4]


def test_residual_block_sees_two_pixels_far():
    """Two 3x3 convolutions: the gradient of a pixel covers 5x5 pixels and no more."""
    block = models.build_model("convvc", **TINY).make_block(4, 0.0, 0)
    x = torch.randn(1, 4, 11, 11, requires_grad=True)
    block(x)[0, :, 5, 5].sum().backward()
    reached = x.grad.abs().sum((0, 1)) > 0
    expected = torch.zeros(11, 11, dtype=torch.bool)
    expected[3:8, 3:8] = True
    assert torch.equal(reached, expected)
