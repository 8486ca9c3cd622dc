"""A network with another number of channels of y keeps the weights that fit it."""

import pytest
import torch
from conftest import save_checkpoint, tiny_model

from models import Coder, load_model
from tools import widen
from utils import UsageError


@pytest.mark.parametrize("qualities", [0, 3])
@torch.no_grad()
def test_widened_network_keeps_its_blocks_and_codes(qualities, tmp_path):
    model = tiny_model(qualities=qualities)
    path = tmp_path / "wide.safetensors"
    widen.main([save_checkpoint(model, tmp_path / "a.pth.tar"), str(path), "--M", "40"])
    wide = load_model(path)
    assert wide.config == {**model.config, "M": 40}
    x = torch.rand(1, 3, 64, 128)
    before, after = x, x
    for layer, same in zip(model.g_a[:-1], wide.g_a[:-1], strict=True):
        before, after = layer(before), same(after)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-3)  # the file has half precision
    coder = Coder(wide)
    quality = 50 if qualities else None
    assert coder.decode(coder.encode(x, quality)).shape == x.shape


@pytest.mark.parametrize(
    ("output", "M", "message"),
    [
        ("wide.safetensors", "42", "M=42 is not a multiple of num_slices=5"),
        ("wide.pt", "40", "must end in"),
    ],
)
def test_what_cannot_be_widened_is_one_line(tmp_path, output, M, message):
    path = save_checkpoint(tiny_model(), tmp_path / "a.pth.tar")
    with pytest.raises(UsageError, match=message):
        widen.main([path, str(tmp_path / output), "--M", M])
    assert not (tmp_path / output).exists()
