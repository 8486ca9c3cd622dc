"""The Coder: what it decodes is what was encoded, on this device and, if exact, on another."""

import collections
import copy
import dataclasses

import pytest
import torch
from conftest import spread_model, tiny_model
from stage_checks import DEVICE, needs_kernels

import kernels
import models.entropy
from kernels import backends
from models import BitstreamError, Coder, build_model, container
from models.coding import fingerprint
from models.entropy import LatentTables, SlicePredictor

EXACT = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])


@pytest.fixture(scope="module")
def model():
    return spread_model()


@pytest.fixture(scope="module")
def coder(model):
    return Coder(model)


# What is coded


@EXACT
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (3, 65), (130, 100)], ids=str)
@torch.no_grad()
def test_file_decodes_to_the_estimated_picture(model, exact, size):
    x = torch.rand(1, 3, *size)
    coder = Coder(model, exact=exact)
    data = coder.encode(x)
    stream = container.unpack(data)
    assert (stream.height, stream.width, stream.exact) == (*size, exact)
    assert len(stream.y) > 40, "the test needs symbols other than zero"
    x_hat = Coder(model, exact=not exact).decode(data)
    assert x_hat.shape == x.shape
    assert torch.equal(x_hat, coder.decode(stream))
    assert torch.equal(x_hat, coder.decompress(**coder.compress(x))["x_hat"])  # by the same path
    estimated = model(x)["x_hat"].clamp(0, 1)
    assert estimated.std() > 0.02, "the test needs a picture that is not flat"
    # Float32 and float64 means may round a latent in ten thousand differently.
    assert (x_hat - estimated).square().mean() < 1e-4 * estimated.var()


@EXACT
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 1, 1), (3, 65, 130)], ids=str)
@torch.no_grad()
def test_latents_come_back_bit_for_bit(model, shape, exact):
    """y_hat as the encoder sees it, slice by slice, is what the decoder returns."""
    seen = []

    class WatchedPredictor(SlicePredictor):
        def walk(self, z_hat):
            walk = super().walk(z_hat)
            result = next(walk)
            while isinstance(result, tuple):
                result = walk.send((yield result))
            seen.append(result)
            yield result

    class Watched(Coder):
        def _path(self, exact):
            slices, dtype = super()._path(exact)
            fields = dataclasses.fields(SlicePredictor)
            return WatchedPredictor(**{f.name: getattr(slices, f.name) for f in fields}), dtype

    batch, height, width = shape
    coder = Watched(model, exact=exact)
    stream = coder.compress(torch.rand(batch, 3, height, width))
    assert [len(strings) for strings in stream["strings"]] == [batch, batch]
    decoded = coder.decompress(**stream)
    encoder_side, decoder_side = seen
    assert encoder_side.abs().max() > 3, "the test needs symbols other than zero"
    assert torch.equal(encoder_side, decoder_side)
    assert encoder_side.dtype == (torch.float64 if exact else torch.float32)
    assert torch.equal(decoded["y_hat"], decoder_side.float())
    assert decoded["x_hat"].shape == (batch, 3, height, width)
    assert decoded["x_hat"].min() >= 0
    assert decoded["x_hat"].max() <= 1


@EXACT
@torch.no_grad()
def test_coder_can_be_used_again_and_beside_another(model, exact):
    x, other = torch.rand(2, 3, 70, 64), torch.rand(1, 3, 30, 200)
    coder = Coder(model, exact=exact)
    stream = model.compress(x, exact=exact)
    assert coder.compress(x) == stream
    Coder(model, exact=not exact).compress(other)
    coder.compress(other)
    assert coder.compress(x) == stream
    x_hat = model.decompress(**stream, exact=exact)["x_hat"]
    assert torch.equal(coder.decompress(**stream)["x_hat"], x_hat)


def test_coder_made_in_inference_mode_serves_outside(model):
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        coder = Coder(model)
        data = coder.encode(x)
    assert torch.equal(coder.decode(data), Coder(model).decode(data))


