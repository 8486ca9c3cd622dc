"""Checkpoint files: what is saved is what is loaded, and nothing else is."""

import json
import time

import pytest
import torch
from conftest import TINY, gained_model, save_checkpoint, tiny_model
from safetensors.torch import load_file, save_file

from models import Coder, build_model, checkpoint, load_model
from models.coding import fingerprint
from utils import UsageError


def state_of(model):
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    return {"model": "mambavc", "model_args": dict(model.config), "state_dict": state_dict}


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture
def state(tiny):
    return state_of(tiny)


def refused(state, match):
    with pytest.raises(UsageError, match=match) as caught:
        checkpoint.build_from_checkpoint(state, "tiny.pth.tar")
    assert "tiny.pth.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


# Round trips


def test_training_checkpoint_is_loaded_bit_for_bit(tiny, tmp_path):
    model = load_model(save_checkpoint(tiny, tmp_path / "tiny.pth.tar"))
    assert not model.training
    expected = tiny.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    x = torch.rand(1, 3, 64, 64)
    assert Coder(model).encode(x) == Coder(tiny).encode(x)


def test_saved_weights_are_those_of_the_checkpoint_in_half_precision(state, tmp_path):
    path = tmp_path / "tiny.safetensors"
    checkpoint.save_weights(state, path)
    model = load_model(path)
    assert model.config == state["model_args"]
    for key, value in model.state_dict().items():
        expected = state["state_dict"][key]
        assert value.dtype == expected.dtype
        if key.startswith(("entropy_bottleneck.", "gaussian_conditional.")):
            assert torch.equal(value, expected), key
        else:
            assert torch.equal(value, expected.half().float()), key
    stored = load_file(path)
    assert stored["g_a.0.weight"].dtype == torch.float16


def test_gains_are_kept_exactly(tmp_path):
    model = gained_model()
    checkpoint.save_weights(state_of(model), tmp_path / "x.safetensors")
    loaded = load_model(tmp_path / "x.safetensors")
    assert loaded.config == model.config
    assert all(map(torch.equal, loaded.gains.parameters(), model.gains.parameters()))


def test_checkpoints_from_before_there_were_gains_are_loaded(state):
    del state["model_args"]["qualities"], state["model_args"]["lmbda_range"]
    assert checkpoint.build_from_checkpoint(state, "old").qualities == 0


@torch.no_grad()
def test_weights_beyond_half_precision_are_kept(state, tmp_path):
    state["state_dict"]["g_s.0.weight"][0, 0, 0, 0] = 70_000.5
    path = tmp_path / "large.safetensors"
    checkpoint.save_weights(state, path)
    loaded = checkpoint.load_checkpoint(path)["state_dict"]
    assert torch.equal(loaded["g_s.0.weight"], state["state_dict"]["g_s.0.weight"])


def test_saving_says_whether_files_of_the_checkpoint_still_decode(state, tmp_path):
    path = tmp_path / "tiny.safetensors"
    assert checkpoint.save_weights(state, path)
    again = checkpoint.load_checkpoint(path)
    assert not checkpoint.save_weights(again, tmp_path / "again.safetensors")
    assert fingerprint(again["state_dict"]) != fingerprint(state["state_dict"])


def test_weights_that_are_not_finite_are_not_saved(state, tmp_path):
    state["state_dict"]["g_s.0.bias"][0] = torch.nan
    with pytest.raises(UsageError, match=r"g_s\.0\.bias holds values that are not finite"):
        checkpoint.save_weights(state, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_tables_are_built_where_there_are_none(state, tiny):
    fresh = build_model("mambavc", **TINY)
    model = checkpoint.build_from_checkpoint(state_of(fresh), "fresh")
    assert model.gaussian_conditional.quantized_cdf.shape[0] == 64
    Coder(model).encode(torch.rand(1, 3, 64, 64))


def test_arguments_that_leave_no_trace_are_kept(tiny):
    for sizes in (
        {"drop_path_rate": 0.25},
        {"max_support_slices": 4},
        {"max_support_slices": 9},
        {"qualities": 3, "lmbda_range": (0.01, 0.02)},
    ):
        state = state_of(tiny_model(**sizes))
        assert checkpoint.build_from_checkpoint(state, "x").config == state["model_args"]


# What is refused


def test_huge_network_is_refused_before_it_is_built(tmp_path):
    """A file of a few hundred bytes; building it would take minutes and gigabytes."""
    small = {"model": "mambavc", "model_args": {"depths": [100_000] * 4}, "state_dict": {}}
    path = tmp_path / "small.pth.tar"
    torch.save(small, path)
    with pytest.raises(UsageError, match="not a state dict of MambaVC"):
        load_model(path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"depths": [100_000, 2, 3, 1]},
        {"depths": 7},
        {"N": 10**9},
        {"M": 25},
        {"Z": 12.0},
        {"num_slices": 0},
        {"num_slices": 10**6},
        {"context_width": None},
        {"max_support_slices": 3},
        {"max_support_slices": 5.0},
    ],
    ids=str,
)
def test_arguments_that_do_not_go_with_the_weights_are_refused(state, arguments):
    state["model_args"] |= arguments
    refused(state, f"does not fit model_args: {next(iter(arguments))} is")


