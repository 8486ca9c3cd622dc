"""Exported weights decode what the checkpoint encoded; what cannot be exported is one line."""

import hashlib
import json
import stat
from pathlib import Path

import pytest
import torch
from conftest import gained_model, save_checkpoint, spread_model
from safetensors.torch import load_file

import models
from models.checkpoint import load_checkpoint, load_model
from tools import export
from utils import UsageError


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(spread_model(), tmp_path / "run.pth.tar")


def test_exported_weights_are_those_of_the_checkpoint(tmp_path, checkpoint, capsys):
    output = tmp_path / "shared.safetensors"
    export.main([checkpoint, str(output)])
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    assert capsys.readouterr().out == f"{digest}  shared.safetensors\n"
    before, after = load_checkpoint(checkpoint), load_checkpoint(output)
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE(Path(checkpoint).stat().st_mode)
    assert (after["model"], after["model_args"]["N"]) == ("mambavc", before["model_args"]["N"])
    for key, value in before["state_dict"].items():
        own = after["state_dict"][key]
        if key.startswith(("entropy_bottleneck.", "gaussian_conditional.")):
            assert torch.equal(own, value), f"{key}: tables are built from what is kept exactly"
        elif key.endswith(".A_logs"):
            assert torch.equal(own, value), f"{key}: it is as at first, and takes the faster kernel"
        else:
            assert torch.equal(own, value.half().float()), key
    coder = models.Coder(load_model(output))
    x = torch.rand(1, 3, 64, 96)
    assert coder.decode(coder.encode(x)).shape == x.shape


def test_what_is_too_large_for_a_file_is_written_in_parts(tmp_path, checkpoint, capsys):
    output = tmp_path / "shared.safetensors"
    export.main([checkpoint, str(output), "--max-part-size", "900kB"])
    index = tmp_path / "shared.safetensors.index.json"
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    assert capsys.readouterr().out == f"{digest}  {index.name}\n"
    assert not output.exists()
    assert max(path.stat().st_size for path in tmp_path.glob("shared-*")) <= 900_000
    # Either name is that of a checkpoint, also to export from; what is put together is the whole.
    export.main([str(output), str(tmp_path / "again.safetensors")])
    export.main([checkpoint, str(tmp_path / "whole.safetensors")])
    # Not byte for byte: safetensors writes the metadata of a header in any order.
    whole, again = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "again"))
    assert whole.keys() == again.keys()
    for key, value in whole.items():
        assert value.dtype == again[key].dtype
        assert torch.equal(value, again[key])
    assert load_model(output).config == load_model(tmp_path / "whole.safetensors").config


def test_the_record_says_what_the_run_knows_and_what_is_added(tmp_path, checkpoint):
    run = {
        **torch.load(checkpoint, weights_only=True),
        "args": {"lmbda": 0.013, "seed": 3, "dataset": "/somewhere"},
        "global_batch": 16,
        "step": 200,
        "history": [{"step": 100, "loss": 1.5}, {"step": 200, "loss": 1.25}],
        "versions": {"torch": "2.11"},
    }
    torch.save(run, checkpoint)
    added = ["minutes=12.5", "gpus=2", "commit=0d8c010", "note=a = b, \u00fc"]
    command = [checkpoint, str(tmp_path / "x-0.1.safetensors"), "--record"]
    export.main([*command, *added])
    data = (tmp_path / "x-0.1.safetensors").read_bytes()
    assert json.loads((tmp_path / "x-0.1.json").read_text("utf-8")) == {
        "file": "x-0.1.safetensors",
        "sha256": hashlib.sha256(data).hexdigest(),
        "model": "mambavc",
        "lambda": 0.013,
        "seed": 3,
        "steps": 200,
        "crops_per_step": 16,
        "software": run["versions"],
        "validation": run["history"],
        "minutes": 12.5,
        "gpus": 2,
        "commit": "0d8c010",
        "note": "a = b, \u00fc",
    }
    (tmp_path / "x-0.1.safetensors").write_bytes(b"as it is")
    with pytest.raises(UsageError, match=r"x-0\.1\.json exists; rename it"):
        export.main(command)
    assert (tmp_path / "x-0.1.safetensors").read_bytes() == b"as it is"


