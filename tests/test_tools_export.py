"""Exported weights decode what the checkpoint encoded; what cannot be exported is one line."""

import hashlib
import stat
from pathlib import Path

import pytest
import torch
from conftest import gained_model, save_checkpoint, spread_model

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
    with pytest.raises(UsageError, match="--for-training needs a run's latest checkpoint"):
        export.main([checkpoint, output, "--for-training"])
