"""The search of a quality: what it finds, in how few codings, and what it does out of reach."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.search import MAX_CODINGS, TOLERANCE, Coding, find_coding


def search(measure, target):
    tried = []

    def code(quality):
        tried.append(quality)
        return Coding(quality, b"", measure(quality))

    found, codings = find_coding(code, target)
    assert codings == len(tried) <= MAX_CODINGS
    assert len({*tried}) == codings, "nothing is coded twice"
    assert all(0 <= quality <= 100 for quality in tried)
    nearest = min(abs(measure(quality) - target) for quality in tried)
    assert abs(found.measure - target) == nearest
    return found, codings


# Logarithms of sizes that grow thirtyfold: evenly, late, early, and mostly in the middle.
CURVES = {
    "even": lambda q: q / 30,
    "late": lambda q: (q / 100) ** 4 * 3.4,
    "early": lambda q: (q / 100) ** 0.7 * 3.4,
    "middle": lambda q: q / 60 + 1.7 / (1 + math.exp((45 - q) / 5)),
}


@pytest.mark.parametrize("name", CURVES)
@given(share=st.floats(0, 1))
def test_targets_within_the_range_are_met(name, share):
    measure = CURVES[name]
    target = measure(0) + share * (measure(100) - measure(0))
    found, codings = search(measure, target)
    assert abs(found.measure - target) <= TOLERANCE
    if name == "even":
        assert codings <= 3


@pytest.mark.parametrize(("target", "quality"), [(-1, 0), (9, 100)])
def test_out_of_reach_the_end_is_nearest(target, quality):
    found, codings = search(CURVES["even"], target)
    assert (found.quality, codings) == (quality, 2)


def test_a_measure_of_few_values_ends_at_the_nearest():
    found, _ = search(lambda quality: float(quality > 42), 0.4)
    assert found.measure == 0


@given(st.lists(st.floats(-3, 3), min_size=11, max_size=11), st.floats(-3, 3))
def test_a_measure_that_does_not_rise_ends_as_well(values, target):
    search(lambda quality: values[int(quality / 10)], target)


def test_a_perfect_picture_is_only_worth_what_lies_above_the_target():
    found, _ = search(lambda quality: quality / 30 if quality < 80 else math.inf, 2.5)
    assert abs(found.measure - 2.5) <= TOLERANCE
