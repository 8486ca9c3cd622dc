"""Triton kernels of SiLU(depthwise 3x3 convolution), channels last.

Bound by memory traffic, so what matters is how often a map passes through it: every kernel reads
each map once and writes each result once (halos come from the cache). Channels are contiguous and
each thread owns four of them, 16 bytes in float32.

Prefixes: `i_` program or loop index, `o_` offsets, `m_` mask, `p_` pointer, `b_` block value; two
digits after a name are a tap's row and column. A condition that is one number enters a mask after
`True &`: Triton 3.9's interpreter else takes it for an int32 when it spreads it over a block, and
then refuses the mask (compiled code is the same).

Sums over pixels are kept per program and added by `sum_parts`, so that they do not depend on the
order in which programs run. No size below depends on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sum_triton import sum_parts

BLOCK = (16, 64)  # columns x channels of one program
GRAD_BLOCK = (16, 32)
GRAD_REGISTERS = 168  # at most: lets three programs share a multiprocessor
WARPS = 4
PROGRAMS = 2048  # rows per program are chosen to give about this many programs
ROWS = (2, 32)  # fewest, most: every program also reads a row above and one below


@triton.jit
def _load_row(x, i_row, width, dim, o_w, o_x, m_c, is_inside):
    """Pixels left of, at and right of each column of a row, [BLOCK_W, BLOCK_C] each."""
    is_inside = True & is_inside
    p_row = x + i_row.to(tl.int64) * width * dim + o_x
    m_left = (is_inside & (o_w >= 1) & (o_w <= width))[:, None] & m_c[None, :]
    m_mid = (is_inside & (o_w < width))[:, None] & m_c[None, :]
    m_right = (is_inside & (o_w + 1 < width))[:, None] & m_c[None, :]
    b_left = tl.load(p_row - dim, mask=m_left, other=0.0)
    b_mid = tl.load(p_row, mask=m_mid, other=0.0)
    b_right = tl.load(p_row + dim, mask=m_right, other=0.0)
    return b_left, b_mid, b_right


@triton.jit
def _load_taps(weight, o_c, m_c, FIRST: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr):
    """Three taps of one row of the 3x3 filter, each [1, BLOCK_C]."""
    b_left = tl.load(weight + o_c * 9 + FIRST, mask=m_c, other=0.0).to(ACC)
    b_mid = tl.load(weight + o_c * 9 + FIRST + STEP, mask=m_c, other=0.0).to(ACC)
    b_right = tl.load(weight + o_c * 9 + FIRST + 2 * STEP, mask=m_c, other=0.0).to(ACC)
    return b_left[None, :], b_mid[None, :], b_right[None, :]


@triton.jit
def _program_tile(height, width, dim, rows, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, first row, columns and channels of this program; channel blocks are neighbours."""
    n_c = tl.cdiv(dim, BLOCK_C)
    n_w = tl.cdiv(width, BLOCK_W)
    n_h = tl.cdiv(height, rows)
    i_tile = tl.program_id(0)
    o_c = i_tile % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    i_tile //= n_c
    o_w = i_tile % n_w * BLOCK_W + tl.arange(0, BLOCK_W)
    i_tile //= n_w
    return i_tile // n_h, i_tile % n_h * rows, o_w, o_c


