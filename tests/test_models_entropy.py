"""The parts of the entropy model: quantiles, and the symbols whose table is in doubt."""

import numpy as np
import pytest
import torch
from conftest import spread_model

from models.container import BitstreamError
from models.entropy import (
    GUARD,
    LatentDecoder,
    LatentEncoder,
    LatentTables,
    Symbols,
    round_y,
)


@pytest.fixture
def model():
    return spread_model()


@pytest.fixture
def tables(model):
    return LatentTables(model.entropy_bottleneck, model.gaussian_conditional)


class Prediction:
    """A `SlicePredictor` of one slice, whose scale is given and whose mean is zero."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, z_hat, quantise):
        return quantise(0, torch.zeros_like(self.scale), self.scale)


def coded(tables, scale):
    """Encoder of latents that are all zero, and its string."""
    encoder = LatentEncoder(tables, len(scale))
    symbols = round_y(torch.zeros_like(scale), torch.zeros(()), Prediction(scale), tables)
    return encoder, encoder.encode_y(Symbols(*(t.numpy() for t in symbols)))


@torch.no_grad()
def test_scales_near_a_boundary_are_listed_and_taken_from_the_list(model, tables):
    boundary = model.gaussian_conditional.scale_table[20].double()
    steps = torch.tensor([-GUARD / 2, GUARD / 2, -2 * GUARD, 2 * GUARD]).double()
    scale = (boundary * (1 + steps)).reshape(1, 1, 1, 4).expand(1, 4, 1, 4)
    encoder, _ = coded(tables, scale)
    below, above = 20, 21
    assert encoder.guards[0] == [
        (4 * channel + i, index) for channel in range(4) for i, index in ((0, below), (1, above))
    ]


@pytest.mark.parametrize("position", [16, 2**32 - 1])
@torch.no_grad()
def test_guard_beyond_the_picture_is_refused(tables, position):
    scale = torch.ones(1, 4, 1, 4).double()
    _, strings = coded(tables, scale)
    indexes = tables.indexes(scale).numpy()
    for guards, refused in (([(15, 0)], False), ([(15, 0), (position, 0)], True)):
        guards[0] = (15, int(indexes[0, 15]))
        decoder = LatentDecoder(tables, strings, [guards])
        decoder.read_slice(indexes, np.empty((1, 16), np.int32))
        if refused:
            with pytest.raises(BitstreamError, match="beyond the picture"):
                decoder.finish()
        else:
            decoder.finish()


@torch.no_grad()
def test_a_symbol_costs_hardly_more_than_by_a_table_of_its_own_scale(model, tables):
    scales = torch.logspace(-0.5, 0.7, 500, dtype=torch.float64)  # 0.3 to 5
    indexes = torch.searchsorted(tables.boundaries, scales)
    conditional = model.gaussian_conditional
    cost = []
    for scale, i in zip(scales, indexes, strict=True):
        width = conditional._cdf_length[i] - 2  # without the escape symbol
        own = conditional._quantized_cdf[i, : width + 1].double().diff() / 2**16
        edges = conditional._offset[i] + torch.arange(width + 1) - 0.5
        true = torch.special.ndtr(edges / scale).diff()
        cost.append((true * (true / own).log2()).nan_to_num().sum())
    # In nats, the square of half a step of the scales' logarithms. That of a whole one, as with
    # CompressAI's tables, would be up to 0.02 bits.
    assert 0 < max(cost) < 0.008


@torch.no_grad()
def test_update_solves_the_quantiles(model):
    logits = model.entropy_bottleneck._logits_cumulative(
        model.entropy_bottleneck.quantiles, stop_gradient=True
    )
    # CompressAI's bisection stops at 1e-3 of a quantile; logits move by less than 5 % there.
    torch.testing.assert_close(
        logits, model.entropy_bottleneck.target.expand_as(logits), rtol=0.05, atol=0.05
    )