def test_coding_leaves_the_model_alone():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    coder = Coder(model)
    coder.decode(coder.encode(torch.rand(1, 3, 64, 64)))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(value.dtype == before[key].dtype for key, value in after.items())
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    model.train()(torch.rand(1, 3, 64, 64))["x_hat"].sum().backward()


@torch.no_grad()
def test_real_rate_is_the_estimated_rate(model):
    x = torch.rand(1, 3, 128, 192)
    bits = 8 * sum(len(strings[0]) for strings in model.compress(x)["strings"])
    estimate = sum(-v.log2().sum().item() for v in model(x)["likelihoods"].values())
    # 16-bit tables and the coder's state cost under 2 % and 16 bytes. (These latents are not
    # Gaussian: where the estimate floors likelihoods, coding may need less.)
    assert bits < estimate * 1.02 + 128


@torch.no_grad()
def test_every_picture_of_a_batch_decodes_alone(coder):
    stream = coder.compress(torch.rand(3, 3, 64, 64))
    together = coder.decompress(**stream)["y_hat"]
    for i in range(3):
        alone = coder.decompress(
            [[stream["strings"][0][i]], [stream["strings"][1][i]]],
            stream["shape"],
            stream["size"],
            [stream["guards"][i]],
            [stream["crcs"][i]],
        )
        # A convolution may add up in another order for another batch size.
        torch.testing.assert_close(alone["y_hat"][0], together[i], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_streams_of_either_precision_decode_in_the_other(model):
    """To the same symbols: only what is rounded differs, and how the picture is made of them."""
    x = torch.rand(1, 3, 100, 70)
    coders = [Coder(model, precision=precision) for precision in (torch.float32, torch.bfloat16)]
    streams = [coder.compress(x) for coder in coders]
    assert streams[0]["strings"] != streams[1]["strings"], "the blocks of g_a were not rounded"
    for stream in streams:
        full, rounded = (coder.decompress(**stream) for coder in coders)
        assert torch.equal(full["y_hat"], rounded["y_hat"])
        assert not torch.equal(full["x_hat"], rounded["x_hat"]), "the blocks of g_s were not"
        # What a block adds is rounded to 8 bits.
        assert (full["x_hat"] - rounded["x_hat"]).abs().max() < 0.05
    estimated = model(x, precision=torch.bfloat16)["x_hat"].clamp(0, 1)
    x_hat = coders[1].decompress(**streams[1])["x_hat"]
    assert (x_hat - estimated).square().mean() < 1e-4 * estimated.var()


# How it is coded


@torch.no_grad()
def test_entropy_path_is_computed_in_float64(model):
    """To float64's precision: what makes a stream decode on any device."""
    coder = Coder(model)
    z_hat = torch.randint(-5, 6, (2, 12, 2, 3)).double()
    exact = coder._exact_slices(z_hat, lambda i, mu, scale: mu.round())
    double = copy.deepcopy(model).double().slices(z_hat, lambda i, mu, scale: mu.round())
    torch.testing.assert_close(exact, double, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 7, "padding": 3},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 1, "bias": False},
    ],
    ids=str,
)
def test_layers_of_any_kind_are_computed_in_float64(model, options):
    """Those of a block that is not ours, for instance."""
    model = copy.deepcopy(model)
    channels = model.h_mean_s[0].in_channels
    model.h_mean_s.insert(0, torch.nn.Conv2d(channels, channels, **options))
    test_entropy_path_is_computed_in_float64(model.eval())


