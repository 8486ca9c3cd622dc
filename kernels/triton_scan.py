"""Four-direction selective scan on CUDA GPUs, forward and backward, in Triton.

The scan is cut into chunks of consecutive positions. A first launch finds the state in which each
chunk ends when it starts from zero, a short one carries the states over the chunks, and a last
one walks every chunk again from its true first state. All directions read the picture where it
lies: an order of scanning is only a sequence of pixel addresses.

The walking kernels are written in Gluon, Triton's dialect with explicit layouts, because their
speed is a matter of which thread holds which state. Forward, a thread owns all states of one
channel, so that the sum over states needs no exchange. Backward, a thread owns 4 states of 4
channels, which balances the sums over states against those over channels. With
TRITON_INTERPRET=1 the same kernels run on CPU tensors as plain Triton, which has no layouts.

Prefixes: `i_` program index, `o_` offsets, `m_` mask, `p_` pointer, `b_` block value.
Shapes in trailing comments: N states, CH channels of the program, in the backward sweep as
WARPS x 32. A is kept times log2(e), because the hardware's exponential has base 2.
"""

# Triton compiles neither starred tuples nor conditional expressions on blocks of every kind.
# ruff: noqa: RUF005, SIM108

import copy
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
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
NEWER_BARRIER = tl.constexpr(hasattr(gl, "barrier"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Programs per launch, a whole number of waves on the 132 multiprocessors of a Hopper GPU. They
# are constants, not read from the device, so that the same input gives the same bits on any.
FORWARD_PROGRAMS = 2112
BACKWARD_PROGRAMS = 1056
# Warps of a program and channels of a thread, where the number of channels is a multiple of both.
FORWARD_WARPS, FORWARD_CHANNELS = 1, 2
ADJOINT_WARPS, ADJOINT_CHANNELS = 1, 2
SHORTEST_CHUNK = 32
# Elements of x up to which the backward launches all directions at once, for seven times x.
SMALL_MAP = 1 << 22
# Positions of which the inputs are fetched together.
FORWARD_GROUP = 4
ADJOINT_GROUP = 4
# Backward: a state is kept in memory every SUBCHUNK positions, in shared memory every TILE, and
# in registers at each position of one TILE.
SUBCHUNK = 24
TILE = 4
SWEEP_FETCH = 1
CARRY_AHEAD = 8
PROJECTION_PIXELS = 64
PROJECTION_CHANNELS = 32

SIZES = ["height", "width", "chunk_size", "num_chunks", "num_subchunks", "k", "num_rows"]


class _SharedMemory:
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
    _SharedMemory = gl.allocate_shared_memory


@jit
def _arange(size: tl.constexpr, layout: tl.constexpr):
    if INTERPRETED:
        return gl.arange(0, size)
    else:
        return gl.arange(0, size, layout=layout)


@jit
def _zeros_like(b_x):
    return b_x * 0


@jit
def _barrier():
    if INTERPRETED:
        gl.debug_barrier()
    elif NEWER_BARRIER:
        gl.barrier()
    else:
        gl.thread_barrier()


@jit
def _exp2(b_x):
    if INTERPRETED or b_x.dtype == gl.float64:
        return gl.exp2(b_x)
    else:
        return gl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1
        )


@jit
def _reciprocal(b_x):
    if INTERPRETED:
        return 1.0 / b_x
    else:
        return gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1
        )


@jit
def _softplus(b_z):
    """log(1 + exp(z)), with the relative accuracy of the dtype where exp(z) is tiny, too."""
    b_u = _exp2(-gl.abs(b_z) * LOG2_E)
    if b_z.dtype == gl.float64:
        b_v = 1.0 + b_u
        # The second term is what rounding 1 + u lost.
        b_log = gl.log(b_v) + (b_u - (b_v - 1.0)) / b_v
        return gl.where(b_z > 20.0, b_z, gl.maximum(b_z, 0.0) + b_log)
    else:
        # log(1 + u) = 2 atanh(u / (2 + u)); the polynomial has a relative error of 4e-9.
        b_s = b_u * _reciprocal(b_u + 2.0)
        b_q = b_s * b_s
        b_p = b_q * 0.28174657 + 0.27961419
        b_p = b_q * b_p + 0.40024854
        b_p = b_q * b_p + 0.66666316
        b_p = b_q * b_p + 2.0
        return gl.maximum(b_z, 0.0) + b_s * b_p


@jit
def _first_pixel(position, k, height, width):
    """Where direction k reads at `position` of its order, and what leads on from there.

    Returns the pixel, the number of steps before the order jumps to its next line, the steps
    from one jump to the next, and how far a step and a jump lead.
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
def _next_pixel(pixel, left, line, step, jump):
    is_last = left == 0
    return pixel + gl.where(is_last, jump, step), gl.where(is_last, line - 1, left - 1)


@jit
def _next_group(pixel, left, line, step, jump, num_left, STEPS: tl.constexpr):
    """The pixels of STEPS positions, 0 from the num_left-th on, and where the order goes on."""
    o_pixels = ()
    for t in gl.static_range(STEPS):
        o_pixels = o_pixels + (gl.where(t < num_left, pixel, 0).to(gl.int64),)
        pixel, left = _next_pixel(pixel, left, line, step, jump)
    return o_pixels, pixel, left


@jit
def _fetch_rows(
    p_rows, o_pixels, SIZE: tl.constexpr, PADDED: tl.constexpr, ROW: tl.constexpr,
    STEPS: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """SIZE numbers that all channels share, at each pixel: [PADDED, STEPS], spread over lanes."""
    if INTERPRETED:
        o_t = gl.arange(0, STEPS)
        o_i = gl.arange(0, PADDED)
    else:
        o_t = gl.arange(0, STEPS, layout=gl.SliceLayout(0, LAYOUT))
        o_i = gl.arange(0, PADDED, layout=gl.SliceLayout(1, LAYOUT))
    o_pixel = _zeros_like(o_t).to(gl.int64)
    for t in gl.static_range(STEPS):
        o_pixel = gl.where(o_t == t, o_pixels[t], o_pixel)
    p_row = p_rows + o_pixel[None, :] * (4 * ROW) + o_i[:, None]
    if SIZE == PADDED:
        return gl.load(p_row).to(ACC)
    else:
        return gl.load(p_row, mask=(o_i < SIZE)[:, None] & (o_t >= 0)[None, :], other=0.0).to(ACC)


@jit
def _fetch_channels(p_channels, o_pixels, m_c, DIM: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr):
    b_xs = ()
    for t in gl.static_range(STEPS):
        b_x = gl.load(p_channels + o_pixels[t] * DIM, mask=m_c, other=0.0)
        b_xs = b_xs + (b_x.to(ACC),)
    return b_xs


@jit
def _load_row(p_row, o_row, SIZE: tl.constexpr, ACC: tl.constexpr):
    """SIZE numbers that all channels share, zero up to the padded size."""
    if o_row.shape[0] == SIZE:
        return gl.load(p_row + o_row).to(ACC)
    else:
        return gl.load(p_row + o_row, mask=o_row < SIZE, other=0.0).to(ACC)


@jit
def _load_channels(p_pixel, m_c, ACC: tl.constexpr):
    return gl.load(p_pixel, mask=m_c, other=0.0).to(ACC)


@jit
def _load_direction(
    dt_projs_weight, dt_projs_bias, A_logs, k, o_c, o_n, o_r,
    DIM: tl.constexpr, DSTATE: tl.constexpr, RANK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The parameters of direction k: W (R, CH), bias (CH), A log2(e) (N, CH)."""
    m_c = o_c < DIM
    o_kc = k * DIM + o_c
    p_W = dt_projs_weight + o_kc[None, :] * RANK + o_r[:, None]
    b_W = gl.load(p_W, mask=(o_r < RANK)[:, None] & m_c[None, :], other=0.0).to(ACC)
    b_bias = gl.load(dt_projs_bias + o_kc, mask=m_c, other=0.0).to(ACC)
    p_A = A_logs + o_kc[None, :] * DSTATE + o_n[:, None]
    b_A = gl.load(p_A, mask=(o_n < DSTATE)[:, None] & m_c[None, :], other=0.0).to(ACC)
    return b_W, b_bias, -_exp2(b_A * LOG2_E) * LOG2_E


