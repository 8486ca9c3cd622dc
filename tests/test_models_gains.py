"""One network at every rate: what its gains do, and that they fold into its convolutions."""

import copy
import dataclasses

import pytest
import torch
from conftest import SHALLOW, gained_model, spread_model, tiny_model

import models
from models import BitstreamError, Coder, MambaVC, container
from models.coding import fingerprint
from models.gains import Gains

QUALITIES = (0, 12.34, 50, 100)


@pytest.fixture(scope="module")
def model():
    return gained_model()


@pytest.fixture(scope="module")
def coder(model):
    return Coder(model)


# The gains


def test_gains_are_interpolated_in_the_log():
    gains = Gains(5, 3, 2, (0.0018, 0.12))
    with torch.no_grad():
        for parameter in gains.parameters():
            parameter.normal_()
    at = gains(torch.tensor([0.0, 25, 30, 100, -7, 1e9]))
    for name, parameter in gains.named_parameters():
        gain = getattr(at, name)
        assert gain.shape == (6, parameter.shape[1], 1, 1)
        expected = torch.stack(
            [*parameter[:2], parameter[1].lerp(parameter[2], 0.2), parameter[4]], 0
        ).exp()
        torch.testing.assert_close(gain[:4, :, 0, 0], expected)
        assert torch.equal(gain[4:], gain[[0, 3]]), "beyond the ends, the ends"


def test_steps_start_at_the_size_that_lambda_asks_for():
    """A distortion of step^2 / 12 and a rate of -log2(step) balance at a step of lambda^(-1/2)."""
    model = tiny_model(qualities=4, lmbda_range=(0.0130, 0.0520))
    assert model.lmbda(0).item() == pytest.approx(0.0130)
    assert model.lmbda(torch.tensor([[50.0], [100.0]])).tolist() == [
        [pytest.approx(0.0260)],
        [pytest.approx(0.0520)],
    ]
    gain = model.gains(torch.tensor([0.0, 100.0]))
    torch.testing.assert_close(
        gain.y_enc, torch.tensor([1.0, 2.0])[:, None, None, None].expand_as(gain.y_enc)
    )
    torch.testing.assert_close(gain.y_enc * gain.y_dec, torch.ones_like(gain.y_enc))
    assert (gain.z_enc == 1).all()
    assert (gain.z_dec == 1).all()


@torch.no_grad()
def test_pictures_of_a_batch_have_their_own_qualities(model):
    x = torch.rand(3, 3, 64, 64)
    quality = torch.tensor([0.0, 30.0, 100.0])
    together = model(x, quality)
    for i, q in enumerate(quality.tolist()):
        alone = model(x[i : i + 1], q)
        # A convolution may add up in another order for another batch size.
        torch.testing.assert_close(together["x_hat"][i], alone["x_hat"][0], rtol=1e-4, atol=1e-5)
    bits = [-p.log2().flatten(1).sum(1) for p in together["likelihoods"].values()]
    assert (sum(bits).diff() > 0).all()


@pytest.mark.parametrize("name", ["mambavc", "convvc", "swinvc", "mambavc-light"])
def test_every_network_trains_its_gains(name):
    model = models.build_model(name, **SHALLOW, qualities=3).train()
    with torch.no_grad():
        model.h_a[-1].bias += 3  # of a fresh network all of z_hat is zero
    output = model(torch.rand(2, 3, 64, 64), torch.tensor([10.0, 80.0]))
    bits = sum(-p.log2().mean() for p in output["likelihoods"].values())
    (output["x_hat"].square().mean() + bits).backward()
    for key, parameter in model.gains.named_parameters():
        assert parameter.grad.abs().sum(1).all(), key


def test_network_of_a_single_rate_is_the_one_it_was():
    plain, gained = tiny_model(), tiny_model(qualities=2)
    assert (plain.qualities, gained.qualities) == (0, 2)
    added = gained.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"gains.{key}" for key in ("y_enc", "y_dec", "z_enc", "z_dec")}


@pytest.mark.parametrize("quality", [-0.1, 100.1, float("nan"), None])
def test_quality_that_is_missing_or_out_of_range_is_refused(model, coder, quality):
    x = torch.rand(1, 3, 64, 64)
    match = "give one" if quality is None else "outside the range from 0 to 100"
    for code in (model, coder.encode, coder.compress, model.at_quality):
        with pytest.raises(ValueError, match=match):
            code(*([quality] if code == model.at_quality else [x, quality]))