def test_tensors_that_only_claim_their_size_are_refused(state):
    state["state_dict"]["g_a.0.weight"] = torch.zeros(1).expand(10**9, 3, 5, 5)
    state["model_args"]["N"] = 5 * 10**8
    refused(state, r"g_a\.0\.weight has fewer values than its shape")


def emptied(prefix, name):
    def change(state_dict):
        key = f"{prefix}.{name}"
        state_dict[key] = state_dict[key].new_empty(0)

    return change


def replaced(key, change):
    return lambda state_dict: state_dict.update({key: change(state_dict[key])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("g_s.0.weight", lambda v: v * torch.nan), "g_s.0.weight holds values that"),
        (replaced("h_a.0.bias", lambda v: v + torch.inf), "h_a.0.bias holds values that are not"),
        (emptied("entropy_bottleneck", "_quantized_cdf"), "no CDF tables"),
        (emptied("gaussian_conditional", "_quantized_cdf"), "no CDF tables"),
        (emptied("gaussian_conditional", "_cdf_length"), "do not go with"),
        (emptied("gaussian_conditional", "scale_table"), "scale table is damaged"),
        (replaced("gaussian_conditional.scale_table", lambda v: v[:40]), "64 CDF tables of y"),
        (replaced("gaussian_conditional.scale_table", lambda v: -v), "scale table is damaged"),
        (replaced("gaussian_conditional.scale_table", lambda v: v.flip(0)), "scale table"),
        (replaced("gaussian_conditional._quantized_cdf", lambda v: v[0]), "do not go with"),
        (replaced("gaussian_conditional._quantized_cdf", lambda v: v * 0), "is damaged"),
        (replaced("entropy_bottleneck._quantized_cdf", lambda v: v[:4]), "do not go with"),
        (lambda s: s.pop("gaussian_conditional.scale_table"), "missing gaussian_conditional.scale"),
        (lambda s: s.pop("g_a.0.weight"), "not a state dict"),
        (lambda s: s.pop("g_a.0.bias"), "missing g_a.0.bias"),
    ],
)
def test_damaged_weights_and_tables_are_refused_when_loading(state, change, message):
    change(state["state_dict"])
    refused(state, message)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_incomplete_checkpoint_is_refused(state, key):
    del state[key]
    refused(state, f"lacks '{key}'")


@pytest.mark.parametrize("value", [None, 3, [1], "N"], ids=str)
def test_arguments_that_are_none_are_refused(state, value):
    refused({**state, "model_args": value}, r"model_args is a .*, expected a dict")


@pytest.mark.parametrize("value", [None, 3, [1], {"g_a.0.bias": 3}, {3: torch.zeros(1)}], ids=str)
def test_weights_that_are_none_are_refused(state, value):
    refused({**state, "state_dict": value}, "its state_dict is no dict of tensors")


def test_unknown_model_is_refused(state):
    refused({**state, "model": "mamba"}, "unknown model 'mamba'; choose from")


@pytest.mark.parametrize("name", ["x.pth.tar", "x.safetensors"])
@pytest.mark.parametrize(
    "data", [b"", b"no checkpoint", b"\x80\x04garbage.", b"PK\x03\x04" + bytes(99)], ids=str
)
def test_garbage_is_refused_in_one_line(tmp_path, name, data, recwarn):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"cannot load .* as a checkpoint") as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "weights_only" not in message
    assert not recwarn


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": {}, "model": time.sleep}, path)
    with pytest.raises(UsageError, match="cannot load"):
        load_model(path)


def test_safetensors_file_without_configuration_is_refused(tmp_path, state):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(UsageError, match="cannot load"):
        load_model(path)
    weights = {key: value.contiguous() for key, value in state["state_dict"].items()}
    save_file(weights, path, {"model": "mambavc", "model_args": json.dumps([3])})
    with pytest.raises(UsageError, match=r"x\.safetensors"):
        load_model(path)


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "a\0b", ""], ids=ascii)
def test_name_of_no_checkpoint_is_refused_with_the_names_there_are(name):
    with pytest.raises(UsageError, match=r"does not exist; .*mambavc-light"):
        checkpoint.find_checkpoint(name)