@needs_kernels
@torch.no_grad()
def test_entropy_path_by_kernels_is_the_one_by_products(model, monkeypatch):
    """A GPU, which has kernels for it, decodes what a CPU has encoded, and the other way round."""
    z_hat = torch.randint(-5, 6, (1, 12, 2, 2)).double().to(DEVICE)
    products = Coder(model)._exact_slices(z_hat.cpu(), lambda i, mu, scale: mu.round())
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: True)
    slices = Coder(copy.deepcopy(model).to(DEVICE))._exact_slices
    calls = collections.Counter()
    chain, attention = kernels.conv_chain, kernels.window_attention
    monkeypatch.setattr(kernels, "conv_chain", lambda *a: calls.update("c") or chain(*a))
    monkeypatch.setattr(kernels, "window_attention", lambda *a: calls.update("w") or attention(*a))
    latents = slices.transform(z_hat)
    y_hat = []
    for i in range(2):  # of five: the interpreter is slow
        before = calls.copy()
        mu, _, support = slices.predict(i, *latents, *y_hat)
        assert mu.is_contiguous(memory_format=torch.channels_last)
        y_hat.append(slices.correct(i, support, mu.round()))
        # Twice, for mean and scale: two convolutions and two chains of units around two blocks of
        # two linear layers, an MLP and an attention; three layers in one; and once more as many.
        assert calls - before == {"c": 2 * (2 + 2 + 2 * 3 + 1) + 1, "w": 2 * 2}
    y_hat = torch.cat(y_hat, 1).cpu()
    torch.testing.assert_close(y_hat, products[:, : y_hat.shape[1]], rtol=1e-11, atol=1e-11)


class Replayed(Coder):
    """A Coder whose stretches get copies; what these were copied from is spoiled one later."""

    def _run(self, function, *args):
        generator = super()._run(function, *map(clone, args))
        result = next(generator)
        given = args
        while True:
            sent = yield result
            result = generator.send(clone(sent))
            for value in given:
                if isinstance(value, torch.Tensor):
                    value.fill_(1)
            given = [sent]


