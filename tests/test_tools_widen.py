"""A network with more channels of y codes the old ones as it did."""

import pytest
import torch
from conftest import save_checkpoint, tiny_model

from models import Coder, load_model
from tools import widen
from utils import UsageError


@pytest.mark.parametrize("qualities", [0, 3])
@torch.no_grad()
def test_widened_network_codes_the_old_channels_as_before(qualities):
    model = tiny_model(qualities=qualities)
    slices, M = model.config["num_slices"], model.config["M"]
    wide = widen.widened(model, 2 * M)
    assert wide.config == {**model.config, "M": 2 * M}
    x, quality = torch.rand(2, 3, 64, 128), 50 if qualities else None
    before, after = model(x, quality), wide(x, quality)
    torch.testing.assert_close(after["x_hat"], before["x_hat"])
    torch.testing.assert_close(after["likelihoods"]["z"], before["likelihoods"]["z"])
    old, new = after["likelihoods"]["y"].unflatten(1, (slices, 2, M // slices)).unbind(2)
    torch.testing.assert_close(old.flatten(1, 2), before["likelihoods"]["y"])
    assert (new < 0.9).any()  # else nothing of the new channels could be learnt


def test_file_of_a_widened_network_codes(tmp_path):
    path = tmp_path / "wide.safetensors"
    widen.main([save_checkpoint(tiny_model(), tmp_path / "a.pth.tar"), str(path), "--M", "40"])
    coder, x = Coder(load_model(path)), torch.rand(1, 3, 64, 128)
    assert coder.decode(coder.encode(x)).shape == x.shape


@pytest.mark.parametrize(
    ("output", "M", "message"),
    [
        ("wide.safetensors", "42", "M=42 is not a multiple of num_slices=5"),
        ("wide.safetensors", "15", "M=15 is less than the 20 channels that there are"),
        ("wide.pt", "40", "must end in"),
    ],
)
def test_what_cannot_be_widened_is_one_line(tmp_path, output, M, message):
    path = save_checkpoint(tiny_model(), tmp_path / "a.pth.tar")
    with pytest.raises(UsageError, match=message):
        widen.main([path, str(tmp_path / output), "--M", M])
    assert not (tmp_path / output).exists()
