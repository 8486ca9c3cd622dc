"""The shipped checkpoint: streams made on a GPU decode here, and its numbers hold."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import eval as evaluation
import utils
from models import Coder, container, load_model
from models.checkpoint import CHECKPOINT_FOLDER

ROOT = Path(__file__).parent.parent
NAME = "mambavc-light-0.0130"

# Encoded on an H200 from the top left corner of demo/train/*.jpg:
# file: (crop, height, width, CRC-32 of all decoded symbols, PSNR in dB).
STREAMS = {
    "crop1b.mvc": ("crop1.jpg", 97, 131, 0x1D680660, 33.504),
    "crop2b.mvc": ("crop2.jpg", 97, 131, 0x6FE04944, 32.660),
    "crop2c.mvc": ("crop2.jpg", 1, 1, 0x00C1F8E4, 36.567),
    "crop2d.mvc": ("crop2.jpg", 200, 64, 0xE8F1CBC5, 36.063),
    "crop3d.mvc": ("crop3.jpg", 200, 64, 0xDAFBC09F, 36.707),
    "crop4b.mvc": ("crop4.jpg", 97, 131, 0x997AC857, 34.191),
}


@pytest.fixture(scope="module")
def coder():
    return Coder(load_model(NAME))


@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_streams_of_a_gpu_decode_on_this_machine(coder, name):
    crop, height, width, crc, psnr = STREAMS[name]
    data = (Path(__file__).parent / "assets" / "streams" / name).read_bytes()
    assert container.unpack(data).crc == crc
    x_hat = coder.decode(data)  # raises where a symbol differs
    original = utils.to_tensor(utils.read_image(ROOT / "demo" / "train" / crop))
    # Float32 synthesis may round a sample in some thousands to the next 8-bit value.
    assert utils.psnr(x_hat, original[None, :, :height, :width]) == pytest.approx(psnr, abs=0.01)


@torch.no_grad()
def test_this_machine_encodes_as_well_as_the_gpu(coder):
    name = "crop1b.mvc"
    crop, height, width, _, _ = STREAMS[name]
    x = utils.to_tensor(utils.read_image(ROOT / "demo" / "train" / crop))[None, :, :height, :width]
    data = coder.encode(x)
    decoded = coder.decode(data)
    gpu = (Path(__file__).parent / "assets" / "streams" / name).read_bytes()
    # g_a runs in float32, on the GPU with convolutions in TF32: latents near one half are rounded
    # otherwise, and later slices follow. In so small a picture that is bytes and tenths of a dB.
    assert len(data) == pytest.approx(len(gpu), abs=40)
    assert utils.psnr(decoded, x) == pytest.approx(STREAMS[name][4], abs=0.15)


@torch.no_grad()
def test_numbers_of_a_kodak_picture(coder):
    x = utils.to_tensor(utils.read_image(ROOT / "demo" / "test" / "kodim20.png"))[None]
    row, _ = evaluation.evaluate_image(coder, x, estimate=False)
    # As measured on an H200, see results/mambavc-light-kodak.json.
    assert row["bpp"] == pytest.approx(0.3061, rel=0.005)
    assert row["psnr-rgb"] == pytest.approx(34.800, abs=0.02)


def test_file_is_the_one_recorded():
    record = json.loads((CHECKPOINT_FOLDER / f"{NAME}.json").read_text())
    digest = hashlib.sha256((CHECKPOINT_FOLDER / record["file"]).read_bytes()).hexdigest()
    assert digest == record["sha256"]
