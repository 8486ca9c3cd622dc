"""Our networks in CompressAI's own program for evaluation."""

import json
from pathlib import Path

import pytest
import torch
from conftest import gained_model, save_checkpoint, tiny_model
from PIL import Image

import eval as evaluation
from tools import eval_model
from utils import UsageError

# CompressAI's program gives the whole process one thread when it is imported.
pytestmark = pytest.mark.usefixtures("own_threads")
PICTURE = Path(__file__).parent.parent / "demo" / "train" / "crop4.jpg"


@pytest.fixture
def own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with a picture that nobody pads."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.open(PICTURE).crop((0, 0, 192, 192)).save(folder / "a.png")
    return str(folder)


@pytest.mark.parametrize("name", ["mambavc", "convvc"])
def test_compressai_measures_what_eval_measures(tmp_path, pictures, name):
    checkpoint = save_checkpoint(tiny_model(name), tmp_path / "x.pth.tar", name)
    eval_model.main(
        ["checkpoint", pictures, "-a", name, "-p", checkpoint, "-d", str(tmp_path), "-o", "theirs"]
    )
    file = tmp_path / "ours.json"
    evaluation.main(["--data", pictures, "--checkpoint", checkpoint, "--json", str(file)])
    ours, theirs = (
        json.loads(path.read_text())["results"] for path in (file, tmp_path / "theirs.json")
    )
    assert theirs["psnr-rgb"] == pytest.approx(ours["psnr-rgb"], abs=1e-4)  # theirs is in float32
    assert theirs["ms-ssim-rgb"] == pytest.approx(ours["ms-ssim-rgb"], abs=1e-6)
    # Ours counts the header and the guarded symbols, at most 51 bytes on Kodak.
    assert 0 < ours["bpp"][0] - theirs["bpp"][0] <= 8 * 51 / 192**2


def test_what_it_cannot_measure_is_refused(tmp_path, pictures):
    command = ["checkpoint", pictures, "-a", "mambavc", "-p"]
    with pytest.raises(UsageError, match=r"nope\.pth\.tar does not exist"):
        eval_model.main([*command, str(tmp_path / "nope.pth.tar")])
    with pytest.raises(UsageError, match="no quality to a network of every rate"):
        eval_model.main([*command, save_checkpoint(gained_model(), tmp_path / "x.pth.tar")])


def test_weights_by_quality_are_refused(pictures):
    with pytest.raises(UsageError, match="use: checkpoint"):
        eval_model.main(["pretrained", pictures, "-a", "mambavc"])
