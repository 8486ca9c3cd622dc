"""The reference scan against results worked out by hand, and its gradients against differences."""

import math

import pytest
import torch

from kernels import scan_reference as reference
from kernels.scan_reference import ScanInputs

LN2 = math.log(2)


def by_hand(x, B, C, D, height, width):
    """Inputs of one channel and one state for which delta = ln 2 and A = -1, so that a = 1/2.

    x has one number per pixel; B, C and D one per direction.
    """
    x = torch.tensor(x, dtype=torch.float64).view(1, height, width, 1)
    rbc = [[0.0, b, c] for b, c in zip(B, C, strict=True)]
    x_dbl = torch.tensor(rbc, dtype=torch.float64).expand(1, height, width, 4, 3)
    zeros = torch.zeros(4, 1, 1, dtype=torch.float64)  # delta = softplus(0), A = -exp(0)
    D = torch.tensor(D, dtype=torch.float64)
    return ScanInputs(x, x_dbl, zeros, zeros[:, 0], zeros[:, 0], D)


def test_one_pixel():
    # Each direction gives C delta B x + D x.
    inputs = by_hand([3.0], B=[1, 2, 3, 4], C=[5, 6, 7, 8], D=[1, 10, 100, 1000], height=1, width=1)
    expected = 3 * (LN2 * (5 + 12 + 21 + 32) + 1111)
    torch.testing.assert_close(reference.scan_2d(inputs).item(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        # An impulse at pixel (0, 1) of a 2 x 3 image halves with every step after it.
        (0, [[0, 1, 1 / 2], [1 / 4, 1 / 8, 1 / 16]]),
        (1, [[0, 1, 1 / 4], [0, 1 / 2, 1 / 8]]),
        (2, [[1 / 2, 1, 0], [0, 0, 0]]),
        (3, [[1 / 4, 1, 0], [1 / 2, 0, 0]]),
    ],
    ids=["row-major", "column-major", "row-major-reversed", "column-major-reversed"],
)
def test_each_direction_visits_the_pixels_in_its_order(direction, expected):
    only = [float(k == direction) for k in range(4)]
    inputs = by_hand([0, 1, 0, 0, 0, 0], B=[1] * 4, C=only, D=[0] * 4, height=2, width=3)
    y = reference.scan_2d(inputs)[0, :, :, 0] / LN2
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64))


def test_delta_is_softplus_of_the_projected_rank():
    x, x_dbl, _, _, A_logs, D = by_hand([1.0], [1] * 4, [1] * 4, [0] * 4, 1, 1)
    x_dbl = x_dbl.clone()
    x_dbl[..., 0] = 2.0
    weight = torch.tensor([1.0, 2.0, -3.0, -200.0], dtype=torch.float64).view(4, 1, 1)
    bias = torch.full((4, 1), 0.5, dtype=torch.float64)
    deltas = [math.log1p(math.exp(z)) for z in (2.5, 4.5, -5.5, -399.5)]
    y = reference.scan_2d(ScanInputs(x, x_dbl, weight, bias, A_logs, D))
    torch.testing.assert_close(y.item(), sum(deltas), rtol=1e-14, atol=0)


def test_gradients_match_differences():
    sizes = [(2, 2, 3, 2), (2, 2, 3, 4, 5), (4, 2, 1), (4, 2), (8, 2), (8,)]
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda *t: reference.scan_2d(ScanInputs(*t)), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    sizes = [(1, 3, 4, 8), (1, 3, 4, 4, 9), (4, 8, 1), (4, 8), (32, 4), (32,)]
    inputs = ScanInputs(*(torch.randn(size).to(dtype) for size in sizes))
    y = reference.scan_2d(inputs)
    assert torch.equal(y, reference.scan_2d(ScanInputs(*(t.float() for t in inputs))).to(dtype))
    with torch.autocast("cpu", dtype):
        assert torch.equal(y, reference.scan_2d(inputs))
