"""Shipped checkpoints: streams made on a GPU decode here, and their numbers hold."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import eval as evaluation
import utils
from models import Coder, build_model, container, load_model
from models.checkpoint import CHECKPOINT_FOLDER, find_checkpoint, list_checkpoints, load_checkpoint

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


# The same weights with gains, encoded on a CPU from crop1.jpg:
# file: (height, width, quality, CRC-32 of all decoded symbols, PSNR in dB).
STREAMS_2 = {
    "version2-0.mvc": (97, 131, 0.0, 0x0ACC8FE0, 28.270),
    "version2-45.67.mvc": (97, 131, 45.67, 0xA48FB7AA, 33.674),
    "version2-100.mvc": (64, 40, 100.0, 0xCD6BEB93, 36.830),
}


def with_gains():
    """A network of every rate, not trained as one, whose weights are the same on any machine."""
    model = build_model("mambavc-light", qualities=3).eval()
    model.load_single_rate(load_checkpoint(NAME)["state_dict"])
    steps = torch.tensor([-1.0, 0.0, 1.0])[:, None]
    with torch.no_grad():
        model.gains.y_enc.copy_(steps + torch.arange(160) % 5 / 16)
        model.gains.y_dec.copy_(-model.gains.y_enc)
        model.gains.z_enc.copy_(steps / 8)
        model.gains.z_dec.copy_(-steps / 16)
    return model


@torch.no_grad()
def test_streams_of_version_2_decode_at_their_quality():
    coder = Coder(with_gains())
    original = utils.to_tensor(utils.read_image(ROOT / "demo" / "train" / "crop1.jpg"))
    for name, (height, width, quality, crc, psnr) in STREAMS_2.items():
        data = (Path(__file__).parent / "assets" / "streams" / name).read_bytes()
        stream = container.unpack(data)
        assert (stream.version, stream.quality, stream.crc) == (2, quality, crc)
        x_hat = coder.decode(data)  # raises where a symbol differs
        x = original[None, :, :height, :width]
        assert utils.psnr(x_hat, x) == pytest.approx(psnr, abs=0.01)


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
    # As measured on an H200, see results/mambavc-light-0.0130-kodak.json.
    assert row["bpp"] == pytest.approx(0.3061, rel=0.005)
    assert row["psnr-rgb"] == pytest.approx(34.800, abs=0.02)


@torch.no_grad()
def test_network_of_every_rate():
    """A stream of quality 0 and 20 guards, coded on an H200; the numbers of a quality between."""
    coder = Coder(load_model("mambavc-light"))
    x = utils.to_tensor(utils.read_image(ROOT / "demo" / "test" / "kodim20.png"))[None]
    data = (Path(__file__).parent / "assets" / "streams" / "kodim20-0.mvc").read_bytes()
    assert utils.psnr(coder.decode(data), x) == pytest.approx(31.025, abs=0.01)
    stream = container.unpack(again := coder.encode(x, quality=0))
    assert len(again) - len(stream.z) - len(stream.y) <= 40  # one scale in 60 million is listed
    row, _ = evaluation.evaluate_image(coder, x, estimate=False, quality=50)
    # See results/mambavc-light-kodak.json.
    assert row["bpp"] == pytest.approx(0.3094, rel=0.005)
    assert row["psnr-rgb"] == pytest.approx(35.514, abs=0.02)


@pytest.mark.parametrize("name", list_checkpoints())
def test_file_is_the_one_recorded(name):
    record = json.loads((CHECKPOINT_FOLDER / f"{name}.json").read_text())
    assert record["file"] == find_checkpoint(name).name
    digest = hashlib.sha256((CHECKPOINT_FOLDER / record["file"]).read_bytes()).hexdigest()
    assert digest == record["sha256"]
    load_checkpoint(name)  # which checks the parts of one in parts
