"""Networks by torch.hub, from a program that has modules of our names itself."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_model

import models
from models import checkpoint
from models.checkpoint import list_checkpoints, load_model
from models.coding import fingerprint

ROOT = Path(__file__).parent.parent
CHECKPOINT = "mambavc-light-0.0130"
PROGRAM = """
import hashlib, sys
import torch

def import_theirs():
    import kernels, models, models.coding, utils
    assert {kernels.WHOSE, models.WHOSE, models.coding.WHOSE, utils.WHOSE} == {"theirs"}
    assert not hasattr(models, "Coder")

if sys.argv[2] == "before":
    import_theirs()
path = sys.path[:]
model = torch.hub.load(sys.argv[1], "mambavc_light", pretrained=True, source="local")
again = torch.hub.load(sys.argv[1], "mambavc", source="local", N=8, M=20)
assert type(again) is type(model) and again.config["N"] == 8
assert sys.path == path
import_theirs()
x = torch.linspace(0, 1, 3 * 30 * 40).view(1, 3, 30, 40)
coded = model.compress(x, quality=50)
x_hat = model.decompress(**coded)["x_hat"]
assert x_hat.shape == x.shape and not model.training
print(hashlib.sha256(b"".join(strings[0] for strings in coded["strings"])).hexdigest())
"""


@pytest.fixture
def program(tmp_path):
    """A folder with a program, and with modules that have nothing to do with ours."""
    for name in ("kernels", "models"):
        (tmp_path / name).mkdir()
    for name in ("kernels/__init__.py", "models/__init__.py", "models/coding.py", "utils.py"):
        (tmp_path / name).write_text('WHOSE = "theirs"\n')
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize("when", ["before", "after"])
def test_networks_load_beside_modules_of_the_same_names(program, when):
    """Which the program has imported before, or imports afterwards; from another folder."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py", str(ROOT), when],
        cwd=program, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    x = torch.linspace(0, 1, 3 * 30 * 40).view(1, 3, 30, 40)
    coded = load_model("mambavc-light").compress(x, quality=50)
    ours = b"".join(strings[0] for strings in coded["strings"])
    assert done.stdout.strip() == hashlib.sha256(ours).hexdigest()


def hub(name, **arguments):
    return torch.hub.load(str(ROOT), name, source="local", **arguments)


@pytest.mark.parametrize("name", ["mambavc", "convvc", "swinvc"])
def test_networks_of_a_program_that_has_ours_are_ours(name):
    model = hub(name, **TINY)
    assert type(model) is type(models.build_model(name, **TINY))
    coded = model.compress(torch.rand(2, 3, 30, 40))
    assert model.decompress(**coded)["x_hat"].shape == (2, 3, 30, 40)


def test_weights_are_chosen_by_name():
    assert CHECKPOINT in list_checkpoints()
    assert hub("mambavc_light", pretrained=CHECKPOINT).config == load_model(CHECKPOINT).config


def test_weights_in_parts_are_loaded_as_others(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHECKPOINT_FOLDER", tmp_path)
    model = tiny_model()
    state = {"model": "mambavc", "model_args": model.config, "state_dict": model.state_dict()}
    checkpoint.save_weights(state, tmp_path / "mambavc.safetensors", max_part_bytes=900_000)
    assert len([*tmp_path.glob("mambavc-*")]) > 1
    for pretrained in (True, "mambavc"):
        loaded = hub("mambavc", pretrained=pretrained)
        assert fingerprint(loaded.state_dict()) == fingerprint(load_model("mambavc").state_dict())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convvc", {"pretrained": True}, f"convvc has no weights; there are .*{CHECKPOINT}"),
        ("convvc", {"pretrained": CHECKPOINT}, f"convvc has no weights called {CHECKPOINT}"),
        ("mambavc_light", {"pretrained": "x"}, f"called x; there are .*{CHECKPOINT}"),
        ("mambavc_light", {"pretrained": True, "N": 8}, "own sizes, got N; leave them out"),
    ],
)
def test_what_there_is_not_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        hub(name, **arguments)
