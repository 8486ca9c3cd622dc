"""Checkpoint files: what is saved is what is loaded, and nothing else is."""

import hashlib
import json
import re
import time

import pytest
import torch
from conftest import TINY, gained_model, save_checkpoint, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import Coder, build_model, checkpoint, load_model
from models.coding import fingerprint
from utils import UsageError

PART_BYTES = 900_000  # a little more than the largest table of a tiny network has


def state_of(model):
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    return {"model": "mambavc", "model_args": dict(model.config), "state_dict": state_dict}


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture(scope="module")
def other_state():
    """Of a network like `tiny` with other weights."""
    torch.manual_seed(1)
    return state_of(tiny_model())


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
        exact = key.startswith(("entropy_bottleneck.", "gaussian_conditional."))
        if exact or key.endswith("A_logs"):  # which is at its first values
            assert torch.equal(value, expected), key
        else:
            assert torch.equal(value, expected.half().float()), key
    stored = load_file(path)
    assert stored["g_a.0.weight"].dtype == torch.float16


def test_weights_of_one_byte_are_near_those_of_the_checkpoint(state, tmp_path):
    """Whole or in parts, where a tensor and its scales may be in two of them."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    name = "g_a.0.weight"
    state["state_dict"][name][0] = 0  # a row that has no scale
    state["state_dict"][name][1] *= 1e-3  # and one that needs its own
    checkpoint.save_weights(state, whole, in_bytes=True)
    checkpoint.save_weights(state, parts, max_part_bytes=100_000, in_bytes=True)
    places = json.loads((tmp_path / "parts.safetensors.index.json").read_bytes())["weight_map"]
    pairs = [(places[key.removesuffix("/scales")], places[key]) for key in places if "/" in key]
    assert any(a != b for a, b in pairs)
    assert load_file(whole)[name].dtype == torch.int8
    model, other = load_model(whole).state_dict(), load_model(parts).state_dict()
    for key, value in model.items():
        assert torch.equal(value, other[key]), key
        expected = state["state_dict"][key]
        assert value.dtype == expected.dtype
        if key.startswith(("entropy_bottleneck.", "gaussian_conditional.")):
            assert torch.equal(value, expected), key
        else:
            # Half a step of 1/127 of the largest, and half precision before that.
            assert (value - expected).abs().max() <= (1 / 254 + 1e-3) * expected.abs().max(), key
    rows, expected = model[name].flatten(1), state["state_dict"][name].flatten(1)
    assert ((rows - expected).abs().amax(1) <= (1 / 254 + 1e-3) * expected.abs().amax(1)).all()


@pytest.mark.parametrize("change", ["missing", "too few", "one for all"])
def test_weights_of_one_byte_without_their_scales_are_refused(state, tmp_path, change):
    path = tmp_path / "tiny.safetensors"
    checkpoint.save_weights(state, path, in_bytes=True)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stored = load_file(path)
    scales = stored.pop("g_a.0.weight/scales")
    if change != "missing":
        few = scales[:-1] if change == "too few" else scales[:1]
        stored["g_a.0.weight/scales"] = few.clone()
    save_file(stored, path, metadata)
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load_checkpoint(path)


def test_equal_weights_make_equal_files(state, tmp_path):
    """The SHA-256 of a record can be had again: safetensors itself writes metadata in any order."""
    state["step"] = 3
    digests = set()
    for i in range(8):
        checkpoint.save_weights(state, tmp_path / f"{i}.safetensors")
        digests.add(hashlib.sha256((tmp_path / f"{i}.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


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
def test_an_A_that_was_trained_is_rounded(state, tmp_path):
    path = tmp_path / "trained.safetensors"
    state["state_dict"]["g_a.1.op.A_logs"] += 0.01
    checkpoint.save_weights(state, path)
    stored = load_file(path)
    assert stored["g_a.1.op.A_logs"].dtype == torch.float16
    assert stored["g_s.1.op.A_logs"].dtype == torch.float32


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


# In parts


def written_in_parts(state, folder, name="tiny"):
    """Paths of the index and, in their order, of the parts."""
    checkpoint.save_weights(state, folder / f"{name}.safetensors", max_part_bytes=PART_BYTES)
    index = folder / f"{name}.safetensors.index.json"
    return index, sorted(folder.glob(f"{name}-*.safetensors"))


def test_weights_in_parts_are_those_of_the_whole(state, tmp_path):
    state["step"] = 7
    whole = tmp_path / "whole.safetensors"
    changed = checkpoint.save_weights(state, whole)
    index, parts = written_in_parts(state, tmp_path)
    names = [path.name for path in parts]
    assert names == [f"tiny-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert max(path.stat().st_size for path in parts) <= PART_BYTES
    content = json.loads(index.read_bytes())
    assert content["metadata"]["sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in parts
    }
    stored = {key: name for name in names for key in load_file(tmp_path / name)}
    assert content["weight_map"] == stored
    expected = checkpoint.load_checkpoint(whole)
    for name in (index, tmp_path / "tiny.safetensors"):
        loaded = checkpoint.load_checkpoint(name)
        weights, expected_weights = loaded.pop("state_dict"), dict(expected["state_dict"])
        assert weights.keys() == expected_weights.keys()
        assert all(torch.equal(weights[key], expected_weights[key]) for key in weights)
        assert all(weights[key].dtype == expected_weights[key].dtype for key in weights)
        assert loaded == {k: v for k, v in expected.items() if k != "state_dict"}
    assert changed == checkpoint.save_weights(state, tmp_path / "x.safetensors", (), PART_BYTES)
    coder, other = Coder(load_model(whole)), Coder(load_model(index))
    x = torch.rand(1, 3, 64, 64)
    data = coder.encode(x)
    assert torch.equal(other.decode(data), coder.decode(data))


def test_a_tensor_larger_than_a_part_is_a_part_by_itself(state, tmp_path):
    checkpoint.save_weights(state, tmp_path / "x.safetensors", max_part_bytes=500_000)
    large = [path for path in tmp_path.glob("x-*") if path.stat().st_size > 500_000]
    assert [[*load_file(path)] for path in large] == [["gaussian_conditional._quantized_cdf"]]
    load_model(tmp_path / "x.safetensors")


def test_weights_written_anew_leave_nothing_of_the_old_ones(state, tmp_path):
    path = tmp_path / "tiny.safetensors"
    others = [tmp_path / "tiny-2.safetensors", tmp_path / "tiny-2-00001-of-00003.safetensors"]
    for other in others:
        other.touch()
    checkpoint.save_weights(state, path)
    index, parts = written_in_parts(state, tmp_path)
    assert {*tmp_path.iterdir()} == {index, *parts, *others}
    checkpoint.save_weights(state, path, max_part_bytes=1_800_000)
    again = [tmp_path / f"tiny-{i:05}-of-00002.safetensors" for i in (1, 2)]
    assert {*tmp_path.iterdir()} == {index, *again, *others}
    checkpoint.save_weights(state, path)
    assert {*tmp_path.iterdir()} == {path, *others}


@torch.no_grad()
def test_parts_that_cannot_all_be_written_leave_the_old_ones(state, tmp_path):
    index, parts = written_in_parts(state, tmp_path)
    expected = checkpoint.load_checkpoint(index)["state_dict"]
    before = {path.name: path.read_bytes() for path in (index, *parts[:2])}
    parts[2].unlink()
    parts[2].mkdir()  # where a file is to be written: fails, as a full disk does
    state["state_dict"]["g_a.0.weight"] += 1
    with pytest.raises(OSError):
        written_in_parts(state, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*before, parts[2].name}
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    parts[2].rmdir()
    written_in_parts(state, tmp_path)
    loaded = checkpoint.load_checkpoint(index)["state_dict"]
    assert not torch.equal(loaded["g_a.0.weight"], expected["g_a.0.weight"])


def cut(parts, other):
    parts[1].write_bytes(parts[1].read_bytes()[:-1])


def flipped(parts, other):
    data = bytearray(parts[1].read_bytes())
    data[-1] ^= 1
    parts[1].write_bytes(data)


def exchanged(parts, other):
    first = parts[0].read_bytes()
    parts[1].rename(parts[0])
    parts[1].write_bytes(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts, other: parts[1].unlink(), "'tiny-00002-of-00003.safetensors' is missing"),
        (cut, "'tiny-00002-of-00003.safetensors' is damaged, or of another checkpoint"),
        (flipped, "'tiny-00002-of-00003.safetensors' is damaged"),
        (lambda parts, other: parts[2].write_bytes(b""), "'tiny-00003-of-.*' is damaged"),
        (
            lambda parts, other: other[1].rename(parts[1]),
            "'tiny-00002.*' is damaged, or of another",
        ),
        (exchanged, "'tiny-00001-of-.*' holds what belongs into 'tiny-00002-of-00003.safetensors'"),
        (lambda parts, other: parts[1].rename(parts[0]), "'tiny-00001.*' holds .* 'tiny-00002-of"),
    ],
    ids=["missing", "cut", "one bit", "empty", "foreign", "exchanged", "in place of another"],
)
def test_parts_that_are_not_those_of_the_index_are_named(
    state, other_state, tmp_path, change, message
):
    index, parts = written_in_parts(state, tmp_path)
    (tmp_path / "other").mkdir()
    _, other = written_in_parts(other_state, tmp_path / "other")
    change(parts, other)
    with pytest.raises(UsageError, match=f"^{re.escape(str(index))}: part {message}.*; ") as caught:
        load_model(index)
    assert "\n" not in str(caught.value)


def test_a_part_alone_is_refused_with_the_name_of_its_index(state, tmp_path):
    index, parts = written_in_parts(state, tmp_path)
    with pytest.raises(UsageError, match=rf"is one part of a checkpoint; give .*'{index.name}'"):
        load_model(parts[1])


def outside(content):
    content["weight_map"]["g_a.0.weight"] = "../tiny-00001-of-00003.safetensors"


def absolute(content):
    content["weight_map"]["g_a.0.weight"] = "/dev/zero"


def to_another_part(content):
    content["weight_map"]["g_a.0.weight"] = "tiny-00003-of-00003.safetensors"


def without_a_hash(content):
    del content["metadata"]["sha256"]["tiny-00002-of-00003.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside, r"part '\.\./tiny-.*' is no \*\.safetensors beside the index"),
        (absolute, "part '/dev/zero' is no"),
        (lambda c: c["weight_map"].update(x="a\nb\0.safetensors"), "cannot load"),
        (lambda c: c["weight_map"].update(x=3), "cannot load"),
        (lambda c: c.update(weight_map=[]), "cannot load"),
        (lambda c: c.pop("metadata"), "cannot load"),
        (lambda c: c["metadata"].pop("model_args"), "cannot load"),
        (lambda c: c["metadata"].update(model_args=3), "expected a dict"),
        (lambda c: c["metadata"].update(step=[]), "cannot load"),
        (without_a_hash, "cannot load"),
        (lambda c: c["weight_map"].update(x="tiny-00001-of-00003.safetensors"), "the tensors that"),
        (lambda c: c["weight_map"].pop("g_a.0.weight"), "part .* does not hold the tensors that"),
        (to_another_part, "part .* does not hold the tensors that the index says"),
    ],
)
def test_an_index_that_lies_is_refused(state, tmp_path, change, message):
    index, _ = written_in_parts(state, tmp_path)
    content = json.loads(index.read_bytes())
    change(content)
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message) as caught:
        load_model(index)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot load"),
        (b"no JSON", "cannot load"),
        (b"\xff\xfe", "cannot load"),
        (b"[" * 10**6, "cannot load"),
        (b" " * (2**24 + 1), "more than 16777216 bytes, which no index of weights needs"),
    ],
    ids=["empty", "text", "bytes", "deep", "huge"],
)
def test_what_is_no_index_is_refused(tmp_path, data, message):
    path = tmp_path / "x.safetensors.index.json"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


# That come with the project


@pytest.fixture
def shipped(state, tmp_path, monkeypatch):
    """A folder of checkpoints: one in parts, and one in a file of which there is a record."""
    monkeypatch.setattr(checkpoint, "CHECKPOINT_FOLDER", tmp_path)
    checkpoint.save_weights(state, tmp_path / "small-0.1.safetensors")
    written_in_parts(state, tmp_path)
    for name in ("small-0.1.safetensors", "tiny.safetensors.index.json"):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        record = tmp_path / name.replace(".index.json", "").replace(".safetensors", ".json")
        record.write_text(json.dumps({"sha256": digest}))
    return tmp_path


def test_checkpoints_in_parts_have_a_name_as_others_have(shipped):
    assert checkpoint.list_checkpoints() == ["small-0.1", "tiny"]
    assert checkpoint.find_checkpoint("tiny") == shipped / "tiny.safetensors.index.json"
    assert checkpoint.find_checkpoint("small-0.1") == shipped / "small-0.1.safetensors"
    for name in ("tiny", "small-0.1"):
        assert load_model(name).config["N"] == TINY["N"]


@pytest.mark.parametrize("name", ["small-0.1.safetensors", "tiny.safetensors.index.json"])
def test_a_file_that_is_not_the_recorded_one_is_refused(shipped, state, name):
    with (shipped / name).open("ab") as file:
        file.write(b" ")  # which an index may end with
    record = checkpoint.checkpoint_name(shipped / name) + ".json"
    message = f"{name} is damaged, or not the file that {record} beside it records; fetch"
    with pytest.raises(UsageError, match=message):
        load_model(shipped / name)
    (shipped / record).write_text("{}")  # as of those who keep no hash
    if name.endswith(".json"):
        load_model(shipped / name)
    else:
        with pytest.raises(UsageError, match="cannot load"):
            load_model(shipped / name)


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