@triton.jit(do_not_specialize=["height", "width", "rows"])
def _conv_kernel(
    x,  # (batch, height, width, dim)
    weight,  # (dim, 9)
    bias,  # (dim,)
    out,  # (batch, height, width, dim)
    height,
    width,
    dim,
    rows,  # output rows per program
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """SiLU(conv(x) + bias); with TRANSPOSED the convolution's adjoint alone.

    Walks down the rows of x, the next one already on its way, and adds each to the three output
    rows that it touches: a row is loaded once, its two shifted copies hit the L1 cache.
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_b, first, o_w, o_c = _program_tile(height, width, dim, rows, BLOCK_W, BLOCK_C)
    last = tl.minimum(first + rows, height)
    m_c = o_c < dim
    o_x = o_w[:, None] * dim + o_c[None, :]
    m_out = (o_w < width)[:, None] & m_c[None, :]
    START: tl.constexpr = 8 if TRANSPOSED else 0
    STEP: tl.constexpr = -1 if TRANSPOSED else 1
    b_w00, b_w01, b_w02 = _load_taps(weight, o_c, m_c, START, STEP, ACC)
    b_w10, b_w11, b_w12 = _load_taps(weight, o_c, m_c, START + 3 * STEP, STEP, ACC)
    b_w20, b_w21, b_w22 = _load_taps(weight, o_c, m_c, START + 6 * STEP, STEP, ACC)
    b_bias = tl.zeros([1, BLOCK_C], ACC)
    if not TRANSPOSED:
        b_bias += tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    b_above = tl.zeros([BLOCK_W, BLOCK_C], ACC) + b_bias  # output row i - 1
    b_here = b_above  # output row i
    i_row = i_b * height + first - 1
    b_next = _load_row(x, i_row, width, dim, o_w, o_x, m_c, first > 0)
    for i in range(first - 1, last + 1):
        b_left, b_mid, b_right = b_next[0].to(ACC), b_next[1].to(ACC), b_next[2].to(ACC)
        i_row = i_b * height + i
        m_next = (i < last) & (i + 1 < height)
        b_next = _load_row(x, i_row + 1, width, dim, o_w, o_x, m_c, m_next)
        b_above = b_above + b_left * b_w20 + b_mid * b_w21 + b_right * b_w22
        b_here = b_here + b_left * b_w10 + b_mid * b_w11 + b_right * b_w12
        b_below = b_bias + b_left * b_w00 + b_mid * b_w01 + b_right * b_w02
        if not TRANSPOSED:
            b_above = b_above / (1.0 + tl.exp(-b_above))
        p_out = out + (i_row - 1).to(tl.int64) * width * dim + o_x
        tl.store(p_out, b_above.to(out.dtype.element_ty), mask=m_out & (True & (i > first)))
        b_above, b_here = b_here, b_below


@triton.jit(do_not_specialize=["height", "width", "rows"])
def _conv_grad_kernel(
    dy,  # (batch, height, width, dim)
    x,  # (batch, height, width, dim)
    weight,  # (dim, 9)
    bias,  # (dim,)
    dpre,  # (batch, height, width, dim), out: gradient before SiLU
    partial,  # (pixel tiles, 10 * dim), out: gradients of weight, (dim, 9), and bias
    height,
    width,
    dim,
    rows,  # rows per program
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient through SiLU, and this tile's share of the gradients of weight and bias."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_b, first, o_w, o_c = _program_tile(height, width, dim, rows, BLOCK_W, BLOCK_C)
    last = tl.minimum(first + rows, height)
    m_c = o_c < dim
    o_x = o_w[:, None] * dim + o_c[None, :]
    m_out = (o_w < width)[:, None] & m_c[None, :]
    b_w00, b_w01, b_w02 = _load_taps(weight, o_c, m_c, 0, 1, ACC)
    b_w10, b_w11, b_w12 = _load_taps(weight, o_c, m_c, 3, 1, ACC)
    b_w20, b_w21, b_w22 = _load_taps(weight, o_c, m_c, 6, 1, ACC)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    b_dbias = tl.zeros([BLOCK_W, BLOCK_C], ACC)
    b_d00, b_d01, b_d02 = b_dbias, b_dbias, b_dbias
    b_d10, b_d11, b_d12 = b_dbias, b_dbias, b_dbias
    b_d20, b_d21, b_d22 = b_dbias, b_dbias, b_dbias

    # b_x holds the rows i - 1, i and i + 1 of x, each at three shifts.
    i_row = i_b * height + first
    b_x0 = _load_row(x, i_row - 1, width, dim, o_w, o_x, m_c, first > 0)
    b_x1 = _load_row(x, i_row, width, dim, o_w, o_x, m_c, first < height)
    b_next = _load_row(x, i_row + 1, width, dim, o_w, o_x, m_c, first + 1 < height)
    b_x00, b_x01, b_x02 = b_x0[0].to(ACC), b_x0[1].to(ACC), b_x0[2].to(ACC)
    b_x10, b_x11, b_x12 = b_x1[0].to(ACC), b_x1[1].to(ACC), b_x1[2].to(ACC)
    b_dy_next = tl.load(dy + i_row.to(tl.int64) * width * dim + o_x, mask=m_out, other=0.0)
    for i in range(first, last):
        b_x20, b_x21, b_x22 = b_next[0].to(ACC), b_next[1].to(ACC), b_next[2].to(ACC)
        b_dy = b_dy_next.to(ACC)
        i_row = i_b * height + i
        o_row = i_row.to(tl.int64) * width * dim
        m_next = i + 1 < last
        b_next = _load_row(x, i_row + 2, width, dim, o_w, o_x, m_c, m_next & (i + 2 < height))
        p_dy = dy + (i_row + 1).to(tl.int64) * width * dim + o_x
        b_dy_next = tl.load(p_dy, mask=m_out & (True & m_next), other=0.0)
        b_pre = b_bias + b_x00 * b_w00 + b_x01 * b_w01 + b_x02 * b_w02
        b_pre = b_pre + b_x10 * b_w10 + b_x11 * b_w11 + b_x12 * b_w12
        b_pre = b_pre + b_x20 * b_w20 + b_x21 * b_w21 + b_x22 * b_w22
        b_gate = 1.0 / (1.0 + tl.exp(-b_pre))
        b_dpre = b_dy * (b_gate * (1.0 + b_pre * (1.0 - b_gate)))
        tl.store(dpre + o_row + o_x, b_dpre.to(dpre.dtype.element_ty), mask=m_out)
        b_d00 += b_x00 * b_dpre
        b_d01 += b_x01 * b_dpre
        b_d02 += b_x02 * b_dpre
        b_d10 += b_x10 * b_dpre
        b_d11 += b_x11 * b_dpre
        b_d12 += b_x12 * b_dpre
        b_d20 += b_x20 * b_dpre
        b_d21 += b_x21 * b_dpre
        b_d22 += b_x22 * b_dpre
        b_dbias += b_dpre
        b_x00, b_x01, b_x02 = b_x10, b_x11, b_x12
        b_x10, b_x11, b_x12 = b_x20, b_x21, b_x22

    i_tile = tl.program_id(0) // tl.cdiv(dim, BLOCK_C)
    p_tile = partial + i_tile.to(tl.int64) * 10 * dim
    p_out = p_tile + o_c * 9
    tl.store(p_out, tl.sum(b_d00, 0), mask=m_c)
    tl.store(p_out + 1, tl.sum(b_d01, 0), mask=m_c)
    tl.store(p_out + 2, tl.sum(b_d02, 0), mask=m_c)
    tl.store(p_out + 3, tl.sum(b_d10, 0), mask=m_c)
    tl.store(p_out + 4, tl.sum(b_d11, 0), mask=m_c)
    tl.store(p_out + 5, tl.sum(b_d12, 0), mask=m_c)
    tl.store(p_out + 6, tl.sum(b_d20, 0), mask=m_c)
    tl.store(p_out + 7, tl.sum(b_d21, 0), mask=m_c)
    tl.store(p_out + 8, tl.sum(b_d22, 0), mask=m_c)
    tl.store(p_tile + 9 * dim + o_c, tl.sum(b_dbias, 0), mask=m_c)


def _grid(x: Tensor, block: tuple[int, int]):
    """Rows per program, pixel tiles, channel blocks and columns x channels of a block."""
    batch, height, width, dim = x.shape
    block_w, block_c = block
    if (dim - 1) % block_c < block_c // 2:  # the last block would be at least half empty
        block_w, block_c = 2 * block_w, block_c // 2
    n_c = triton.cdiv(dim, block_c)
    columns = batch * triton.cdiv(width, block_w)
    rows = min(max(columns * n_c * height // PROGRAMS, ROWS[0]), ROWS[1])
    return rows, columns * triton.cdiv(height, rows), n_c, (block_w, block_c)


def _launch(x: Tensor, weight: Tensor, bias: Tensor, transposed: bool) -> Tensor:
    out = torch.empty_like(x)
    _, height, width, dim = x.shape
    rows, tiles, n_c, block = _grid(x, BLOCK)
    with torch.cuda.device_of(x):
        _conv_kernel[(tiles * n_c,)](
            x, weight, bias, out, height, width, dim, rows,
            BLOCK_W=block[0], BLOCK_C=block[1], TRANSPOSED=transposed, num_warps=WARPS,
        )  # fmt: skip
    return out


def conv_silu_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(depthwise conv(x) + bias) of contiguous x (batch, height, width, dim)."""
    return _launch(x, weight, bias, transposed=False)


def conv_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; all inputs contiguous."""
    _, height, width, dim = x.shape
    dpre = torch.empty_like(x)
    rows, tiles, n_c, block = _grid(x, GRAD_BLOCK)
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    partial = torch.empty(1, tiles, 10 * dim, dtype=sum_dtype, device=x.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    with torch.cuda.device_of(x):
        _conv_grad_kernel[(tiles * n_c,)](
            dy, x, weight, bias, dpre, partial, height, width, dim, rows,
            BLOCK_W=block[0], BLOCK_C=block[1], num_warps=WARPS,
            maxnreg=None if x.dtype == torch.float64 else GRAD_REGISTERS,
        )  # fmt: skip
    dx = _launch(dpre, weight, bias, transposed=True)
    sum_parts(partial, dweight, dbias)
    return dx, dweight, dbias
