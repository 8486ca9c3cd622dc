"""Triton kernel that adds up what the programs of another kernel have each summed.

A gradient by a parameter is a sum over pixels, of which each program of a kernel makes a part. Here
the parts are added in a fixed order, so that the sum does not depend on the order in which programs
run, and rounded to the gradient's dtype, in one launch for a weight and its bias.

Prefixes: `i_` program or loop index, `o_` offsets, `m_` mask, `p_` pointer, `b_` block value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements that a program fetches together
ROWS = 256  # of them, at most
PROGRAMS = 132  # fewest, one for each of an H100's multiprocessors, if columns are wide enough
COLUMNS = 16  # fewest
WARPS = 8


@triton.jit(do_not_specialize=["count", "first_size"])
def _sum_kernel(
    parts,  # (groups, count, size), with strides of group and part
    first,  # (groups, first_size), out
    second,  # (groups, size - first_size), out, or None
    count,
    size,
    first_size,
    group_stride,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_group = tl.program_id(1).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < size
    p_parts = parts + i_group * group_stride + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], parts.dtype.element_ty)
    for i in range(0, count, BLOCK_R):
        m_parts = (i + o_r < count)[:, None] & m_c[None, :]
        b_sum += tl.load(p_parts + tl.cast(i, tl.int64) * stride, mask=m_parts, other=0.0)
    b_out = tl.sum(b_sum, 0)
    p_first = first + i_group * first_size + o_c
    tl.store(p_first, b_out.to(first.dtype.element_ty), mask=o_c < first_size)
    if second is not None:
        p_second = second + i_group * (size - first_size) + o_c - first_size
        tl.store(p_second, b_out.to(second.dtype.element_ty), mask=m_c & (o_c >= first_size))


def sum_parts(parts: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Write the sum of parts into one tensor, or its front into one and the rest into another.

    Args:
        parts: (groups, count, size), float32 or float64, each row of `size` contiguous; an expanded
            axis of groups writes the same sum several times.
        first, second: contiguous and of any dtype and shape, for groups of together `size` values.
    """
    groups, count, size = parts.shape
    block_r = min(ROWS, triton.next_power_of_2(count))
    block_c = TILE // block_r
    while block_c > COLUMNS and groups * triton.cdiv(size, block_c) < PROGRAMS:
        block_c //= 2
    with torch.cuda.device_of(parts):
        _sum_kernel[(triton.cdiv(size, block_c), groups)](
            parts, first, second, count, size, first.numel() // groups, parts.stride(0),
            parts.stride(1), BLOCK_R=block_r, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