@jit
def _delta(b_r, b_W, b_bias):
    return _softplus(b_bias + gl.sum(b_W * b_r, axis=0))


@jit(do_not_specialize=SIZES)
def _chunk_state_kernel(
    x,  # (batch, height, width, DIM)
    x_dbl,  # (batch, height, width, 4, RANK + 2 * DSTATE)
    dt_projs_weight,  # (4, DIM, RANK)
    dt_projs_bias,  # (4, DIM)
    A_logs,  # (4 * DIM, DSTATE)
    states,  # (4, batch, num_chunks, DSTATE, DIM), of which chunk i + 1 is written
    delta_sums,  # (4, batch, num_chunks, DIM)
    height,
    width,
    chunk_size,
    num_chunks,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    RANK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_DSTATE: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
    LAYOUT: tl.constexpr,
    BY_STATE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    FETCH_R: tl.constexpr,
    FETCH_N: tl.constexpr,
    SHARED: tl.constexpr,
):
    """The state that each chunk but the last adds, and its sum of delta."""
    NUM_BLOCKS: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    ROW: tl.constexpr = RANK + 2 * DSTATE
    i_block = gl.program_id(0) % NUM_BLOCKS
    k = gl.program_id(0) // NUM_BLOCKS
    i_chunk = gl.program_id(1)
    i_b = gl.program_id(2).to(gl.int64)
    length = height * width

    # A reversed direction starts with the chunk at the end of the picture, the only short one.
    last_size = length - (num_chunks - 1) * chunk_size
    start = gl.where(k >= 2, gl.maximum(i_chunk - 1, 0) * chunk_size, i_chunk * chunk_size)
    start = gl.where((k >= 2) & (i_chunk > 0), start + last_size, start)
    count = gl.where((k >= 2) & (i_chunk == 0), last_size, chunk_size)

    o_c = i_block * CHANNELS + _arange(CHANNELS, BY_CHANNEL)
    o_n = _arange(PADDED_DSTATE, BY_STATE)
    o_r = _arange(PADDED_RANK, BY_STATE)
    m_c = o_c < DIM
    b_W, b_bias, b_A = _load_direction(
        dt_projs_weight, dt_projs_bias, A_logs, k, o_c, o_n, o_r, DIM, DSTATE, RANK, ACC
    )
    p_x = x + i_b * length * DIM + o_c
    p_r = x_dbl + i_b * length * (4 * ROW) + k * ROW
    p_B = p_r + RANK
    rs = _SharedMemory(ACC, [PADDED_RANK, STEPS], SHARED)
    Bs = _SharedMemory(ACC, [PADDED_DSTATE, STEPS], SHARED)

    b_h = _zeros_like(b_A)  # [N, CH]
    b_sum = _zeros_like(b_bias)  # [CH]
    pixel, left, line, step, jump = _first_pixel(start, k, height, width)
    o_pixels, pixel, left = _next_group(pixel, left, line, step, jump, count, STEPS)
    b_rs = _fetch_rows(p_r, o_pixels, RANK, PADDED_RANK, ROW, STEPS, ACC, FETCH_R)
    b_Bs = _fetch_rows(p_B, o_pixels, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
    b_xs = _fetch_channels(p_x, o_pixels, m_c, DIM, STEPS, ACC)
    for i in range(0, count, STEPS):
        rs.store(b_rs)
        Bs.store(b_Bs)
        o_pixels, pixel, left = _next_group(
            pixel, left, line, step, jump, count - i - STEPS, STEPS
        )
        b_rs = _fetch_rows(p_r, o_pixels, RANK, PADDED_RANK, ROW, STEPS, ACC, FETCH_R)
        b_Bs = _fetch_rows(p_B, o_pixels, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
        b_next_xs = _fetch_channels(p_x, o_pixels, m_c, DIM, STEPS, ACC)
        for t in gl.static_range(STEPS):
            b_delta = _delta(rs.slice(t, 1, 1).load(LAYOUT), b_W, b_bias)
            # With a delta of zero, positions past the end leave the state alone.
            b_delta = gl.where(i + t < count, b_delta, 0.0)
            b_B = Bs.slice(t, 1, 1).load(LAYOUT)
            b_a = _exp2(b_A * b_delta[None, :])
            b_h = b_a * b_h + b_B * (b_delta * b_xs[t])[None, :]
            b_sum += b_delta
        b_xs = b_next_xs

    i_slot = (k * gl.num_programs(2) + i_b) * num_chunks + i_chunk
    gl.store(delta_sums + i_slot * DIM + o_c, b_sum, mask=m_c)
    p_states = states + (i_slot + 1) * (DSTATE * DIM) + o_n[:, None] * DIM + o_c[None, :]
    gl.store(p_states, b_h, mask=(o_n < DSTATE)[:, None] & m_c[None, :])


@jit(do_not_specialize=SIZES)
def _carry_kernel(
    A_logs,  # (4 * DIM, DSTATE)
    states,  # (2 if WITH_ADJOINTS, DIRECTIONS, batch, num_chunks, DSTATE, DIM), in place
    delta_sums,  # (DIRECTIONS, batch, num_chunks, DIM)
    num_chunks,
    k,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    WITH_ADJOINTS: tl.constexpr,
    ACC: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
):
    """Turn what each chunk adds into the state on entering it, for directions from k on.

    `states` of chunk i holds what the chunk before it added. Adjoints, the second half, are
    carried from the last chunk to the first: there chunk i holds what the chunk after it added.
    """
    i_n = gl.program_id(1)
    i_set = gl.program_id(2)
    num_rows = gl.num_programs(2)
    if WITH_ADJOINTS:
        num_rows = num_rows // 2
    is_adjoint = i_set >= num_rows
    i_row = i_set % num_rows
    o_c = gl.program_id(0) * CHANNELS + _arange(CHANNELS, BY_CHANNEL)
    m_c = o_c < DIM
    direction = k + i_row // (num_rows // DIRECTIONS)
    b_A = gl.load(A_logs + (direction * DIM + o_c) * DSTATE + i_n, mask=m_c, other=0.0).to(ACC)
    b_A = -_exp2(b_A * LOG2_E) * LOG2_E
    p_states = states + i_set.to(gl.int64) * num_chunks * (DSTATE * DIM) + i_n * DIM + o_c
    p_sums = delta_sums + i_row.to(gl.int64) * num_chunks * DIM + o_c

    b_h = _zeros_like(b_A)
    first = gl.where(is_adjoint, num_chunks - 1, 0)
    sign = gl.where(is_adjoint, -1, 1)
    gl.store(p_states + first.to(gl.int64) * (DSTATE * DIM), b_h, mask=m_c)
    for i in range(0, num_chunks - 1, AHEAD):
        b_as = ()
        b_hs = ()
        for j in gl.static_range(AHEAD):
            m_ahead = m_c & (i + j < num_chunks - 1)
            o_chunk = (first + sign * (i + j)).to(gl.int64)
            b_sum = gl.load(p_sums + o_chunk * DIM, mask=m_ahead, other=0.0)
            b_as = b_as + (_exp2(b_A * b_sum),)
            p_next = p_states + (o_chunk + sign) * (DSTATE * DIM)
            b_hs = b_hs + (gl.load(p_next, mask=m_ahead, other=0.0),)
        for j in gl.static_range(AHEAD):
            m_ahead = m_c & (i + j < num_chunks - 1)
            b_h = b_as[j] * b_h + b_hs[j]
            p_next = p_states + (first + sign * (i + j + 1)).to(gl.int64) * (DSTATE * DIM)
            gl.store(p_next, b_h, mask=m_ahead)


@jit
def _walk_chunk(
    x, x_dbl, y_sum, y, b_h, b_W, b_bias, b_A, b_D, o_image, start, count, k,
    height, width, o_c, rs, Bs, Cs,
    DIM: tl.constexpr, DSTATE: tl.constexpr, RANK: tl.constexpr, PADDED_DSTATE: tl.constexpr,
    PADDED_RANK: tl.constexpr, STEPS: tl.constexpr, BEGINS: tl.constexpr, ACC: tl.constexpr,
    LAYOUT: tl.constexpr, FETCH_R: tl.constexpr, FETCH_N: tl.constexpr,
):  # fmt: skip
    """Write y_sum plus the outputs of direction k to y, for `count` positions from `start`."""
    ROW: tl.constexpr = RANK + 2 * DSTATE
    m_c = o_c < DIM
    p_x = x + o_image * DIM + o_c
    p_sum = y_sum + o_image * DIM + o_c
    p_y = y + o_image * DIM + o_c
    p_r = x_dbl + o_image * (4 * ROW) + k * ROW
    p_B = p_r + RANK
    p_C = p_B + DSTATE
    pixel, left, line, step, jump = _first_pixel(start, k, height, width)
    o_pixels, pixel, left = _next_group(pixel, left, line, step, jump, count, STEPS)
    b_rs = _fetch_rows(p_r, o_pixels, RANK, PADDED_RANK, ROW, STEPS, ACC, FETCH_R)
    b_Bs = _fetch_rows(p_B, o_pixels, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
    b_Cs = _fetch_rows(p_C, o_pixels, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
    b_xs = _fetch_channels(p_x, o_pixels, m_c, DIM, STEPS, ACC)
    b_ys = b_xs
    if not BEGINS:
        b_ys = _fetch_channels(p_sum, o_pixels, m_c, DIM, STEPS, ACC)
    for i in range(0, count, STEPS):
        rs.store(b_rs)
        Bs.store(b_Bs)
        Cs.store(b_Cs)
        o_nexts, pixel, left = _next_group(pixel, left, line, step, jump, count - i - STEPS, STEPS)
        b_rs = _fetch_rows(p_r, o_nexts, RANK, PADDED_RANK, ROW, STEPS, ACC, FETCH_R)
        b_Bs = _fetch_rows(p_B, o_nexts, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
        b_Cs = _fetch_rows(p_C, o_nexts, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
        b_next_xs = _fetch_channels(p_x, o_nexts, m_c, DIM, STEPS, ACC)
        b_next_ys = b_next_xs
        if not BEGINS:
            b_next_ys = _fetch_channels(p_sum, o_nexts, m_c, DIM, STEPS, ACC)
        for t in gl.static_range(STEPS):
            b_delta = _delta(rs.slice(t, 1, 1).load(LAYOUT), b_W, b_bias)
            b_B = Bs.slice(t, 1, 1).load(LAYOUT)
            b_C = Cs.slice(t, 1, 1).load(LAYOUT)
            b_a = _exp2(b_A * b_delta[None, :])
            b_h = b_a * b_h + b_B * (b_delta * b_xs[t])[None, :]
            b_y = gl.sum(b_C * b_h, axis=0)
            if BEGINS:
                b_y += b_D * b_xs[t]
            else:
                b_y += b_ys[t]
            m_t = m_c & (i + t < count)
            gl.store(p_y + o_pixels[t] * DIM, b_y.to(y.dtype.element_ty), mask=m_t)
        o_pixels = o_nexts
        b_xs = b_next_xs
        b_ys = b_next_ys


@jit(do_not_specialize=SIZES)
def _output_kernel(
    x,  # (batch, height, width, DIM)
    x_dbl,  # (batch, height, width, 4, RANK + 2 * DSTATE)
    dt_projs_weight,  # (4, DIM, RANK)
    dt_projs_bias,  # (4, DIM)
    A_logs,  # (4 * DIM, DSTATE)
    Ds,  # (4 * DIM)
    states,  # (4, batch, num_chunks, DSTATE, DIM): on entering each chunk
    y_sum,  # (batch, height, width, DIM), accumulates; may be y
    y,  # (batch, height, width, DIM), written by the last order
    height,
    width,
    chunk_size,
    num_chunks,
    ORDER: tl.constexpr,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    RANK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_DSTATE: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
    LAYOUT: tl.constexpr,
    BY_STATE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    FETCH_R: tl.constexpr,
    FETCH_N: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Add both directions of one order: 0 along rows, which begins the sum, 1 along columns.

    A program walks its chunk forwards and then back, and each thread keeps to its channel: it
    adds to what it wrote itself, or to what the launch before wrote, so no atomics are needed.
    """
    i_block = gl.program_id(0)
    i_chunk = gl.program_id(1)
    i_b = gl.program_id(2).to(gl.int64)
    length = height * width
    first = i_chunk * chunk_size
    count = gl.minimum(chunk_size, length - first)

    o_c = i_block * CHANNELS + _arange(CHANNELS, BY_CHANNEL)
    o_n = _arange(PADDED_DSTATE, BY_STATE)
    o_r = _arange(PADDED_RANK, BY_STATE)
    m_c = o_c < DIM
    o_image = i_b * length
    batch = gl.num_programs(2)
    p_states = states + o_n[:, None] * DIM + o_c[None, :]
    m_nc = (o_n < DSTATE)[:, None] & m_c[None, :]
    b_D = _zeros_like(o_c).to(ACC)
    if ORDER == 0:
        for i in gl.static_range(4):
            b_D += gl.load(Ds + i * DIM + o_c, mask=m_c, other=0.0).to(ACC)

    rs = _SharedMemory(ACC, [PADDED_RANK, STEPS], SHARED)
    Bs = _SharedMemory(ACC, [PADDED_DSTATE, STEPS], SHARED)
    Cs = _SharedMemory(ACC, [PADDED_DSTATE, STEPS], SHARED)

    # Forwards.
    b_W, b_bias, b_A = _load_direction(
        dt_projs_weight, dt_projs_bias, A_logs, ORDER, o_c, o_n, o_r, DIM, DSTATE, RANK, ACC
    )
    o_states = ((ORDER * batch + i_b) * num_chunks + i_chunk) * (DSTATE * DIM)
    b_h = gl.load(p_states + o_states, mask=m_nc, other=0.0)  # [N, CH]
    _walk_chunk(
        x, x_dbl, y_sum, y_sum, b_h, b_W, b_bias, b_A, b_D, o_image, first, count, ORDER,
        height, width, o_c, rs, Bs, Cs, DIM, DSTATE, RANK, PADDED_DSTATE, PADDED_RANK, STEPS,
        ORDER == 0, ACC, LAYOUT, FETCH_R, FETCH_N,
    )  # fmt: skip
    _barrier()

    # And back.
    b_W, b_bias, b_A = _load_direction(
        dt_projs_weight, dt_projs_bias, A_logs, ORDER + 2, o_c, o_n, o_r, DIM, DSTATE, RANK, ACC
    )
    i_slot = ((ORDER + 2) * batch + i_b + 1) * num_chunks - 1 - i_chunk
    o_states = i_slot * (DSTATE * DIM)
    b_h = gl.load(p_states + o_states, mask=m_nc, other=0.0)
    if ORDER == 0:
        p_out = y_sum
    else:
        p_out = y
    _walk_chunk(
        x, x_dbl, y_sum, p_out, b_h, b_W, b_bias, b_A, b_D, o_image, length - first - count, count,
        ORDER + 2, height, width, o_c, rs, Bs, Cs, DIM, DSTATE, RANK, PADDED_DSTATE, PADDED_RANK,
        STEPS, False, ACC, LAYOUT, FETCH_R, FETCH_N,
    )  # fmt: skip


@jit(do_not_specialize=SIZES)
def _adjoint_state_kernel(
    dy,  # (batch, height, width, DIM)
    x,  # (batch, height, width, DIM)
    x_dbl,  # (batch, height, width, 4, RANK + 2 * DSTATE)
    dt_projs_weight,  # (4, DIM, RANK)
    dt_projs_bias,  # (4, DIM)
    A_logs,  # (4 * DIM, DSTATE)
    delta,  # (DIRECTIONS, batch, height, width, DIM)
    states,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM), of which chunk i + 1 is written
    adjoints,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM), of which chunk i - 1 is written
    delta_sums,  # (DIRECTIONS, batch, num_chunks, DIM)
    inner_states,  # (DIRECTIONS, batch, num_chunks, num_subchunks, DSTATE, DIM)
    inner_sums,  # (DIRECTIONS, batch, num_chunks, num_subchunks, DIM)
    dD_parts,  # (batch, num_chunks, DIM)
    height,
    width,
    chunk_size,
    num_chunks,
    num_subchunks,
    k,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    RANK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_DSTATE: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    SUBSTEPS: tl.constexpr,
    STEPS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    WITH_DD: tl.constexpr,
    ACC: tl.constexpr,
    LAYOUT: tl.constexpr,
    BY_STATE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    FETCH_R: tl.constexpr,
    FETCH_N: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Both chunk passes of a direction, k or one after it, in one walk, and delta.

    With P_t the product of a up to step t of the chunk, the adjoint that leaves the chunk at its
    front is sum_t P_t C_t dy_t: it needs no walk of its own from behind.
    """
    ROW: tl.constexpr = RANK + 2 * DSTATE
    i_block = gl.program_id(0)
    i_chunk = gl.program_id(1)
    batch = gl.num_programs(2) // DIRECTIONS
    i_row = gl.program_id(2).to(gl.int64)
    i_b = i_row % batch
    k += gl.program_id(2) // batch
    length = height * width
    start = i_chunk * chunk_size
    count = gl.minimum(chunk_size, length - start)

    o_c = i_block * CHANNELS + _arange(CHANNELS, BY_CHANNEL)
    o_n = _arange(PADDED_DSTATE, BY_STATE)
    o_r = _arange(PADDED_RANK, BY_STATE)
    m_c = o_c < DIM
    m_nc = (o_n < DSTATE)[:, None] & m_c[None, :]
    o_nc = o_n[:, None] * DIM + o_c[None, :]
    b_W, b_bias, b_A = _load_direction(
        dt_projs_weight, dt_projs_bias, A_logs, k, o_c, o_n, o_r, DIM, DSTATE, RANK, ACC
    )
    o_image = i_b * length * DIM
    p_x = x + o_image + o_c
    p_dy = dy + o_image + o_c
    p_delta = delta + i_row * length * DIM + o_c
    p_r = x_dbl + i_b * length * (4 * ROW) + k * ROW
    p_B = p_r + RANK
    p_C = p_B + DSTATE
    i_slot = i_row * num_chunks + i_chunk
    rs = _SharedMemory(ACC, [PADDED_RANK, STEPS], SHARED)
    Bs = _SharedMemory(ACC, [PADDED_DSTATE, STEPS], SHARED)
    Cs = _SharedMemory(ACC, [PADDED_DSTATE, STEPS], SHARED)

    b_h = _zeros_like(b_A)  # [N, CH]
    b_P = b_h + 1.0
    b_G = b_h
    b_sum = _zeros_like(b_bias)  # [CH]
    b_dD = b_sum
    pixel, left, line, step, jump = _first_pixel(start, k, height, width)
    o_pixels, pixel, left = _next_group(pixel, left, line, step, jump, count, STEPS)
    b_rs = _fetch_rows(p_r, o_pixels, RANK, PADDED_RANK, ROW, STEPS, ACC, FETCH_R)
    b_Bs = _fetch_rows(p_B, o_pixels, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
    b_Cs = _fetch_rows(p_C, o_pixels, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
    b_xs = _fetch_channels(p_x, o_pixels, m_c, DIM, STEPS, ACC)
    b_dys = _fetch_channels(p_dy, o_pixels, m_c, DIM, STEPS, ACC)
    for i in range(0, count, STEPS):
        if i % SUBSTEPS == 0:
            i_inner = i_slot * num_subchunks + i // SUBSTEPS
            gl.store(inner_states + i_inner * (DSTATE * DIM) + o_nc, b_h, mask=m_nc)
            gl.store(inner_sums + i_inner * DIM + o_c, b_sum, mask=m_c)
        rs.store(b_rs)
        Bs.store(b_Bs)
        Cs.store(b_Cs)
        o_nexts, pixel, left = _next_group(pixel, left, line, step, jump, count - i - STEPS, STEPS)
        b_rs = _fetch_rows(p_r, o_nexts, RANK, PADDED_RANK, ROW, STEPS, ACC, FETCH_R)
        b_Bs = _fetch_rows(p_B, o_nexts, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
        b_Cs = _fetch_rows(p_C, o_nexts, DSTATE, PADDED_DSTATE, ROW, STEPS, ACC, FETCH_N)
        b_next_xs = _fetch_channels(p_x, o_nexts, m_c, DIM, STEPS, ACC)
        b_next_dys = _fetch_channels(p_dy, o_nexts, m_c, DIM, STEPS, ACC)
        for t in gl.static_range(STEPS):
            # Positions past the end add nothing to the sums.
            is_inside = i + t < count
            b_delta = gl.where(is_inside, _delta(rs.slice(t, 1, 1).load(LAYOUT), b_W, b_bias), 0.0)
            b_dy = gl.where(is_inside, b_dys[t], 0.0)
            b_B = Bs.slice(t, 1, 1).load(LAYOUT)
            b_C = Cs.slice(t, 1, 1).load(LAYOUT)
            b_a = _exp2(b_A * b_delta[None, :])
            b_h = b_a * b_h + b_B * (b_delta * b_xs[t])[None, :]
            b_P = b_P * b_a
            b_G = b_P * (b_C * b_dy[None, :]) + b_G
            gl.store(p_delta + o_pixels[t] * DIM, b_delta, mask=m_c & is_inside)
            b_sum += b_delta
            if WITH_DD:
                b_dD += b_xs[t] * b_dy
        o_pixels = o_nexts
        b_xs = b_next_xs
        b_dys = b_next_dys

    gl.store(delta_sums + i_slot * DIM + o_c, b_sum, mask=m_c)
    p_states = states + (i_slot + 1) * (DSTATE * DIM) + o_nc
    gl.store(p_states, b_h, mask=m_nc & (i_chunk + 1 < num_chunks))
    p_adjoints = adjoints + (i_slot - 1) * (DSTATE * DIM) + o_nc
    gl.store(p_adjoints, b_G, mask=m_nc & (i_chunk > 0))
    if WITH_DD:
        # D skips the scan: its gradient comes with direction 0, the same for all.
        gl.store(dD_parts + i_slot * DIM + o_c, b_dD, mask=m_c & (k == 0))


@jit
def _grid(ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr):
    """Element (i, j) is i COLUMNS + j."""
    if INTERPRETED:
        o_i = gl.arange(0, ROWS)
        o_j = gl.arange(0, COLUMNS)
    else:
        o_i = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        o_j = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    return o_i[:, None] * COLUMNS + o_j[None, :]


@jit
def _from_lane(b_x, o_axis, BIT: tl.constexpr, LANES: tl.constexpr, AXIS: tl.constexpr):
    """What the lane holds whose index along AXIS, o_axis here, differs in BIT; LANES lanes away."""
    if INTERPRETED:
        return gl.gather(b_x, o_axis ^ BIT, AXIS)
    elif b_x.dtype == gl.float64:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 lo, hi; mov.b64 {lo, hi}, $1; shfl.sync.bfly.b32 lo, lo, $2, 31, -1;"
            " shfl.sync.bfly.b32 hi, hi, $2, 31, -1; mov.b64 $0, {lo, hi}; }",
            "=d,d,r", [b_x, _zeros_like(o_axis) + LANES], dtype=gl.float64, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;",
            "=f,f,r", [b_x, _zeros_like(o_axis) + LANES], dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@jit
def _fold(b_low, b_high, o_axis, BIT: tl.constexpr, LANES: tl.constexpr, AXIS: tl.constexpr):
    """Add the lanes that differ in BIT: those without it get the sum of b_low, others b_high's.

    Half as many values for twice as many lanes: a sum over lanes of many values at once that
    costs less than one exchange per value.
    """
    m_bit = (o_axis & BIT) != 0
    b_sent = gl.where(m_bit, b_low, b_high)
    return gl.where(m_bit, b_high, b_low) + _from_lane(b_sent, o_axis, BIT, LANES, AXIS)


@jit
def _halves(b_x):
    """The first and the second half of the last axis of three."""
    shape: tl.constexpr = b_x.shape
    b_x = gl.reshape(b_x, [shape[0], shape[1], 2, shape[2] // 2])
    return gl.split(gl.permute(b_x, [0, 1, 3, 2]))


@jit
def _fold_halves(b_x, o_axis, BIT: tl.constexpr, LANES: tl.constexpr, AXIS: tl.constexpr):
    """Fold the last axis of three, or add the lanes if it has come to one element."""
    if b_x.shape[2] > 1:
        b_low, b_high = _halves(b_x)
        o_axis, _ = _halves(o_axis)
        return _fold(b_low, b_high, o_axis, BIT, LANES, AXIS), o_axis
    else:
        return b_x + _from_lane(b_x, o_axis, BIT, LANES, AXIS), o_axis


@jit
def _sum_over_channels(b_dB, b_dC, o_outer, LAYOUT: tl.constexpr):
    """Sum (4, S, 8) over its last axis: (8, 4, S // 4 or 1), see the kernel for what lies where."""
    b_sum = _fold(b_dB, b_dC, o_outer, 4, 16, 2)
    b_sum, o_outer = _fold_halves(
        gl.permute(b_sum, [0, 2, 1]), gl.permute(o_outer, [0, 2, 1]), 2, 8, 1
    )
    b_sum, o_outer = _fold_halves(b_sum, o_outer, 1, 4, 1)
    b_sum = gl.permute(b_sum, [1, 0, 2])
    if INTERPRETED:
        return b_sum
    else:
        return gl.convert_layout(b_sum, LAYOUT)


@jit
def _sum_over_states(b_x, o_outer, LANES: tl.constexpr):
    """Sum (4, 8, 4) over its first axis: (8, 4)."""
    b_x, o_outer = _fold_halves(b_x, o_outer, 2, 2, 0)
    b_x, o_outer = _fold_halves(b_x, o_outer, 1, 1, 0)
    b_x = gl.permute(gl.reshape(b_x, [4, 8]), [1, 0])
    if INTERPRETED:
        return b_x
    else:
        return gl.convert_layout(b_x, LANES)


@jit
def _descend(pixel, left, line, step, jump, position, end):
    """From `position` to the one before it; those from `end` on count as the last before `end`."""
    next_pixel, next_left = _next_pixel(pixel, left, line, step, jump)
    is_inside = position < end
    return gl.where(is_inside, next_pixel, pixel), gl.where(is_inside, next_left, left)


@jit
def _fetch_tile(
    p_x, p_dy, p_delta, p_BC, m_c, m_BC, pixel, left, line, step, jump, position, start, end,
    DIM: tl.constexpr, ROW: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The inputs of STEPS positions, from `position` backwards; zeros outside of the chunk."""
    b_xs = ()
    b_dys = ()
    b_deltas = ()
    b_BCs = ()
    for u in gl.static_range(STEPS):
        is_inside = (position - u >= start) & (position - u < end)
        o_pixel = gl.where(is_inside, pixel, 0).to(gl.int64)
        m_t = m_c & is_inside
        b_xs = b_xs + (gl.load(p_x + o_pixel * DIM, mask=m_t, other=0.0).to(ACC),)
        b_dys = b_dys + (gl.load(p_dy + o_pixel * DIM, mask=m_t, other=0.0).to(ACC),)
        b_deltas = b_deltas + (gl.load(p_delta + o_pixel * DIM, mask=m_t, other=0.0),)
        b_BC = gl.load(p_BC + o_pixel * (4 * ROW), mask=m_BC & is_inside, other=0.0)
        b_BCs = b_BCs + (b_BC.to(ACC),)
        pixel, left = _descend(pixel, left, line, step, jump, position - u, end)
    return b_xs, b_dys, b_deltas, b_BCs, pixel, left


@jit
def _store_tile(xs, dys, deltas, BCs, b_xs, b_dys, b_deltas, b_BCs, last, STEPS: tl.constexpr):
    for u in gl.static_range(STEPS):
        xs.index(last - u).store(b_xs[u])
        dys.index(last - u).store(b_dys[u])
        deltas.index(last - u).store(b_deltas[u])
        BCs.index(last - u).store(b_BCs[u])


@jit(do_not_specialize=SIZES)
def _sweep_kernel(
    dy,  # (batch, height, width, DIM)
    x,  # (batch, height, width, DIM)
    x_dbl,  # (batch, height, width, 4, RANK + 2 * DSTATE)
    A_logs,  # (4 * DIM, DSTATE)
    Ds,  # (4 * DIM)
    delta,  # (DIRECTIONS, batch, height, width, DIM), replaced by the gradient of the loss by delta
    states,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM): on entering each chunk
    adjoints,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM): on entering each chunk from behind
    inner_states,  # (DIRECTIONS, batch, num_chunks, num_subchunks, DSTATE, DIM): from zero at the chunk
    inner_sums,  # (DIRECTIONS, batch, num_chunks, num_subchunks, DIM)
    dx_sum,  # (DIRECTIONS, batch, height, width, DIM), accumulates over launches; may be dx
    dx,  # (batch, height, width, DIM), written by the last direction
    dBC_parts,  # (blocks of channels, DIRECTIONS, batch, height, width, 2 * DSTATE)
    dA_parts,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM)
    height,
    width,
    chunk_size,
    num_chunks,
    num_subchunks,
    k,
    DIRECTIONS: tl.constexpr,
    BEGINS: tl.constexpr,
    ENDS: tl.constexpr,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    RANK: tl.constexpr,
    S: tl.constexpr,
    REST: tl.constexpr,
    SUBSTEPS: tl.constexpr,
    STEPS: tl.constexpr,
    FETCH: tl.constexpr,
    ACC: tl.constexpr,
    LAYOUT: tl.constexpr,
    BY_STATE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    LANES: tl.constexpr,
    BY_SUM: tl.constexpr,
    BY_REST: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    SHARED_STATES: tl.constexpr,
):
    """Walk each chunk from behind with the adjoint g of the state.

    g_t = C_t dy_t + a_{t+1} g_{t+1} with, per step, dx = sum_n g B delta + D dy,
    d(delta) = sum_n g (B x + A a h_{t-1}), dA = sum_t g delta a h_{t-1}, dB = sum_c g delta x
    and dC = sum_c dy h. States are found again from the nearest one kept, never by going back.

    A program is one warp with 32 channels. State n = i S + s of channel c = 4 j + d lies in lane
    4 j + i, so blocks of states are (4, S, 8, 4), indexed i, s, j, d.
    """
    ROW: tl.constexpr = RANK + 2 * DSTATE
    TILES: tl.constexpr = SUBSTEPS // STEPS
    i_block = gl.program_id(0)
    i_chunk = gl.program_id(1)
    batch = gl.num_programs(2) // DIRECTIONS
    i_row = gl.program_id(2).to(gl.int64)
    i_b = i_row % batch
    k += gl.program_id(2) // batch
    length = height * width
    start = i_chunk * chunk_size
    end = gl.minimum(start + chunk_size, length)

    o_n = _grid(4, S, BY_STATE)
    o_c = i_block * 32 + _grid(8, 4, BY_CHANNEL)
    o_nc = o_n[:, :, None, None] * DIM + o_c[None, None, :, :]
    m_nc = (o_n < DSTATE)[:, :, None, None] & (o_c < DIM)[None, None, :, :]
    # For sums over lanes: i of (4, 8, 4) and j of (4, S, 8).
    o_i = gl.max((o_n // S)[:, :, None, None] + (o_c * 0)[None, None, :, :], axis=1)
    o_j = gl.max((o_n * 0)[:, :, None, None] + (o_c % 32 // 4)[None, None, :, :], axis=3)
    p_A = A_logs + (k * DIM + o_c)[None, None, :, :] * DSTATE + o_n[:, :, None, None]
    b_A = -_exp2(gl.load(p_A, mask=m_nc, other=0.0).to(ACC) * LOG2_E) * LOG2_E

    # What is stored is one channel to a lane, or one number of B or C.
    o_lane = i_block * 32 + _grid(8, 4, LANES)
    m_c = o_lane < DIM
    o_image = i_b * length * DIM
    p_x = x + o_image + o_lane
    p_dy = dy + o_image + o_lane
    p_delta = delta + i_row * length * DIM + o_lane
    p_dx_sum = dx_sum + i_row * length * DIM + o_lane
    p_dx = dx + o_image + o_lane
    o_BC = _grid(8, S, LANES)
    m_BC = o_BC % (4 * S) < DSTATE
    o_BC = o_BC // (4 * S) * DSTATE + o_BC % (4 * S)
    p_BC = x_dbl + i_b * length * (4 * ROW) + k * ROW + RANK + o_BC
    if BEGINS:
        b_D = _zeros_like(o_lane).to(ACC)
        for i in gl.static_range(4):
            b_D += gl.load(Ds + i * DIM + o_lane, mask=m_c & (k == 0), other=0.0).to(ACC)

    # The sums over channels leave B's or C's in a lane by bit 2 of j, and bits 1 and 0 lead s.
    o_ji = _grid(8, 4, LANES)
    o_s = o_ji // 8 % 2 * (S // 2) + o_ji // 4 % 2 * (S // 4)
    o_s = o_s[:, :, None] + _arange(REST, BY_REST)[None, None, :]  # (8, 4, REST)
    o_sum = (o_ji % 4 * S)[:, :, None] + o_s
    m_sum = o_sum < DSTATE
    o_sum += (o_ji // 16 * DSTATE)[:, :, None]
    p_dBC = dBC_parts + (i_block * gl.num_programs(2) + i_row) * length * (2 * DSTATE)

    i_slot = i_row * num_chunks + i_chunk
    p_state = states + i_slot * (DSTATE * DIM) + o_nc
    b_g = gl.load(adjoints + i_slot * (DSTATE * DIM) + o_nc, mask=m_nc, other=0.0)
    b_dA = _zeros_like(b_A)

    xs = _SharedMemory(ACC, [SUBSTEPS, 8, 4], SHARED_ROWS)
    dys = _SharedMemory(ACC, [SUBSTEPS, 8, 4], SHARED_ROWS)
    deltas = _SharedMemory(ACC, [SUBSTEPS, 8, 4], SHARED_ROWS)
    BCs = _SharedMemory(ACC, [SUBSTEPS, 8, S], SHARED_ROWS)
    kept = _SharedMemory(ACC, [TILES, 4, S, 8, 4], SHARED_STATES)

    # Two walks from behind: one fetches a subchunk, the other follows a subchunk later.
    num_inner = (end - start + SUBSTEPS - 1) // SUBSTEPS
    position = start + num_inner * SUBSTEPS - 1
    pixel, left, line, step, jump = _first_pixel(length - end, (k + 2) % 4, height, width)
    fetch_pixel = pixel
    fetch_left = left
    for i in range(TILES):
        b_xs, b_dys, b_deltas, b_BCs, fetch_pixel, fetch_left = _fetch_tile(
            p_x, p_dy, p_delta, p_BC, m_c, m_BC, fetch_pixel, fetch_left, line, step, jump,
            position - i * STEPS, start, end, DIM, ROW, STEPS, ACC,
        )  # fmt: skip
        last = SUBSTEPS - 1 - i * STEPS
        _store_tile(xs, dys, deltas, BCs, b_xs, b_dys, b_deltas, b_BCs, last, STEPS)

    for i in range(num_inner):
        i_inner = i_slot * num_subchunks + num_inner - 1 - i
        b_h = gl.load(inner_states + i_inner * (DSTATE * DIM) + o_nc, mask=m_nc, other=0.0)
        b_sum = gl.load(inner_sums + i_inner * DIM + o_c, mask=o_c < DIM, other=0.0)
        b_h0 = gl.load(p_state, mask=m_nc, other=0.0)
        b_h += _exp2(b_A * b_sum[None, None, :, :]) * b_h0
        for i_tile in range(TILES - 1):
            kept.index(i_tile).store(b_h)
            for t in gl.static_range(STEPS):
                b_delta = deltas.index(i_tile * STEPS + t).load(BY_CHANNEL)
                b_u = b_delta * xs.index(i_tile * STEPS + t).load(BY_CHANNEL)
                b_B = BCs.index(i_tile * STEPS + t).slice(0, 4, 0).load(BY_STATE)
                b_a = _exp2(b_A * b_delta[None, None, :, :])
                b_h = b_a * b_h + b_B[:, :, None, None] * b_u[None, None, :, :]
        kept.index(TILES - 1).store(b_h)

        for j in range(TILES):
            i_tile = TILES - 1 - j
            o_pixels = ()
            b_dxs = ()
            for u in gl.static_range(STEPS):
                is_inside = position - u < end
                o_pixel = pixel.to(gl.int64)
                o_pixels = o_pixels + (o_pixel,)
                if BEGINS:
                    b_dy = dys.index(i_tile * STEPS + STEPS - 1 - u).load(LANES)
                    b_dxs = b_dxs + (b_D * b_dy,)
                else:
                    b_dx = gl.load(p_dx_sum + o_pixel * DIM, mask=m_c & is_inside, other=0.0)
                    b_dxs = b_dxs + (b_dx,)
                pixel, left = _descend(pixel, left, line, step, jump, position - u, end)

            b_as = ()
            b_hs = (kept.index(i_tile).load(LAYOUT),)
            for t in gl.static_range(STEPS):
                # Past the end delta is 0: a is 1 and nothing is added.
                b_delta = deltas.index(i_tile * STEPS + t).load(BY_CHANNEL)
                b_u = b_delta * xs.index(i_tile * STEPS + t).load(BY_CHANNEL)
                b_B = BCs.index(i_tile * STEPS + t).slice(0, 4, 0).load(BY_STATE)
                b_a = _exp2(b_A * b_delta[None, None, :, :])
                b_h = b_a * b_hs[t] + b_B[:, :, None, None] * b_u[None, None, :, :]
                b_hs = b_hs + (b_h,)
                b_as = b_as + (b_a,)

            for t in gl.static_range(STEPS - 1, -1, -1):
                row = i_tile * STEPS + t
                if (t + 1) % FETCH == 0:
                    b_xs, b_dys, b_deltas, b_BCs, fetch_pixel, fetch_left = _fetch_tile(
                        p_x, p_dy, p_delta, p_BC, m_c, m_BC, fetch_pixel, fetch_left,
                        line, step, jump, position - (STEPS - 1 - t) - SUBSTEPS, start, end,
                        DIM, ROW, FETCH, ACC,
                    )  # fmt: skip
                b_delta = deltas.index(row).load(BY_CHANNEL)
                b_u = b_delta * xs.index(row).load(BY_CHANNEL)
                b_dy = dys.index(row).load(BY_CHANNEL)[None, None, :, :]
                b_B = BCs.index(row).slice(0, 4, 0).load(BY_STATE)
                b_C = BCs.index(row).slice(4, 4, 0).load(BY_STATE)
                b_g += b_C[:, :, None, None] * b_dy
                b_dC = gl.sum(b_hs[t + 1] * b_dy, axis=3)  # (4, S, 8)
                b_dB = gl.sum(b_g * b_u[None, None, :, :], axis=3)
                b_gB = gl.sum(b_g * b_B[:, :, None, None], axis=1)  # (4, 8, 4)
                b_g = b_g * b_as[t]
                b_gh = b_g * b_hs[t]
                b_dA += b_gh * b_delta[None, None, :, :]
                b_ghA = gl.sum(b_gh * b_A, axis=1)

                b_gB = _sum_over_states(b_gB, o_i, LANES)  # (8, 4)
                b_ghA = _sum_over_states(b_ghA, o_i, LANES)
                b_ddelta = b_gB * xs.index(row).load(LANES) + b_ghA * LN_2
                b_dx = b_dxs[STEPS - 1 - t] + b_gB * deltas.index(row).load(LANES)
                b_dBC = _sum_over_channels(b_dB, b_dC, o_j, BY_SUM)  # (8, 4, REST)
                is_inside = position - (STEPS - 1 - t) < end
                o_pixel = o_pixels[STEPS - 1 - t]
                if ENDS:
                    gl.store(
                        p_dx + o_pixel * DIM, b_dx.to(dx.dtype.element_ty), mask=m_c & is_inside
                    )
                else:
                    gl.store(p_dx_sum + o_pixel * DIM, b_dx, mask=m_c & is_inside)
                gl.store(p_delta + o_pixel * DIM, b_ddelta, mask=m_c & is_inside)
                gl.store(p_dBC + o_pixel * (2 * DSTATE) + o_sum, b_dBC, mask=m_sum & is_inside)
                if t % FETCH == 0:
                    _store_tile(
                        xs, dys, deltas, BCs, b_xs, b_dys, b_deltas, b_BCs, row + FETCH - 1, FETCH
                    )
            position -= STEPS

    gl.store(dA_parts + i_slot * (DSTATE * DIM) + o_nc, b_dA * b_A * LN_2, mask=m_nc)


@triton.jit(do_not_specialize=SIZES)
def _projection_kernel(
    ddelta,  # (DIRECTIONS, num_rows, DIM)
    x_dbl,  # (num_rows, 4, RANK + 2 * DSTATE)
    dt_projs_weight,  # (4, DIM, RANK)
    dt_projs_bias,  # (4, DIM)
    dBC_parts,  # (NUM_PARTS, DIRECTIONS, num_rows, 2 * DSTATE)
    dx_dbl,  # (num_rows, 4, RANK + 2 * DSTATE)
    dW_parts,  # (DIRECTIONS, programs, DIM, RANK)
    dbias_parts,  # (DIRECTIONS, programs, DIM)
    num_rows,
    k,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    RANK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_DSTATE: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PIXELS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Back through softplus and the projection of delta, and the gradient of one row of x_dbl."""
    ROW: tl.constexpr = RANK + 2 * DSTATE
    i_p = tl.program_id(0)
    i_k = tl.program_id(1)
    k += i_k
    o_p = i_p.to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    o_r = tl.arange(0, PADDED_RANK)
    m_p = o_p < num_rows
    m_pr = m_p[:, None] & (o_r < RANK)[None, :]
    o_pr = (o_p[:, None] * 4 + k) * ROW + o_r[None, :]
    b_r = tl.load(x_dbl + o_pr, mask=m_pr, other=0.0).to(ACC)  # [PIXELS, R]
    b_dr = tl.zeros([PIXELS, PADDED_RANK], dtype=ACC)
    for i in range(0, DIM, CHANNELS):
        o_c = i + tl.arange(0, CHANNELS)
        m_c = o_c < DIM
        o_kc = k * DIM + o_c
        m_cr = m_c[:, None] & (o_r < RANK)[None, :]
        p_W = dt_projs_weight + o_kc[:, None] * RANK + o_r[None, :]
        b_W = tl.load(p_W, mask=m_cr, other=0.0).to(ACC)  # [CH, R]
        b_bias = tl.load(dt_projs_bias + o_kc, mask=m_c, other=0.0).to(ACC)
        p_ddelta = ddelta + (i_k * num_rows.to(tl.int64) + o_p[:, None]) * DIM + o_c[None, :]
        b_ddelta = tl.load(p_ddelta, mask=m_p[:, None] & m_c[None, :], other=0.0)
        b_z = _dot(b_r, tl.trans(b_W)) + b_bias[None, :]
        b_dz = b_ddelta / (1.0 + tl.exp(-b_z))  # [PIXELS, CH]
        b_dr += _dot(b_dz, b_W)
        o_part = (i_k * tl.num_programs(0) + i_p).to(tl.int64) * DIM + o_c
        b_dW = _dot(tl.trans(b_dz), b_r)
        tl.store(dW_parts + o_part[:, None] * RANK + o_r[None, :], b_dW, mask=m_cr)
        tl.store(dbias_parts + o_part, tl.sum(b_dz, axis=0), mask=m_c)
    tl.store(dx_dbl + o_pr, b_dr.to(dx_dbl.dtype.element_ty), mask=m_pr)

    o_n = tl.arange(0, 2 * PADDED_DSTATE)
    m_pn = m_p[:, None] & (o_n < 2 * DSTATE)[None, :]
    b_dBC = tl.zeros([PIXELS, 2 * PADDED_DSTATE], dtype=ACC)
    for i in range(NUM_PARTS):
        i_part = (i * tl.num_programs(1) + i_k).to(tl.int64)
        o_pn = (i_part * num_rows + o_p[:, None]) * (2 * DSTATE) + o_n[None, :]
        b_dBC += tl.load(dBC_parts + o_pn, mask=m_pn, other=0.0)
    p_dBC = dx_dbl + (o_p[:, None] * 4 + k) * ROW + RANK + o_n[None, :]
    tl.store(p_dBC, b_dBC.to(dx_dbl.dtype.element_ty), mask=m_pn)


@triton.jit
def _dot(b_x, b_y):
    if b_x.dtype == tl.float64:
        return tl.sum(b_x[:, :, None] * b_y[None, :, :], axis=1)
    else:
        # Three products of tf32 parts keep float32's accuracy.
        return tl.dot(b_x, b_y, input_precision="tf32x3")


def _fetch_layout(size: int, num_warps: int):
    """Blocks of [size, steps], with the lanes of a warp on 4 steps or more."""
    lanes = min(8, size)
    return gl.BlockedLayout([size // lanes, 1], [lanes, 32 // lanes], [1, num_warps], [0, 1])


def _warps(dim: int, most: int) -> int:
    return next((w for w in (4, 2) if w <= most and dim % (32 * w) == 0), 1)


@functools.lru_cache
def _walk_options(dim, dstate, rank, dtype, most_warps, most_channels) -> dict:
    """The constants of kernels in which a thread owns all states of its channels."""
    per_thread = most_channels if dim % (32 * most_channels) == 0 else 1
    if dtype == torch.float64:
        per_thread = 1
    num_warps = _warps(dim // per_thread, most_warps)
    padded_dstate, padded_rank = triton.next_power_of_2(dstate), triton.next_power_of_2(rank)
    layout = by_state = by_channel = fetch_r = fetch_n = shared = None
    if not INTERPRETED.value:
        fetch_r, fetch_n = _fetch_layout(padded_rank, num_warps), _fetch_layout(padded_dstate, num_warps)
        shared = gl.SwizzledSharedLayout(1, 1, 1, order=[0, 1])
        layout = gl.BlockedLayout([1, per_thread], [1, 32], [1, num_warps], [1, 0])
        by_state, by_channel = gl.SliceLayout(1, layout), gl.SliceLayout(0, layout)
    return {
        "DIM": dim,
        "DSTATE": dstate,
        "RANK": rank,
        "CHANNELS": 32 * per_thread * num_warps,
        "PADDED_DSTATE": padded_dstate,
        "PADDED_RANK": padded_rank,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BY_STATE": by_state,
        "LAYOUT": layout,
        "BY_CHANNEL": by_channel,
        "FETCH_R": fetch_r,
        "FETCH_N": fetch_n,
        "SHARED": shared,
        "num_warps": num_warps,
    }


@functools.lru_cache
def _sweep_options(dim, dstate, rank, dtype, substeps, steps, fetch) -> dict:
    """The constants of the kernel in which a thread owns a patch of states and channels."""
    S = triton.cdiv(triton.next_power_of_2(dstate), 4)
    rest = max(1, S // 4)
    layout = by_state = by_channel = lanes = by_sum = by_rest = rows = states = None
    if not INTERPRETED.value:
        layout = gl.BlockedLayout([1, S, 1, 4], [4, 1, 8, 1], [1, 1, 1, 1], [3, 1, 0, 2])
        by_state = gl.SliceLayout(2, gl.SliceLayout(3, layout))
        by_channel = gl.SliceLayout(0, gl.SliceLayout(1, layout))
        by_sum = gl.BlockedLayout([1, 1, rest], [8, 4, 1], [1, 1, 1], [2, 1, 0])
        lanes = gl.SliceLayout(2, by_sum)
        by_rest = gl.SliceLayout(0, gl.SliceLayout(1, by_sum))
        rows = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
        states = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 0, 2, 1])
    return {
        "DIM": dim,
        "DSTATE": dstate,
        "RANK": rank,
        "S": S,
        "REST": rest,
        "SUBSTEPS": substeps,
        "STEPS": steps,
        "FETCH": fetch,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "LAYOUT": layout,
        "BY_STATE": by_state,
        "BY_CHANNEL": by_channel,
        "LANES": lanes,
        "BY_SUM": by_sum,
        "BY_REST": by_rest,
        "SHARED_ROWS": rows,
        "SHARED_STATES": states,
        "num_warps": 1,
    }


def _chunks(length: int, programs: int, wanted: int, unit: int) -> tuple[int, int]:
    """Size and number of chunks, a multiple of `unit`, for about `wanted` programs in all."""
    chunk_size = triton.cdiv(length, max(1, wanted // programs))
    chunk_size = triton.cdiv(chunk_size, unit) * unit
    return chunk_size, triton.cdiv(length, chunk_size)


def _carry(A_logs, states, delta_sums, k, options):
    directions, batch, num_chunks, dim = delta_sums.shape
    with_adjoints = states.dim() == 6
    layout = None
    if not INTERPRETED.value:
        layout = gl.BlockedLayout([1], [32], [1], [0])
    grid = (triton.cdiv(dim, 32), A_logs.shape[1], directions * batch * (1 + with_adjoints))
    _carry_kernel[grid](
        A_logs,
        states,
        delta_sums,
        num_chunks,
        k,
        DIM=dim,
        DSTATE=A_logs.shape[1],
        CHANNELS=32,
        AHEAD=CARRY_AHEAD,
        DIRECTIONS=directions,
        WITH_ADJOINTS=with_adjoints,
        ACC=options["ACC"],
        BY_CHANNEL=layout,
        num_warps=1,
    )


def scan_2d_forward(
    x: Tensor,
    x_dbl: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
) -> Tensor:
    """Scan x along four orders of its pixels and sum the results in image order.

    Besides the result it allocates the chunk states, a few percent of x, and for a dtype of 16
    bits a float32 buffer of the shape of x in which the directions are summed.

    Args:
        x: (batch, height, width, dim), contiguous like all others; float32, float64, bfloat16 or
            float16.
        x_dbl: (batch, height, width, 4, rank + 2 * dstate), in the dtype of x: the low-rank part
            of delta, B and C of each direction.
        dt_projs_weight: (4, dim, rank), float32, or float64 if x is; so are all that follow.
        dt_projs_bias: (4, dim).
        A_logs: (4 * dim, dstate), with A = -exp(A_logs).
        Ds: (4 * dim).

    Returns:
        y: (batch, height, width, dim), in the dtype of x. States and sums are float32, or float64.
    """
    batch, height, width, dim = x.shape
    dstate = A_logs.shape[1]
    rank = dt_projs_weight.shape[2]
    options = _walk_options(dim, dstate, rank, x.dtype, FORWARD_WARPS, FORWARD_CHANNELS)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks = triton.cdiv(dim, options["CHANNELS"])
    chunk_size, num_chunks = _chunks(
        height * width, blocks * batch, FORWARD_PROGRAMS, SHORTEST_CHUNK
    )
    states = x.new_empty(4, batch, num_chunks, dstate, dim, dtype=accumulator)
    delta_sums = x.new_empty(4, batch, num_chunks, dim, dtype=accumulator)
    y = torch.empty_like(x)
    y_sum = y if x.dtype == accumulator else torch.empty_like(x, dtype=accumulator)
    inputs = x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs
    sizes = height, width, chunk_size, num_chunks
    with torch.cuda.device_of(x):
        if num_chunks > 1:
            grid = (blocks * 4, num_chunks - 1, batch)
            _chunk_state_kernel[grid](
                *inputs, states, delta_sums, *sizes, STEPS=FORWARD_GROUP, **options
            )
        _carry(A_logs, states, delta_sums, 0, options)
        for order in range(2):
            _output_kernel[(blocks, num_chunks, batch)](
                *inputs, Ds, states, y_sum, y, *sizes, ORDER=order, STEPS=FORWARD_GROUP, **options
            )
    return y


def scan_2d_backward(
    dy: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `scan_2d_forward` by its six inputs, given dy, the gradient by y.

    Directions are taken one after the other: besides the results it allocates one float32 buffer
    of the shape of x for delta and about as much again for states and partial sums.

    Args:
        dy: (batch, height, width, dim), contiguous, in the dtype of x.
        x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds: as in `scan_2d_forward`.

    Returns:
        The gradients by x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs and Ds, each in the
        shape and dtype of its input.
    """
    batch, height, width, dim = x.shape
    length = height * width
    dstate, rank = A_logs.shape[1], dt_projs_weight.shape[2]
    walk = _walk_options(dim, dstate, rank, x.dtype, ADJOINT_WARPS, ADJOINT_CHANNELS)
    sweep = _sweep_options(dim, dstate, rank, x.dtype, SUBCHUNK, TILE, SWEEP_FETCH)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    # On a small map launches take longer than the work: one for all directions.
    directions = 4 if x.numel() <= SMALL_MAP else 1
    blocks = triton.cdiv(dim, walk["CHANNELS"])
    chunk_size, num_chunks = _chunks(length, blocks * batch, BACKWARD_PROGRAMS, SUBCHUNK)
    num_subchunks = chunk_size // SUBCHUNK
    sweep_blocks = triton.cdiv(dim, 32)
    pixels, channels = PROJECTION_PIXELS, PROJECTION_CHANNELS
    if accumulator == torch.float64:
        pixels, channels = 16, 16
    num_tiles = triton.cdiv(batch * length, pixels)

    def buffer(*shape):
        return x.new_empty(shape, dtype=accumulator)

    delta = buffer(directions, batch, height, width, dim)
    states = buffer(2, directions, batch, num_chunks, dstate, dim)
    delta_sums = buffer(directions, batch, num_chunks, dim)
    # The partial sums of dW come when the inner states are done with.
    inner_shape = directions, batch, num_chunks, num_subchunks, dstate, dim
    dW_shape = directions, num_tiles, dim, rank
    scratch = buffer(max(math.prod(inner_shape), math.prod(dW_shape)))
    inner_states = scratch[: math.prod(inner_shape)]
    dW_parts = scratch[: math.prod(dW_shape)].view(dW_shape)
    inner_sums = buffer(directions, batch, num_chunks, num_subchunks, dim)
    dBC_parts = buffer(sweep_blocks, directions, batch, length, 2 * dstate)
    dA_parts = buffer(directions, batch * num_chunks, dstate, dim)
    dD_parts = buffer(batch * num_chunks, dim)
    dbias_parts = buffer(directions, num_tiles, dim)
    dx = torch.empty_like(x)
    dx_sum = dx
    if directions > 1 or x.dtype != accumulator:
        dx_sum = buffer(directions, *x.shape)
    dx_dbl = torch.empty_like(x_dbl)
    dW = torch.empty_like(dt_projs_weight)
    dbias = torch.empty_like(dt_projs_bias)
    dA_logs = torch.empty_like(A_logs)

    sizes = height, width, chunk_size, num_chunks, num_subchunks
    inputs = x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs
    with torch.cuda.device_of(x):
        for k in range(0, 4, directions):
            _adjoint_state_kernel[(blocks, num_chunks, directions * batch)](
                dy, *inputs, delta, *states, delta_sums, inner_states, inner_sums, dD_parts,
                *sizes, k, DIRECTIONS=directions, SUBSTEPS=SUBCHUNK, STEPS=ADJOINT_GROUP,
                WITH_DD=k == 0, **walk,
            )  # fmt: skip
            _carry(A_logs, states, delta_sums, k, walk)
            _sweep_kernel[(sweep_blocks, num_chunks, directions * batch)](
                dy, x, x_dbl, A_logs, Ds, delta, *states, inner_states, inner_sums, dx_sum, dx,
                dBC_parts, dA_parts, *sizes, k, DIRECTIONS=directions,
                BEGINS=k == 0, ENDS=directions == 1 and k == 3, **sweep,
            )  # fmt: skip
            _projection_kernel[(num_tiles, directions)](
                delta,
                x_dbl,
                dt_projs_weight,
                dt_projs_bias,
                dBC_parts,
                dx_dbl,
                dW_parts,
                dbias_parts,
                batch * length,
                k,
                DIM=dim,
                DSTATE=dstate,
                RANK=rank,
                CHANNELS=channels,
                PADDED_DSTATE=walk["PADDED_DSTATE"],
                PADDED_RANK=max(16, walk["PADDED_RANK"]),
                PIXELS=pixels,
                NUM_PARTS=sweep_blocks,
                ACC=walk["ACC"],
                num_warps=4,
            )
            done = slice(k, k + directions)
            torch.sum(dW_parts, 1, out=dW[done])
            torch.sum(dbias_parts, 1, out=dbias[done])
            dA = dA_parts.sum(1).transpose(1, 2)
            dA_logs.view(4, dim, dstate)[done] = dA
        if directions > 1:
            torch.sum(dx_sum, 0, out=dx, dtype=x.dtype)
    dDs = dD_parts.sum(0).repeat(4)
    return dx, dx_dbl, dW, dbias, dA_logs, dDs
