"""The sum of the parts of gradients, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from stage_checks import DEVICE, TOLERANCE, error, needs_kernels

pytestmark = needs_kernels


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 1), id="one-value"),
        pytest.param((4, 3, 100), id="groups"),
        pytest.param((1, 300, 33), id="more-parts-than-a-program-fetches-at-once"),
        pytest.param((2, 2, 5000), id="several-programs"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_is_the_sum(shape, dtype):
    from kernels.sum_triton import sum_parts

    parts_dtype = torch.promote_types(dtype, torch.float32)
    parts = torch.randn(shape, dtype=parts_dtype, device=DEVICE)
    groups, _, size = shape
    out = torch.empty(groups, size, dtype=dtype, device=DEVICE)
    sum_parts(parts, out)
    assert error(out, parts.sum(1)) < TOLERANCE[dtype]


def test_it_fills_two_tensors_and_repeats_a_group():
    from kernels.sum_triton import sum_parts

    parts = torch.randn(7, 50, device=DEVICE)[:, :40]  # rows further apart than they are long
    first, second = torch.empty(4, 30, device=DEVICE), torch.empty(4, 10, device=DEVICE)
    sum_parts(parts.expand(4, 7, 40), first, second)
    for row in torch.cat((first, second), dim=1):
        assert error(row, parts.sum(0)) < TOLERANCE[torch.float32]
