"""Coding with the model's own entropy path: what is decoded is what was encoded."""

import pytest
import torch
from test_models_mambavc import TINY

from models import BitstreamError, build_model
from models.entropy import GUARD, LatentEncoder


@pytest.fixture
def model():
    """A tiny network whose latents spread over many symbols and scales."""
    model = build_model("mambavc", **TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("g_a.", "h_a.")) and parameter.ndim == 4:
                parameter *= 4
            if name.startswith("cc_scale_transforms") and name.endswith("4.bias"):
                parameter += torch.linspace(-2, 20, len(parameter))
    model.update()
    return model.eval()


def encoder_latents(model, x, exact=True):
    """y_hat as the encoder sees it."""
    y = model.g_a(model._pad(x))
    z = model.h_a(y)
    coder = LatentEncoder(model.entropy_bottleneck, model.gaussian_conditional, y)
    _, z_hat = coder.encode_z(z, model._medians())
    slices = model._coding_slices(exact)
    y_hat = slices(z_hat if exact else z_hat.to(y.dtype), coder.code_slice)
    return y_hat.to(y.dtype), torch.cat([y.flatten(), z.flatten()])


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 1, 1), (3, 65, 130)], ids=str)
@torch.no_grad()
def test_round_trip_is_bit_exact(model, shape, exact):
    batch, height, width = shape
    x = torch.rand(batch, 3, height, width)
    stream = model.compress(x, exact=exact)
    assert [len(strings) for strings in stream["strings"]] == [batch, batch]
    decoded = model.decompress(**stream, exact=exact)
    y_hat, latents = encoder_latents(model, x, exact)
    assert latents.abs().max() > 3, "the test needs symbols other than zero"
    assert torch.equal(decoded["y_hat"], y_hat)
    assert decoded["x_hat"].shape == x.shape
    assert decoded["x_hat"].min() >= 0
    assert decoded["x_hat"].max() <= 1


@torch.no_grad()
def test_decoded_picture_is_the_estimated_one(model):
    x = torch.rand(1, 3, 70, 90)
    decoded = model.decompress(**model.compress(x))["x_hat"]
    estimated = model(x)["x_hat"].clamp(0, 1)
    # Float32 and float64 means may round a latent in ten thousand differently.
    assert (decoded - estimated).square().mean() < 1e-4 * estimated.square().mean()


@torch.no_grad()
def test_real_rate_is_the_estimated_rate(model):
    x = torch.rand(1, 3, 128, 192)
    bits = 8 * sum(len(strings[0]) for strings in model.compress(x)["strings"])
    estimate = sum(-v.log2().sum().item() for v in model(x)["likelihoods"].values())
    # 16-bit tables and the coder's state cost under 2 % and 16 bytes. (These latents are not
    # Gaussian: where the estimate floors likelihoods, coding may need less.)
    assert bits < estimate * 1.02 + 128


@torch.no_grad()
def test_every_picture_of_a_batch_decodes_alone(model):
    x = torch.rand(3, 3, 64, 64)
    stream = model.compress(x)
    together = model.decompress(**stream)["y_hat"]
    for i in range(3):
        alone = model.decompress(
            [[stream["strings"][0][i]], [stream["strings"][1][i]]],
            stream["shape"],
            stream["size"],
            [stream["guards"][i]],
            [stream["crcs"][i]],
        )
        # A convolution may add up in another order for another batch size.
        torch.testing.assert_close(alone["y_hat"][0], together[i], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_scales_near_a_boundary_are_listed_and_taken_from_the_list(model):
    boundary = model.gaussian_conditional.scale_table[20].double()
    encoder = LatentEncoder(
        model.entropy_bottleneck, model.gaussian_conditional, torch.zeros(1, 20, 1, 4)
    )
    factors = torch.tensor([1 - GUARD / 2, 1 + GUARD / 2, 1 - 2 * GUARD, 1 + 2 * GUARD])
    scale = (boundary * factors.double()).reshape(1, 1, 1, 4).expand(1, 4, 1, 4)
    encoder.code_slice(0, torch.zeros(1, 4, 1, 4).double(), scale)
    encoder.encode_y()
    below, above = 20, 21
    assert encoder.guards[0] == [
        (4 * channel + i, index) for channel in range(4) for i, index in ((0, below), (1, above))
    ]


@torch.no_grad()
def test_wrong_symbols_are_never_returned_as_a_picture(model):
    x = torch.rand(2, 3, 64, 64)
    stream = model.compress(x)
    y_strings, z_strings = stream["strings"]
    with pytest.raises(BitstreamError):
        model.decompress(**{**stream, "strings": [y_strings[::-1], z_strings]})


@torch.no_grad()
def test_coding_needs_eval_mode_and_tables(model):
    x = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"training mode; call eval\(\)"):
        model.train().compress(x)
    fresh = build_model("mambavc", **TINY).eval()
    with pytest.raises(ValueError, match=r"no CDF tables; call update\(\)"):
        fresh.compress(x)


@torch.no_grad()
def test_update_solves_the_quantiles(model):
    logits = model.entropy_bottleneck._logits_cumulative(
        model.entropy_bottleneck.quantiles, stop_gradient=True
    )
    # CompressAI's bisection stops at 1e-3 of a quantile; logits move by less than 5 % there.
    torch.testing.assert_close(
        logits, model.entropy_bottleneck.target.expand_as(logits), rtol=0.05, atol=0.05
    )