def test_quality_for_a_network_of_a_single_rate_is_refused():
    model, x = tiny_model(), torch.rand(1, 3, 64, 64)
    for code in (model, Coder(model).encode):
        with pytest.raises(ValueError, match="has a single rate; leave the quality out"):
            code(x, 50)
    for method in (model.lmbda, model.at_quality):
        with pytest.raises(ValueError, match="has a single rate"):
            method(50)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"qualities": 1}, "qualities=1 is too few"),
        ({"qualities": -3}, "qualities=-3 is too few"),
        ({"qualities": 2, "lmbda_range": (0.1, 0.1)}, "two positive numbers that rise"),
        ({"qualities": 2, "lmbda_range": (0, 0.1)}, "two positive numbers that rise"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        models.build_model("mambavc", **SHALLOW, **arguments)


# From and to networks of a single rate


@pytest.mark.parametrize("quality", QUALITIES)
@torch.no_grad()
def test_folded_network_has_the_same_outputs_and_the_published_keys(model, quality):
    x = torch.rand(2, 3, 70, 100)
    plain = model.at_quality(quality)
    published = tiny_model()
    assert plain.state_dict().keys() == published.state_dict().keys()
    assert {**plain.config, "lmbda_range": 0} == {**published.config, "lmbda_range": 0}
    expected, actual = model(x, quality), plain(x)
    assert expected["x_hat"].std() > 0.02, "the test needs a picture that is not flat"
    # No latent of this picture is so near to one half that it is rounded otherwise.
    for key, value in expected["likelihoods"].items():
        torch.testing.assert_close(actual["likelihoods"][key], value, rtol=1e-4, atol=1e-6)
    difference = (actual["x_hat"] - expected["x_hat"]).norm() / expected["x_hat"].norm()
    assert difference < 1e-5
    for y, scaled_y in zip(
        plain.analyse(x[..., :64, :64]),
        model.analyse(x[..., :64, :64], *_encoder_gains(model, quality)),
        strict=True,
    ):
        torch.testing.assert_close(y, scaled_y, rtol=1e-4, atol=1e-5)


def _encoder_gains(model, quality):
    gain = model.gains(torch.tensor([float(quality)]))
    return gain.y_enc, gain.z_enc


@torch.no_grad()
def test_folded_network_codes_the_same_symbols(model, coder):
    x = torch.rand(1, 3, 64, 64)
    plain = Coder(model.at_quality(33))
    of_gains, folded = coder.encode(x, 33), plain.encode(x)
    streams = container.unpack(of_gains), container.unpack(folded)
    assert [stream.version for stream in streams] == [2, 1]
    assert streams[0].crc == streams[1].crc
    torch.testing.assert_close(plain.decode(folded), coder.decode(of_gains), rtol=0, atol=1e-5)
    with pytest.raises(BitstreamError, match="the file was made by model"):
        plain.decode(of_gains)


@torch.no_grad()
def test_training_can_start_from_a_single_rate(model):
    single = spread_model()
    x = torch.rand(1, 3, 64, 64)
    started = tiny_model(qualities=3, lmbda_range=(0.0130 / 4, 0.0130 * 4))
    started.load_single_rate(single.state_dict())
    # In the middle is the lambda at which gains start at 1.
    torch.testing.assert_close(started(x, 50)["x_hat"], single(x)["x_hat"], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="does not fit"):
        tiny_model(qualities=3, M=40).load_single_rate(single.state_dict())


def test_gains_are_recovered_from_a_state_dict(model):
    twin = MambaVC.from_state_dict(model.state_dict())
    assert twin.config == model.config
    assert torch.equal(twin.gains.y_enc, model.gains.y_enc)


# Streams


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@torch.no_grad()
def test_file_decodes_to_the_estimated_picture_at_its_quality(model, exact):
    x = torch.rand(1, 3, 50, 70)
    coder = Coder(model, exact=exact)
    sizes = []
    for quality in QUALITIES:
        data = coder.encode(x, quality)
        assert container.unpack(data).quality == quality
        x_hat = Coder(model).decode(data)
        estimated = model(x, quality)["x_hat"].clamp(0, 1)
        # Float32 and float64 means may round a latent in ten thousand differently.
        assert (x_hat - estimated).square().mean() < 1e-4 * estimated.var()
        assert torch.equal(x_hat, coder.decompress(**coder.compress(x, quality))["x_hat"])
        sizes.append(len(data))
    assert sizes == sorted(set(sizes))


@torch.no_grad()
def test_bytes_rise_with_every_step_of_the_quality(coder):
    x = torch.rand(1, 3, 64, 64)
    sizes = [len(coder.encode(x, quality)) for quality in range(0, 101, 5)]
    assert sizes == sorted({*sizes})


@torch.no_grad()
def test_quality_is_rounded_to_what_the_file_can_say(coder):
    x = torch.rand(1, 3, 64, 64)
    data = coder.encode(x, 33.3333)
    assert container.unpack(data).quality == 33.33
    assert data == coder.encode(x, 33.33)


@torch.no_grad()
def test_exact_streams_do_not_depend_on_the_last_bit_of_the_gains(model, coder, monkeypatch):
    """Another machine's exponential function may differ there."""
    data = coder.encode(torch.rand(1, 3, 64, 64), 61)
    expected = coder.decode(data)
    other = Coder(copy.deepcopy(model))
    with torch.no_grad():
        other._gains.z_dec += 3e-16
    assert not torch.equal(other._gains.z_dec, coder._gains.z_dec)
    assert torch.equal(other.decode(data), expected)


def test_file_whose_version_is_not_the_networks_is_refused(model, coder):
    stream = container.unpack(coder.encode(torch.rand(1, 3, 20, 20), 50))
    with pytest.raises(BitstreamError, match="it is of version 1, which the network"):
        coder.decode(dataclasses.replace(stream, quality=None))
    plain = Coder(spread_model())
    stream = container.unpack(plain.encode(torch.rand(1, 3, 20, 20)))
    with pytest.raises(BitstreamError, match="it is of version 2, which the network"):
        plain.decode(dataclasses.replace(stream, quality=50.0))


def test_fingerprint_covers_the_decoders_gains_only(model):
    first = fingerprint(model.state_dict())
    for name, differs in (("y_enc", False), ("z_enc", False), ("y_dec", True), ("z_dec", True)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            getattr(other.gains, name)[0, 0] += 1
        assert (fingerprint(other.state_dict()) != first) == differs, name