def test_the_record_of_weights_without_a_run(tmp_path):
    shared = save_checkpoint(gained_model(), tmp_path / "shared.pth.tar")
    export.main([shared, str(tmp_path / "x.safetensors"), "--quality", "37.5", "--record"])
    record = json.loads((tmp_path / "x.json").read_bytes())
    assert record.keys() == {"file", "sha256", "model", "quality", "lambda"}
    assert (record["quality"], record["lambda"]) == (37.5, pytest.approx(0.0087, abs=5e-5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-part-size", "50 MiB"], "expected a size such as 50MB, got '50 MiB'"),
        (["--max-part-size", "0"], "expected a size such as 50MB, got '0'"),
        (["--record", "minutes"], "expected KEY=VALUE, got 'minutes'"),
        (["--record", "=3"], "expected KEY=VALUE, got '=3'"),
    ],
)
def test_flags_that_cannot_be_read_are_one_line(tmp_path, checkpoint, flags, message):
    with pytest.raises(UsageError, match=message):
        export.main([checkpoint, str(tmp_path / "x.safetensors"), *flags])


@torch.no_grad()
def test_a_quality_is_exported_as_a_network_of_a_single_rate(tmp_path, capsys):
    shared, plain = tmp_path / "shared.safetensors", tmp_path / "plain.safetensors"
    export.main([save_checkpoint(gained_model(), tmp_path / "run.pth.tar"), str(shared)])
    export.main([str(shared), str(plain), "--quality", "37.5"])
    assert "quality 37.5 is lambda 0.0087\n" in capsys.readouterr().err
    every, single = load_model(shared), load_model(plain)
    assert load_checkpoint(plain)["model_args"]["qualities"] == 0
    assert single.state_dict().keys() == spread_model().state_dict().keys()
    assert plain.stat().st_size < 1.5 * shared.stat().st_size, "most of it is in half precision"
    x = torch.rand(1, 3, 70, 100)
    expected, actual = every(x, 37.5)["x_hat"], single(x)["x_hat"]
    # Weights differ by float32's rounding; no latent of this picture is rounded otherwise for it.
    assert (actual - expected).norm() < 1e-5 * expected.norm()
    coder = models.Coder(single)
    decoded = coder.decode(coder.encode(x))
    torch.testing.assert_close(decoded, actual.clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("quality", "message"),
    [("37.5", "a network of a single rate; leave out --quality"), ("101", "at most 100, got")],
)
def test_a_quality_that_there_is_not_is_one_line(tmp_path, checkpoint, quality, message):
    with pytest.raises(UsageError, match=message):
        export.main([checkpoint, str(tmp_path / "x.safetensors"), "--quality", quality])
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [("nowhere/x.safetensors", "folder .*nowhere does not exist"), ("x.pt", "must end in")],
)
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, checkpoint, output, message):
    with pytest.raises(UsageError, match=message):
        export.main([checkpoint, str(tmp_path / output)])


def test_weights_without_their_network_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.pth.tar")
    with pytest.raises(UsageError, match=r"lacks model, model_args; give a file that train\.py"):
        export.main([str(tmp_path / "x.pth.tar"), str(tmp_path / "x.safetensors")])


def test_weights_that_could_not_be_loaded_are_refused(tmp_path, checkpoint):
    for damaged in ([1], {"g_a.0.bias": 3}):
        torch.save({**load_checkpoint(checkpoint), "state_dict": damaged}, tmp_path / "x.pth.tar")
        with pytest.raises(UsageError, match=r"x\.pth\.tar"):
            export.main([str(tmp_path / "x.pth.tar"), str(tmp_path / "x.safetensors")])
    assert not (tmp_path / "x.safetensors").exists()


def test_what_no_training_goes_on_from_is_refused(tmp_path, checkpoint):
    output = str(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="--for-training needs a checkpoint of a run"):
        export.main([checkpoint, output, "--for-training"])
    with pytest.raises(UsageError, match="leave out --quality"):
        export.main([checkpoint, output, "--for-training", "--quality", "40"])
    with pytest.raises(UsageError, match="--weight-bytes 1 is for --for-training only"):
        export.main([checkpoint, output, "--weight-bytes", "1"])
