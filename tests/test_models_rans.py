"""The entropy coder: exact, compact, and safe on any bytes."""

import copy

import numpy as np
import pytest
import torch
from compressai.ans import RansEncoder
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from hypothesis import given, settings
from hypothesis import strategies as st

from models.container import BitstreamError
from models.rans import MAX_SYMBOL, SymbolDecoder, Tables, encode

SCALES = np.exp(np.linspace(np.log(0.11), np.log(256), 64))


@pytest.fixture(scope="module")
def conditional():
    model = GaussianConditional(None)
    model.update_scale_table(SCALES.tolist(), force=True)
    return model


def gaussian_symbols(count, seed=0):
    """Symbols with their table indexes, as a network predicts them: many small scales."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(-1, 1.5, count)).clip(SCALES[0], SCALES[-1])
    indexes = np.searchsorted(SCALES, scales).clip(max=63).astype(np.int32)
    return np.rint(rng.normal(size=count) * scales).astype(np.int32), indexes


def decode(data, indexes, tables):
    decoder = SymbolDecoder(data, tables)
    symbols = decoder.get(indexes)
    decoder.finish()
    return symbols


@st.composite
def coded_symbols(draw):
    """Any valid tables, and symbols inside and far outside of them."""
    count = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(2, 40), min_size=count, max_size=count))
    cdfs = np.zeros((count, max(widths) + 1), dtype=np.int32)
    for row, width in zip(cdfs, widths, strict=True):
        inner = draw(
            st.lists(st.integers(1, 65535), min_size=width - 1, max_size=width - 1, unique=True)
        )
        row[1:width] = sorted(inner)
        row[width] = 65536
    offsets = draw(st.lists(st.integers(-1000, 1000), min_size=count, max_size=count))
    lengths = np.array(widths, dtype=np.int32) + 1
    tables = Tables.build(cdfs, lengths, np.array(offsets, dtype=np.int32))
    symbol = st.integers(-50, 50) | st.integers(-MAX_SYMBOL, MAX_SYMBOL)
    pairs = draw(st.lists(st.tuples(symbol, st.integers(0, count - 1)), max_size=200))
    symbols, indexes = np.array(pairs, dtype=np.int32).reshape(-1, 2).T
    return tables, symbols, indexes


@given(coded_symbols(), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_any_symbols_come_back_in_any_portions(coded, cut):
    tables, symbols, indexes = coded
    decoder = SymbolDecoder(encode(symbols, indexes, tables), tables)
    decoded = np.concatenate([decoder.get(indexes[:cut]), decoder.get(indexes[cut:])])
    decoder.finish()
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, symbols)


@given(st.binary(max_size=60), coded_symbols())
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_or_are_refused(data, coded):
    tables, _, indexes = coded
    try:
        symbols = decode(data, indexes, tables)
    except BitstreamError:
        return
    np.testing.assert_array_equal(
        decode(encode(symbols, indexes, tables), indexes, tables), symbols
    )


def test_rate_is_that_of_the_tables(conditional):
    symbols, indexes = gaussian_symbols(100_000)
    tables = Tables.of(conditional)
    entries = symbols - tables.offsets[indexes]
    assert (entries >= 0).all()
    positions = tables.rows[indexes] + entries
    frequencies = tables.cdf[positions + 1] - tables.cdf[positions]
    ideal = -np.log2(frequencies / 65536).sum() / 8
    # The first state costs two bytes, and a byte may be left incomplete.
    assert len(encode(symbols, indexes, tables)) <= ideal + 4


def test_rate_is_that_of_compressai(conditional):
    symbols, indexes = gaussian_symbols(20_000)
    symbols[::500] += 5000  # far outside the tables
    theirs = RansEncoder().encode_with_indexes(
        symbols.tolist(),
        indexes.tolist(),
        conditional.quantized_cdf.tolist(),
        conditional.cdf_length.tolist(),
        conditional.offset.tolist(),
    )
    ours = encode(symbols, indexes, Tables.of(conditional))
    np.testing.assert_array_equal(decode(ours, indexes, Tables.of(conditional)), symbols)
    assert len(ours) <= 1.001 * len(theirs)


def test_format_does_not_change():
    """Files on disk must stay readable: these bytes are the format."""
    cdfs = np.array([[0, 100, 65000, 65536, 0], [0, 1, 30000, 65535, 65536]], dtype=np.int32)
    tables = Tables.build(cdfs, np.array([4, 5]), np.array([-1, -1]))
    symbols = np.array([0, 0, -1, 1, 7, -300, 0, 1, -1, 0, MAX_SYMBOL], dtype=np.int32)
    indexes = np.array([0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 1], dtype=np.int32)
    data = encode(symbols, indexes, tables)
    assert data.hex() == "e76810d74ac3a8ff1f6c4b67fddfc3fdc7"
    np.testing.assert_array_equal(decode(data, indexes, tables), symbols)


def test_every_cut_and_every_lengthened_string_is_refused(conditional):
    symbols, indexes = gaussian_symbols(2000)
    tables = Tables.of(conditional)
    data = encode(symbols, indexes, tables)
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            decode(data[:length], indexes, tables)
    for extra in (b"\0", b"\0\0", b"\1\2", data):
        with pytest.raises(BitstreamError):
            decode(data + extra, indexes, tables)


def test_short_string_is_refused_before_many_symbols_are_decoded(conditional):
    """Time is bounded by the string, not by the size that a hostile file claims."""
    indexes = np.zeros(20_000_000, dtype=np.int32)
    symbols = np.zeros(1000, dtype=np.int32)
    data = encode(symbols, indexes[:1000], Tables.of(conditional))
    with pytest.raises(BitstreamError, match="ends before"):
        SymbolDecoder(data, Tables.of(conditional)).get(indexes)


def test_wrong_number_of_symbols_is_refused(conditional):
    symbols, indexes = gaussian_symbols(3000)
    tables = Tables.of(conditional)
    data = encode(symbols, indexes, tables)
    for count in (0, 1, 2999):
        with pytest.raises(BitstreamError, match="holds more"):
            decode(data, indexes[:count], tables)
    with pytest.raises(BitstreamError, match="ends before"):
        decode(data, np.concatenate([indexes, indexes[:50]]), tables)


@pytest.mark.parametrize("index", [-1, 64, 2**31 - 1])
def test_index_that_names_no_table_is_refused(conditional, index):
    tables = Tables.of(conditional)
    one, wrong = np.zeros(1, dtype=np.int32), np.array([index], dtype=np.int32)
    with pytest.raises(ValueError, match="outside the 64 tables"):
        encode(one, wrong, tables)
    with pytest.raises(BitstreamError):
        decode(encode(one, one, tables), wrong, tables)


def test_symbol_beyond_the_limit_is_refused(conditional):
    one = np.zeros(1, dtype=np.int32)
    for symbol in (MAX_SYMBOL + 1, -MAX_SYMBOL - 1, -(2**31)):
        with pytest.raises(ValueError, match="larger than"):
            encode(np.array([symbol], dtype=np.int32), one, Tables.of(conditional))
    with pytest.raises(ValueError, match="an index each"):
        encode(one, np.zeros(2, dtype=np.int32), Tables.of(conditional))


def test_model_without_tables_is_refused():
    with pytest.raises(ValueError, match=r"call update\(\)"):
        Tables.of(EntropyBottleneck(4))


@pytest.mark.parametrize(
    "change",
    [
        lambda cdfs, lengths, offsets: cdfs[3].fill_(0),
        lambda cdfs, lengths, offsets: cdfs[3, 2].copy_(cdfs[3, 1]),
        lambda cdfs, lengths, offsets: cdfs[0, 0].fill_(-5),
        lambda cdfs, lengths, offsets: cdfs[40, 1:5].copy_(
            torch.tensor([2**31 - 1, -(2**31), -1, cdfs[40, 5] - 1])
        ),
        lambda cdfs, lengths, offsets: lengths[1].fill_(2**30),
        lambda cdfs, lengths, offsets: lengths[1].fill_(-1),
        lambda cdfs, lengths, offsets: offsets[1].fill_(2**30),
    ],
    ids=[
        "empty",
        "flat",
        "negative",
        "rises over 2**31",
        "too long",
        "negative length",
        "huge offset",
    ],
)
def test_damaged_tables_are_refused(conditional, change):
    model = copy.deepcopy(conditional)
    change(model._quantized_cdf, model._cdf_length, model._offset)
    with pytest.raises(ValueError, match="is damaged"):
        Tables.of(model)


def test_mismatched_tables_are_refused(conditional):
    model = copy.deepcopy(conditional)
    model._offset = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not go with"):
        Tables.of(model)
