"""What the forward and the backward kernels of the Triton scan share.

The kernels are written in Gluon, Triton's dialect with explicit layouts, because their speed is a
matter of which thread holds which state. With TRITON_INTERPRET=1 they run on CPU tensors as plain
Triton, which has no layouts: `gl` and `jit` are then Triton's own.

Prefixes: `i_` program index, `o_` offsets, `m_` mask, `p_` pointer, `b_` block value.
Shapes in trailing comments: N states, CH channels of the program. A is kept times log2(e),
because the hardware's exponential has base 2.

FIXED_A says that A is -(1, ..., DSTATE) in every channel, as it is before training: all decays of
a channel are then powers of one, and A is not read.
"""

# Triton compiles no starred tuples.
# ruff: noqa: RUF005

import copy
from typing import NamedTuple

import triton
import triton.language as tl
from triton import knobs

if knobs.runtime.interpret:
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    gl = tl
    jit = triton.jit
else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    jit = gluon.jit

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Not compiled anew for each value.
SIZES = ["height", "width", "chunk_size", "num_chunks", "num_subchunks", "k", "num_rows"]


class SharedMemory:
    """Stands in for shared memory in kernels that run as Python."""

    def __init__(self, dtype, shape, layout):
        self.dtype = dtype
        self.array = np.full(shape, np.nan, np.float64 if dtype == tl.float64 else np.float32)

    def index(self, i):
        view = copy.copy(self)
        view.array = self.array[int(i.handle.data.item()) if isinstance(i, tl.tensor) else i]
        return view

    def slice(self, start, length, dim):
        view = copy.copy(self)
        view.array = self.array[(slice(None),) * dim + (slice(start, start + length),)]
        return view

    def store(self, value):
        self.array[...] = value.handle.data

    def load(self, layout):
        handle = TensorHandle(self.array.copy(), self.dtype)
        return tl.tensor(handle, tl.block_type(self.dtype, list(self.array.shape)))


if not INTERPRETED.value:
    SharedMemory = gl.allocate_shared_memory


@jit
def arange(size: tl.constexpr, layout: tl.constexpr):
    if INTERPRETED:
        return gl.arange(0, size)
    else:
        return gl.arange(0, size, layout=layout)


@jit
def grid(ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr):
    """Element (i, j) is i COLUMNS + j."""
    if INTERPRETED:
        o_i = gl.arange(0, ROWS)
        o_j = gl.arange(0, COLUMNS)
    else:
        o_i = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        o_j = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    return o_i[:, None] * COLUMNS + o_j[None, :]


@jit
def zeros_like(b_x):
    return b_x * 0


@jit
def both(m_x, condition):
    """The mask m_x where a condition that is one number holds, else nothing."""
    # Triton 3.9's interpreter takes the condition for an int32 when it spreads it over a block,
    # and then refuses the mask; a condition that was combined with a bool stays one.
    return m_x & (True & condition)


@jit
def exp2(b_x):
    if INTERPRETED or b_x.dtype == gl.float64:
        return gl.exp2(b_x)
    else:
        return gl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1
        )


@jit
def exp2_of_minus(b_x):
    """2^-x. Compilers see no operands of inline assembly: a sign outside of it is a step more."""
    if INTERPRETED or b_x.dtype == gl.float64:
        return gl.exp2(-b_x)
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .f32 t; neg.f32 t, $1; ex2.approx.ftz.f32 $0, t; }",
            "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@jit
def _exp2_of_minus_abs(b_x):
    if INTERPRETED or b_x.dtype == gl.float64:
        return gl.exp2(-gl.abs(b_x))
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .f32 t; abs.f32 t, $1; neg.f32 t, t; ex2.approx.ftz.f32 $0, t; }",
            "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@jit
def _reciprocal(b_x):
    if INTERPRETED:
        return 1.0 / b_x
    else:
        return gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1
        )