def clone(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@EXACT
def test_stretches_can_be_replayed(model, exact):
    """What CUDA graphs rely on: they are functions of what they are given alone."""
    x = torch.rand(2, 3, 100, 190)
    plain, replayed = Coder(model, exact=exact), Replayed(model, exact=exact)
    stream = plain.compress(x)
    assert replayed.compress(x) == stream
    x_hat = replayed.decompress(**stream)["x_hat"]
    assert torch.equal(x_hat, plain.decompress(**stream)["x_hat"])


@EXACT
def test_both_ends_predict_from_the_same_layouts(model, exact):
    """So both run the same kernels: others may differ in the last bit."""
    seen = []
    coder = Coder(copy.deepcopy(model), exact=exact)
    slices, _ = coder._path(exact)
    for module in (slices.h_mean_s, *slices.atten_scale, *slices.lrp_transforms):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    coder.decompress(**coder.compress(torch.rand(1, 3, 100, 190)))
    encoder, decoder = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(encoder) == len(decoder) == 1 + 2 * 5
    for ours, theirs in zip(encoder, decoder, strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


# What is refused


def test_coder_needs_eval_mode_tables_and_for_graphs_a_gpu(model):
    with pytest.raises(ValueError, match=r"training mode; call eval\(\)"):
        Coder(copy.deepcopy(model).train())
    with pytest.raises(ValueError, match=r"no CDF tables; call update\(\)"):
        Coder(build_model("mambavc", N=8, M=20).eval())
    with pytest.raises(ValueError, match="need a model on a GPU"):
        Coder(model, graphs=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_latents_that_cannot_be_coded_are_refused(model, value):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.g_a[-1].bias.fill_(value)
    with pytest.raises(ValueError, match="latents or their predictions"):
        Coder(broken).encode(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_network_that_decodes_to_no_picture_is_refused(model, value):
    broken = copy.deepcopy(model)
    broken.g_s.append(torch.nn.Threshold(1e9, value))  # which puts it in place of every sample
    coder = Coder(broken)
    data = coder.encode(torch.rand(1, 3, 20, 30))
    with pytest.raises(ValueError, match="the network's picture is not finite"):
        coder.decode(data)


def test_picture_beyond_the_format_is_refused_before_it_is_coded(coder):
    with pytest.raises(BitstreamError, match="outside the limits"):
        coder.encode(torch.zeros(1, 3, 1, 1).expand(1, 3, 1, 65_536))


def test_wrong_symbols_are_never_returned_as_a_picture(coder):
    stream = coder.compress(torch.rand(2, 3, 64, 64))
    y_strings, z_strings = stream["strings"]
    with pytest.raises(BitstreamError):
        coder.decompress(**{**stream, "strings": [y_strings[::-1], z_strings]})


def test_guard_beyond_the_picture_is_refused(coder):
    stream = container.unpack(coder.encode(torch.rand(1, 3, 20, 20)))
    symbols = 20 * 4 * 4  # channels of y, rows, columns
    for position, message in ((symbols, "beyond the picture"), (2**32 - 1, "beyond the picture")):
        with pytest.raises(BitstreamError, match=message):
            coder.decode(dataclasses.replace(stream, guards=[*stream.guards, (position, 0)]))


def test_file_of_another_model_is_refused_by_name(coder):
    other = Coder(spread_model(seed=1))
    data = other.encode(torch.rand(1, 3, 20, 20))
    names = f"made by model {other.fingerprint.hex()}, this .* {coder.fingerprint.hex()}"
    with pytest.raises(BitstreamError, match=names):
        coder.decode(data)


def other_device(monkeypatch, error):
    """From now on decoding finds scales that are off by a relative error."""
    here = LatentTables.indexes
    monkeypatch.setattr(
        LatentTables, "indexes", lambda self, scale: here(self, scale * (1 + error))
    )


@pytest.mark.parametrize("error", [0.9, -0.9], ids=["higher", "lower"])
def test_other_device_with_slightly_other_scales_decodes_the_picture(coder, monkeypatch, error):
    """A wide guard band stands for the real one, an error within it for another device's."""
    guard = 1e-2
    monkeypatch.setattr(models.entropy, "GUARD", guard)
    stream = container.unpack(coder.encode(torch.rand(1, 3, 128, 128)))
    expected = coder.decode(stream)
    assert len(stream.guards) > 5
    other_device(monkeypatch, error * guard)
    assert torch.equal(coder.decode(stream), expected)
    with pytest.raises(BitstreamError, match="the file is damaged"):
        coder.decode(dataclasses.replace(stream, guards=[]))


@pytest.mark.parametrize("error", [0.0, 0.05], ids=["symbols", "scales"])
def test_fast_file_of_another_machine_is_not_called_damaged(model, monkeypatch, error):
    coder = Coder(model, exact=False)
    stream = container.unpack(coder.encode(torch.rand(1, 3, 64, 64)))
    if error:
        other_device(monkeypatch, error)
    else:
        stream = dataclasses.replace(stream, crc=stream.crc ^ 1)
    with pytest.raises(BitstreamError, match="decodes on the machine that made it only") as caught:
        coder.decode(stream)
    assert "damaged" not in str(caught.value)


# The fingerprint


def test_fingerprint_is_of_the_values_not_of_how_they_are_stored(model):
    first = fingerprint(model.state_dict())
    assert len(first) == 4
    assert Coder(model).fingerprint == first
    half = copy.deepcopy(model).half().float()
    stored_in_half = copy.deepcopy(half).half()
    assert fingerprint(stored_in_half.state_dict()) == fingerprint(half.state_dict()) != first
    assert fingerprint(copy.deepcopy(model).double().state_dict()) == first
    assert fingerprint(copy.deepcopy(model).train().state_dict()) == first


@pytest.mark.parametrize(
    "name",
    [
        "g_s.0.weight",
        "h_scale_s.0.bias",
        "lrp_transforms.4.4.weight",
        "entropy_bottleneck.quantiles",
        "entropy_bottleneck._quantized_cdf",
        "gaussian_conditional._offset",
        "gaussian_conditional.scale_table",
    ],
)
def test_fingerprint_covers_all_that_decoding_depends_on(model, name):
    other = copy.deepcopy(model)
    state = other.state_dict()
    state[name][(0,) * state[name].ndim] += 1
    assert fingerprint(other.state_dict()) != fingerprint(model.state_dict())


def test_fingerprint_leaves_the_encoder_free(model):
    """A better g_a writes files for the decoders that are out there."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.g_a[0].weight += 1
        other.h_a[0].weight += 1
    assert fingerprint(other.state_dict()) == fingerprint(model.state_dict())
