"""The parts of the entropy model: quantiles, and the symbols whose table is in doubt."""

import pytest
import torch
from conftest import spread_model

from models.container import BitstreamError
from models.entropy import GUARD, LatentDecoder, LatentEncoder, LatentTables


@pytest.fixture
def model():
    return spread_model()


@pytest.fixture
def tables(model):
    return LatentTables(model.entropy_bottleneck, model.gaussian_conditional)


@torch.no_grad()
def test_scales_near_a_boundary_are_listed_and_taken_from_the_list(model, tables):
    boundary = model.gaussian_conditional.scale_table[20].double()
    encoder = LatentEncoder(tables, torch.zeros(1, 20, 1, 4))
    factors = torch.tensor([1 - GUARD / 2, 1 + GUARD / 2, 1 - 2 * GUARD, 1 + 2 * GUARD])
    scale = (boundary * factors.double()).reshape(1, 1, 1, 4).expand(1, 4, 1, 4)
    encoder.round_slice(0, torch.zeros(1, 4, 1, 4).double(), scale)
    encoder.encode_y()
    below, above = 20, 21
    assert encoder.guards[0] == [
        (4 * channel + i, index) for channel in range(4) for i, index in ((0, below), (1, above))
    ]


@pytest.mark.parametrize("position", [16, 2**32 - 1])
@torch.no_grad()
def test_guard_beyond_the_picture_is_refused(tables, position):
    mu, scale = torch.zeros(1, 4, 1, 4).double(), torch.ones(1, 4, 1, 4).double()
    encoder = LatentEncoder(tables, torch.zeros(1, 4, 1, 4))
    encoder.round_slice(0, mu, scale)
    strings = encoder.encode_y()
    for guards, refused in (([(15, 0)], False), ([(15, 0), (position, 0)], True)):
        guards[0] = (15, int(encoder.table_indexes(scale)[0, 3, 0, 3]))
        decoder = LatentDecoder(tables, strings, [guards])
        decoder.read_slice(0, mu, scale)
        if refused:
            with pytest.raises(BitstreamError, match="beyond the picture"):
                decoder.finish()
        else:
            decoder.finish()


@torch.no_grad()
def test_update_solves_the_quantiles(model):
    logits = model.entropy_bottleneck._logits_cumulative(
        model.entropy_bottleneck.quantiles, stop_gradient=True
    )
    # CompressAI's bisection stops at 1e-3 of a quantile; logits move by less than 5 % there.
    torch.testing.assert_close(
        logits, model.entropy_bottleneck.target.expand_as(logits), rtol=0.05, atol=0.05
    )