@jit
def _log_of_one_plus(b_u, SCALE: tl.constexpr):
    """SCALE log(1 + u) for u from 0 to 1, with the relative accuracy of the dtype."""
    if b_u.dtype == gl.float64:
        b_v = 1.0 + b_u
        # The second term is what rounding 1 + u lost.
        return (gl.log(b_v) + (b_u - (b_v - 1.0)) / b_v) * SCALE
    else:
        # log(1 + u) = 2 atanh(u / (2 + u)); the polynomial has a relative error of 4e-9.
        b_s = b_u * _reciprocal(b_u + 2.0)
        b_q = b_s * b_s
        b_p = b_q * (0.28174657 * SCALE) + 0.27961419 * SCALE
        b_p = b_q * b_p + 0.40024854 * SCALE
        b_p = b_q * b_p + 0.66666316 * SCALE
        b_p = b_q * b_p + 2.0 * SCALE
        return b_s * b_p


@jit
def softplus(b_z):
    """log(1 + exp(z)), with the relative accuracy of the dtype where exp(z) is tiny, too."""
    return gl.maximum(b_z, 0.0) + _log_of_one_plus(_exp2_of_minus_abs(b_z * LOG2_E), 1.0)


@jit
def softplus_in_bits(b_z):
    """log2(1 + 2^z), which is log2(e) softplus(z ln(2)), as accurate as `softplus`."""
    return gl.maximum(b_z, 0.0) + _log_of_one_plus(_exp2_of_minus_abs(b_z), LOG2_E)


@jit
def sigmoid_of(b_delta):
    """sigmoid(z) = 1 - exp(-delta), given delta = softplus(z), with the accuracy of the dtype."""
    b_u = exp2(b_delta * -LOG2_E)
    if b_delta.dtype == gl.float64:
        # What rounding u did to 1 - u it did to log(u), too.
        b_quotient = (1.0 - b_u) * b_delta / -gl.log(gl.where(b_u == 1.0, 0.5, b_u))
        return gl.where(b_u == 1.0, b_delta, gl.where(b_delta > 1.0, 1.0 - b_u, b_quotient))
    else:
        b_p = b_delta * (1 / 120) - 1 / 24
        b_p = b_delta * b_p + 1 / 6
        b_p = b_delta * b_p - 0.5
        b_p = b_delta * b_p + 1.0
        return gl.where(b_delta < 0.125, b_delta * b_p, 1.0 - b_u)


