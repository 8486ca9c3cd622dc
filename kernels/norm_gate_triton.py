"""Triton kernels of LayerNorm(y) * SiLU(z) over the last axis, and of LayerNorm(y) alone.

Bound by memory traffic: a row stays in the registers of one warp (of a few if it is long), so each
map is read once and each result written once. The backward kernel forms the statistics again.

Prefixes: `i_` program or loop index, `o_` offsets, `m_` mask, `p_` pointer, `b_` block value. Sums
over rows are kept per program and added by `sum_parts`, so that they do not depend on the order
in which programs run. No size below depends on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sum_triton import sum_parts

BLOCK = 512  # elements per warp
PROGRAMS = 24576
GRAD_PROGRAMS = 1584  # one wave of 12 single-warp programs on each of 132 multiprocessors
GRAD_TILES = 4  # fewest per program, so that the partial sums stay small,
FEW_PROGRAMS = 528  # where there are more programs than these
GRAD_STAGES = 3  # tiles that are on their way from memory at once


@triton.jit
def _sigmoid(b_x):
    return 1.0 / (1.0 + tl.exp(-b_x))


@triton.jit
def _normalise(b_y, m_c, dim, EPS: tl.constexpr):
    """(y - mean) / sqrt(var + eps) over the last axis, and 1 / sqrt(var + eps) as [rows, 1]."""
    b_mean = (tl.sum(b_y, 1) / dim)[:, None]
    b_centred = tl.where(m_c[None, :], b_y - b_mean, 0.0)
    b_var = tl.sum(b_centred * b_centred, 1) / dim
    b_rstd = (1.0 / tl.sqrt(b_var + EPS))[:, None]
    return b_centred * b_rstd, b_rstd


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_kernel(
    y,  # (rows, dim)
    z,  # (rows, dim), or None: no gate
    weight,  # (dim,)
    bias,  # (dim,)
    out,  # (rows, dim)
    rows,
    dim,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < dim
    o_r = tl.arange(0, BLOCK_R)
    o_x = o_r[:, None] * dim + o_c[None, :]
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    n_tiles = tl.cdiv(rows, BLOCK_R)
    for i in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        m_x = (i * BLOCK_R + o_r < rows)[:, None] & m_c[None, :]
        o_tile = i * (BLOCK_R * tl.cast(dim, tl.int64))
        b_y = tl.load(y + o_tile + o_x, mask=m_x, other=0.0).to(ACC)
        b_n, _ = _normalise(b_y, m_c, dim, EPS)
        b_out = b_n * b_w + b_bias
        if z is not None:
            b_z = tl.load(z + o_tile + o_x, mask=m_x, other=0.0).to(ACC)
            b_out *= b_z * _sigmoid(b_z)
        tl.store(out + o_tile + o_x, b_out.to(out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_grad_kernel(
    dout,  # (rows, dim)
    y,  # (rows, dim)
    z,  # (rows, dim), or None: no gate
    weight,  # (dim,)
    bias,  # (dim,)
    other,  # (rows, dim), another gradient by y, or None
    dy,  # (rows, dim), out: the sum of both
    dz,  # (rows, dim), out; None with z
    partial,  # (programs, 2, dim), out: gradients of weight and bias
    rows,
    dim,
    EPS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < dim
    o_r = tl.arange(0, BLOCK_R)
    o_x = o_r[:, None] * dim + o_c[None, :]
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    b_dw = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    b_dbias = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    n_tiles = tl.cdiv(rows, BLOCK_R)
    for i in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        m_x = (i * BLOCK_R + o_r < rows)[:, None] & m_c[None, :]
        o_tile = i * (BLOCK_R * tl.cast(dim, tl.int64))
        b_y = tl.load(y + o_tile + o_x, mask=m_x, other=0.0).to(ACC)
        b_dt = tl.load(dout + o_tile + o_x, mask=m_x, other=0.0).to(ACC)
        b_n, b_rstd = _normalise(b_y, m_c, dim, EPS)
        if z is not None:
            b_z = tl.load(z + o_tile + o_x, mask=m_x, other=0.0).to(ACC)
            b_gate = _sigmoid(b_z)
            b_dz = b_dt * (b_n * b_w + b_bias) * (b_gate * (1.0 + b_z * (1.0 - b_gate)))
            tl.store(dz + o_tile + o_x, b_dz.to(dz.dtype.element_ty), mask=m_x)
            b_dt *= b_z * b_gate
        b_dw += b_dt * b_n
        b_dbias += b_dt
        b_dn = b_dt * b_w
        b_mean = (tl.sum(b_dn, 1) / dim)[:, None]
        b_slope = (tl.sum(b_dn * b_n, 1) / dim)[:, None]
        b_dy = b_rstd * (b_dn - b_mean - b_n * b_slope)
        if other is not None:
            b_dy += tl.load(other + o_tile + o_x, mask=m_x, other=0.0).to(ACC)
        tl.store(dy + o_tile + o_x, b_dy.to(dy.dtype.element_ty), mask=m_x)
    p_out = partial + tl.program_id(0).to(tl.int64) * (2 * dim) + o_c
    tl.store(p_out, tl.sum(b_dw, 0), mask=m_c)
    tl.store(p_out + dim, tl.sum(b_dbias, 0), mask=m_c)


def _grid(y: Tensor):
    """Rows, tiles, keyword arguments of a launch over maps of y's shape."""
    dim = y.shape[-1]
    rows = y.numel() // dim
    block_c = triton.next_power_of_2(dim)
    block_r = max(1, BLOCK // block_c)
    block = {
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "num_warps": min(max(1, block_c // BLOCK), 16),
    }
    return rows, triton.cdiv(rows, block_r), block


def norm_gate_forward(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm(y) * SiLU(z), or LayerNorm(y), over the last axis of contiguous maps.

    The result has y's dtype, or another that is given.
    """
    out = torch.empty_like(y, dtype=dtype)
    rows, tiles, block = _grid(y)
    with torch.cuda.device_of(y):
        _norm_gate_kernel[(min(tiles, PROGRAMS),)](
            y, z, weight, bias, out, rows, y.shape[-1], EPS=eps, **block
        )
    return out


def norm_gate_backward(
    dout: Tensor,
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of y, to which another one may be added, z, weight and bias; inputs contiguous."""
    dim = y.shape[-1]
    dy, dz = torch.empty_like(y), None if z is None else torch.empty_like(z)
    rows, tiles, block = _grid(y)
    programs = max(min(tiles, FEW_PROGRAMS), triton.cdiv(tiles, GRAD_TILES))
    programs = min(programs, GRAD_PROGRAMS)
    sum_dtype = torch.promote_types(y.dtype, torch.float32)
    partial = torch.empty(1, programs, 2 * dim, dtype=sum_dtype, device=y.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    with torch.cuda.device_of(y):
        _norm_gate_grad_kernel[(programs,)](
            dout, y, z, weight, bias, other, dy, dz, partial, rows, dim,
            EPS=eps, STAGES=GRAD_STAGES, **block,
        )  # fmt: skip
    sum_parts(partial, dweight, dbias)
    return dy, dz, dweight, dbias