@jit
def first_pixel(position, k, height, width):
    """A walk: where direction k reads at `position` of its order, and what leads on from there.

    That is a tuple of the pixel, the number of steps before the order jumps to its next line, the
    steps from one jump to the next, and how far a step and a jump lead.
    """
    length = height * width
    is_reversed = k >= 2
    is_column = (k % 2) == 1
    q = gl.where(is_reversed, length - 1 - position, position)
    sign = gl.where(is_reversed, -1, 1)
    line = gl.where(is_column, height, length)
    inner = q % line
    pixel = gl.where(is_column, inner * width + q // line, q)
    left = gl.where(is_reversed, inner, line - 1 - inner)
    step = gl.where(is_column, sign * width, sign)
    jump = gl.where(is_column, sign * (1 - (height - 1) * width), sign)
    return pixel, left, line, step, jump


@jit
def next_pixel(walk):
    pixel, left, line, step, jump = walk
    is_last = left == 0
    pixel += gl.where(is_last, jump, step)
    return pixel, gl.where(is_last, line - 1, left - 1), line, step, jump


@jit
def next_group(walk, num_left, STEPS: tl.constexpr):
    """The pixels of STEPS positions, 0 from the num_left-th on, and where the walk goes on."""
    o_pixels = ()
    for t in gl.static_range(STEPS):
        o_pixels = o_pixels + (gl.where(t < num_left, walk[0], 0).to(gl.int64),)
        walk = next_pixel(walk)
    return o_pixels, walk


@jit
def chunk_of(i_chunk, k, chunk_size, num_chunks, length):
    """The first position of a chunk in the order of direction k, and the number of its positions.

    Chunks are cut along directions 0 and 1, where the last one is short: first of 2 and 3.
    """
    missing = gl.where(k >= 2, num_chunks * chunk_size - length, 0)
    start = gl.maximum(i_chunk * chunk_size - missing, 0)
    end = gl.minimum((i_chunk + 1) * chunk_size - missing, length)
    return start, end - start


class Walk(NamedTuple):
    """The constants of kernels in which a thread owns all states of its channels.

    Layouts are None in the interpreter. R stands for the ranks of delta's projection.
    """

    DIM: int
    DSTATE: int
    RANK: int
    CHANNELS: int  # of a program
    PADDED_DSTATE: int  # a power of 2, like all sizes of blocks
    PADDED_RANK: int
    STEPS: int  # positions of which the inputs are fetched together
    FIXED_A: bool
    ACC: tl.dtype  # of states and sums
    LAYOUT: object  # [N, CH]
    BY_STATE: object  # [N], as it lies in LAYOUT
    BY_CHANNEL: object  # [CH], as it lies in LAYOUT
    FETCH_R: object  # [R, STEPS], with the lanes of a warp on 4 steps or more
    FETCH_N: object  # [N, STEPS]
    SHARED: object  # of the same in shared memory


@jit
def channels_states_ranks(i_block, META: tl.constexpr):
    """The channels of a program, all states and all ranks, padded."""
    o_c = i_block * META.CHANNELS + arange(META.CHANNELS, META.BY_CHANNEL)
    return o_c, arange(META.PADDED_DSTATE, META.BY_STATE), arange(META.PADDED_RANK, META.BY_STATE)


@jit
def row_buffers(META: tl.constexpr):
    """Shared memory for r, B and C of a group of positions."""
    rs = SharedMemory(META.ACC, [META.PADDED_RANK, META.STEPS], META.SHARED)
    Bs = SharedMemory(META.ACC, [META.PADDED_DSTATE, META.STEPS], META.SHARED)
    Cs = SharedMemory(META.ACC, [META.PADDED_DSTATE, META.STEPS], META.SHARED)
    return rs, Bs, Cs


@jit
def fetch_group(p_r, o_pixels, META: tl.constexpr, WITH_B: tl.constexpr = True):
    """r, B and C at the pixels of a group: `p_r` points to r of pixel 0 in x_dbl."""
    b_rs = fetch_rows(p_r, o_pixels, META.RANK, META.PADDED_RANK, META.FETCH_R, META)
    o_C: tl.constexpr = META.RANK + META.DSTATE
    b_Cs = fetch_rows(p_r + o_C, o_pixels, META.DSTATE, META.PADDED_DSTATE, META.FETCH_N, META)
    b_Bs = b_Cs
    if WITH_B:
        b_Bs = fetch_rows(
            p_r + META.RANK, o_pixels, META.DSTATE, META.PADDED_DSTATE, META.FETCH_N, META
        )
    return b_rs, b_Bs, b_Cs


@jit
def store_group(buffers, b_rows, WITH_B: tl.constexpr = True):
    for i in gl.static_range(3):
        if WITH_B or i != 1:
            buffers[i].store(b_rows[i])


@jit
def fetch_rows(
    p_rows, o_pixels, SIZE: tl.constexpr, PADDED: tl.constexpr, LAYOUT: tl.constexpr,
    META: tl.constexpr,
):  # fmt: skip
    """SIZE numbers that all channels share, at each pixel: [PADDED, STEPS], spread over lanes."""
    STEPS: tl.constexpr = META.STEPS
    ROW: tl.constexpr = META.RANK + 2 * META.DSTATE
    if INTERPRETED:
        o_t = gl.arange(0, STEPS)
        o_i = gl.arange(0, PADDED)
    else:
        o_t = gl.arange(0, STEPS, layout=gl.SliceLayout(0, LAYOUT))
        o_i = gl.arange(0, PADDED, layout=gl.SliceLayout(1, LAYOUT))
    o_pixel = zeros_like(o_t).to(gl.int64)
    for t in gl.static_range(STEPS):
        o_pixel = gl.where(o_t == t, o_pixels[t], o_pixel)
    p_row = p_rows + o_pixel[None, :] * (4 * ROW) + o_i[:, None]
    if SIZE == PADDED:
        return gl.load(p_row).to(META.ACC)
    else:
        m_row = (o_i < SIZE)[:, None] & (o_t >= 0)[None, :]
        return gl.load(p_row, mask=m_row, other=0.0).to(META.ACC)


@jit
def fetch_channels(p_channels, o_pixels, m_c, META: tl.constexpr):
    STEPS: tl.constexpr = META.STEPS
    b_xs = ()
    for t in gl.static_range(STEPS):
        b_x = gl.load(p_channels + o_pixels[t] * META.DIM, mask=m_c, other=0.0)
        b_xs = b_xs + (b_x.to(META.ACC),)
    return b_xs


@jit
def load_A(A_logs, o_kc, o_n, mask, FIXED_A: tl.constexpr, DSTATE: tl.constexpr, ACC: tl.constexpr):
    """A log2(e) of the states o_n of rows o_kc of A_logs, which broadcast to the result."""
    if FIXED_A:
        # Numbers that the compiler knows, where it knows the states that a thread owns.
        return -LOG2_E * (o_n + 1 + zeros_like(o_kc)).to(ACC)
    else:
        b_A = gl.load(A_logs + o_kc * DSTATE + o_n, mask=mask, other=0.0).to(ACC)
        return -exp2(b_A * LOG2_E) * LOG2_E


@jit
def powers(b_first, b_r, o_n, PADDED_DSTATE: tl.constexpr):
    """b_first r^n of the states o_n, which broadcasts with the others to the shape.

    By squaring. Where a thread owns all states, the choices below are made when the kernel is
    compiled: one product is left for each state, none for the first, in no longer chain than 4.
    """
    b_a = gl.where(o_n >= 0, b_first, 0.0)
    for i in gl.static_range(16):
        if (1 << i) < PADDED_DSTATE:
            b_a = b_a * gl.where((o_n >> i) % 2 == 1, b_r, 1.0)
            b_r = b_r * b_r
    return b_a


@jit
def decays(b_delta, b_A, o_n, FIXED_A: tl.constexpr, PADDED_DSTATE: tl.constexpr):
    """exp(delta A) of the states o_n, where o_n and delta broadcast to the shape."""
    if FIXED_A:
        b_r = exp2_of_minus(b_delta * LOG2_E)
        return powers(b_r, b_r, o_n, PADDED_DSTATE)
    else:
        return exp2(b_A * b_delta)


@jit
def load_direction(dt_projs_weight, dt_projs_bias, A_logs, k, o_c, o_n, o_r, META: tl.constexpr):
    """The parameters of direction k: W (R, CH), bias (CH), A log2(e) (N, CH)."""
    m_c = o_c < META.DIM
    o_kc = k * META.DIM + o_c
    p_W = dt_projs_weight + o_kc[None, :] * META.RANK + o_r[:, None]
    b_W = gl.load(p_W, mask=(o_r < META.RANK)[:, None] & m_c[None, :], other=0.0).to(META.ACC)
    b_bias = gl.load(dt_projs_bias + o_kc, mask=m_c, other=0.0).to(META.ACC)
    m_nc = (o_n < META.DSTATE)[:, None] & m_c[None, :]
    b_A = load_A(A_logs, o_kc[None, :], o_n[:, None], m_nc, META.FIXED_A, META.DSTATE, META.ACC)
    return b_W, b_bias, b_A


@jit
def project_delta(b_r, b_W, b_bias):
    return softplus(b_bias + gl.sum(b_W * b_r, axis=0))
