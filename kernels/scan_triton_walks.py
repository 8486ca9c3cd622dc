"""The backward walks of the four-direction scan where A is fixed; `kernels.scan_triton` launches.

Once the state and the adjoint that enter each chunk are known, one walk along the order finds all
that depends on the states, and one from behind all that depends on the adjoints. Neither keeps
or computes again what the other one works with: what the decays pass on to the gradient of delta,
sum_n (n + 1) g a h_{t-1}, which needs both, is a sum over later positions of products with one of
them (`adjoint_walk_kernel`).
"""

# Triton compiles no starred tuples.

from typing import NamedTuple

import triton.language as tl

from kernels.scan_triton_parts import (
    INTERPRETED,
    SIZES,
    SharedMemory,
    arange,
    both,
    chunk_of,
    decays,
    fetch_channels,
    fetch_rows,
    first_pixel,
    gl,
    grid,
    jit,
    next_group,
    sigmoid_of,
    zeros_like,
)

# exp(-delta) from here on is below half a unit in the last place of 1: nothing is remembered.
FORGETS = tl.constexpr(17.0)


class Strip(NamedTuple):
    """The constants of kernels in which a warp owns all states of 32 CHANNELS channels.

    Layouts are None in the interpreter. L stands for the lanes.
    """

    DIM: int
    DSTATE: int
    RANK: int
    CHANNELS: int  # of a thread
    PADDED_DSTATE: int
    STEPS: int  # positions of which the inputs are fetched, and the sums over channels made
    ACC: tl.dtype  # of states and sums
    LAYOUT: object  # [N, L, CH]
    BY_STATE: object  # [N], as it lies in LAYOUT
    BY_LANE: object  # [N, L], as it lies in LAYOUT
    BY_CHANNEL: object  # [L, CH], as it lies in LAYOUT
    FETCH_N: object  # [N, STEPS]
    SHARED: object  # of the same in shared memory
    SUMS: object  # [N, L], in which a thread owns many lanes of few states
    BY_SUM: object  # [N], as it lies in SUMS
    SHARED_SUMS: object  # of the same in shared memory


@jit
def _strip(i_block, META: tl.constexpr):
    """The states and the channels of a program, and their numbers in a buffer (DSTATE, DIM)."""
    o_n = arange(META.PADDED_DSTATE, META.BY_STATE)
    o_c = i_block * (32 * META.CHANNELS) + grid(32, META.CHANNELS, META.BY_CHANNEL)
    m_c = o_c < META.DIM
    o_nc = o_n[:, None, None] * META.DIM + o_c[None, :, :]
    m_nc = (o_n < META.DSTATE)[:, None, None] & m_c[None, :, :]
    return o_n, o_c, m_c, o_nc, m_nc


@jit
def _fetch_group(pointers, o_pixels, m_c, META: tl.constexpr):
    """B, C, x, dy and delta at the pixels of a group."""
    p_BC, p_x, p_dy, p_delta = pointers
    DSTATE: tl.constexpr = META.DSTATE
    b_Bs = fetch_rows(p_BC, o_pixels, DSTATE, META.PADDED_DSTATE, META.FETCH_N, META)
    b_Cs = fetch_rows(p_BC + DSTATE, o_pixels, DSTATE, META.PADDED_DSTATE, META.FETCH_N, META)
    b_xs = fetch_channels(p_x, o_pixels, m_c, META)
    b_dys = fetch_channels(p_dy, o_pixels, m_c, META)
    b_deltas = fetch_channels(p_delta, o_pixels, m_c, META)
    return b_Bs, b_Cs, b_xs, b_dys, b_deltas


@jit
def _halves_of_states(b_x):
    shape: tl.constexpr = b_x.shape
    b_x = gl.reshape(b_x, [2, shape[0] // 2, shape[1], shape[2]])
    return gl.split(gl.permute(b_x, [1, 2, 3, 0]))


@jit
def _halve(b_xs, LEVEL: tl.constexpr):
    NUMBER: tl.constexpr = 1 << LEVEL
    b_halves = ()
    for j in gl.static_range(NUMBER):
        b_halves = b_halves + _halves_of_states(b_xs[j])
    return b_halves


@jit
def _each(b_x, NUMBER: tl.constexpr):
    """The NUMBER slices of [NUMBER, L, CH], a power of 2, in bit-reversed order."""
    b_xs = (b_x,)
    for i in gl.static_range(16):
        if (1 << i) < NUMBER:
            b_xs = _halve(b_xs, i)
    return b_xs


@jit
def _sum_over_states(b_x, b_y, META: tl.constexpr):
    """sum_n x y, x [N, L, CH] and y broadcast to it: [L, CH], by one multiply-add for each state.

    A sum of products would be a tree, half of whose additions come on top.
    """
    N: tl.constexpr = META.PADDED_DSTATE
    b_x, b_y = gl.broadcast(b_x, b_y)
    b_xs = _each(b_x, N)
    b_ys = _each(b_y, N)
    b_sum = b_xs[0] * b_ys[0]
    for j in gl.static_range(1, N):
        b_sum = b_xs[j] * b_ys[j] + b_sum
    b_sum = gl.reshape(b_sum, [32, META.CHANNELS])
    if INTERPRETED:
        return b_sum
    else:
        return gl.convert_layout(b_sum, META.BY_CHANNEL)


@jit
def _store_sums(sums, p_sums, o_pixels, num_left, META: tl.constexpr):
    """Add the lanes, and write what each of the STEPS positions of a group has come to."""
    STEPS: tl.constexpr = META.STEPS
    o_n = arange(META.PADDED_DSTATE, META.BY_SUM)
    for t in gl.static_range(STEPS):
        b_sum = gl.sum(sums.index(t).load(META.SUMS), axis=1)
        p_sum = p_sums + o_pixels[t] * (2 * META.DSTATE) + o_n
        gl.store(p_sum, b_sum, mask=both(o_n < META.DSTATE, t < num_left))


@jit(do_not_specialize=SIZES)
def state_walk_kernel(
    dy,  # (batch, height, width, DIM)
    x,  # (batch, height, width, DIM)
    x_dbl,  # (batch, height, width, 4, RANK + 2 * DSTATE)
    delta,  # (DIRECTIONS, batch, height, width, DIM)
    states,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM): on entering each chunk
    recalled,  # (DIRECTIONS, batch, height, width, DIM)
    dBC_parts,  # (blocks of channels, DIRECTIONS, batch, height, width, 2 * DSTATE)
    height,
    width,
    chunk_size,
    num_chunks,
    k,
    DIRECTIONS: tl.constexpr,
    META: tl.constexpr,  # a `Strip`
):
    """Walk each chunk with its states, for dC = sum_c dy h and `recalled`.

    The latter is dy_t sum_n (n + 1) C_t a_t h_{t-1}: see `adjoint_walk_kernel`.
    """
    STEPS: tl.constexpr = META.STEPS
    DIM: tl.constexpr = META.DIM
    DSTATE: tl.constexpr = META.DSTATE
    ROW: tl.constexpr = META.RANK + 2 * DSTATE
    i_block = gl.program_id(0)
    i_chunk = gl.program_id(1)
    batch = gl.num_programs(2) // DIRECTIONS
    i_row = gl.program_id(2).to(gl.int64)
    i_b = i_row % batch
    k += gl.program_id(2) // batch
    length = height * width
    start, count = chunk_of(i_chunk, k, chunk_size, num_chunks, length)

    o_n, o_c, m_c, o_nc, m_nc = _strip(i_block, META)
    b_weights = (o_n + 1)[:, None, None].to(META.ACC)
    o_image = i_b * length * DIM
    p_BC = x_dbl + i_b * length * (4 * ROW) + k * ROW + META.RANK
    o_row = i_row * length * DIM + o_c
    pointers = (p_BC, x + o_image + o_c, dy + o_image + o_c, delta + o_row)
    p_recalled = recalled + o_row
    p_dC = dBC_parts + (i_block * gl.num_programs(2) + i_row) * length * (2 * DSTATE) + DSTATE
    Bs = SharedMemory(META.ACC, [META.PADDED_DSTATE, STEPS], META.SHARED)
    Cs = SharedMemory(META.ACC, [META.PADDED_DSTATE, STEPS], META.SHARED)
    sums = SharedMemory(META.ACC, [STEPS, META.PADDED_DSTATE, 32], META.SHARED_SUMS)

    p_state = states + (i_row * num_chunks + i_chunk) * (DSTATE * DIM) + o_nc
    b_h = gl.load(p_state, mask=m_nc, other=0.0)
    walk = first_pixel(start, k, height, width)
    o_pixels, walk = next_group(walk, count, STEPS)
    b_group = _fetch_group(pointers, o_pixels, m_c, META)
    for i in range(0, count, STEPS):
        b_Bs, b_Cs, b_xs, b_dys, b_deltas = b_group
        Bs.store(b_Bs)
        Cs.store(b_Cs)
        o_nexts, walk = next_group(walk, count - i - STEPS, STEPS)
        b_group = _fetch_group(pointers, o_nexts, m_c, META)
        for t in gl.static_range(STEPS):
            b_B = Bs.slice(t, 1, 1).load(META.BY_LANE)[:, :, None]
            b_C = Cs.slice(t, 1, 1).load(META.BY_LANE)[:, :, None]
            b_delta = b_deltas[t]
            b_a = decays(b_delta[None, :, :], 0.0, o_n[:, None, None], True, META.PADDED_DSTATE)
            b_ah = b_a * b_h
            b_h = b_ah + b_B * (b_delta * b_xs[t])[None, :, :]
            b_recalled = b_dys[t] * _sum_over_states(b_ah, b_C * b_weights, META)
            m_t = both(m_c, i + t < count)
            gl.store(p_recalled + o_pixels[t] * DIM, b_recalled, mask=m_t)
            sums.index(t).store(gl.sum(b_h * b_dys[t][None, :, :], axis=2))
        _store_sums(sums, p_dC, o_pixels, count - i, META)
        o_pixels = o_nexts


@jit(do_not_specialize=SIZES)
def adjoint_walk_kernel(
    dy,  # (batch, height, width, DIM)
    x,  # (batch, height, width, DIM)
    x_dbl,  # (batch, height, width, 4, RANK + 2 * DSTATE)
    Ds,  # (4 * DIM)
    delta,  # (DIRECTIONS, batch, height, width, DIM)
    dz,  # the gradient of what is before delta's softplus, which it replaces: the same memory
    states,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM): on entering each chunk
    adjoints,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM): on entering each chunk from behind
    recalled,  # (DIRECTIONS, batch, height, width, DIM)
    dx_sum,  # (DIRECTIONS, batch, height, width, DIM), accumulates over launches; may be dx
    dx,  # (batch, height, width, DIM), written by the last direction
    dBC_parts,  # (blocks of channels, DIRECTIONS, batch, height, width, 2 * DSTATE)
    height,
    width,
    chunk_size,
    num_chunks,
    k,
    DIRECTIONS: tl.constexpr,
    BEGINS: tl.constexpr,
    ENDS: tl.constexpr,
    META: tl.constexpr,  # a `Strip`
):
    """Walk each chunk from behind with the adjoint g of the state, for all but dC.

    g_t = C_t dy_t + a_{t+1} g_{t+1} with, per step, dx = sum_n g B delta + D dy, dB = sum_c g delta
    x and d(delta) = x sum_n g B - e_t. In e_t = sum_n (n + 1) g_t a_t h_{t-1} adjoint and state
    meet. Putting the recurrences of both in gives

        e_t = e_{t+1} + dy_t sum_n (n + 1) C_t a_t h_{t-1}
                      - delta_t x_t sum_n (n + 1) B_t a_{t+1} g_{t+1}

    in which they do not: the first sum comes from the walk with the states, the second from this
    one, and e is known where a chunk ends. Both sums leave out what would cancel between them, and
    e starts anew where delta is so large that nothing is remembered, so that rounding stays where
    it arises: in trained networks delta goes from 1e-4 to 400.
    """
    STEPS: tl.constexpr = META.STEPS
    DIM: tl.constexpr = META.DIM
    DSTATE: tl.constexpr = META.DSTATE
    ROW: tl.constexpr = META.RANK + 2 * DSTATE
    i_block = gl.program_id(0)
    i_chunk = gl.program_id(1)
    batch = gl.num_programs(2) // DIRECTIONS
    i_row = gl.program_id(2).to(gl.int64)
    i_b = i_row % batch
    k += gl.program_id(2) // batch
    length = height * width
    start, count = chunk_of(i_chunk, k, chunk_size, num_chunks, length)

    o_n, o_c, m_c, o_nc, m_nc = _strip(i_block, META)
    b_weights = (o_n + 1)[:, None, None].to(META.ACC)
    o_image = i_b * length * DIM
    p_BC = x_dbl + i_b * length * (4 * ROW) + k * ROW + META.RANK
    o_row = i_row * length * DIM + o_c
    p_dz = dz + o_row
    pointers = (p_BC, x + o_image + o_c, dy + o_image + o_c, delta + o_row)
    p_recalled = recalled + o_row
    p_dx_sum = dx_sum + o_row
    p_dx = dx + o_image + o_c
    p_dB = dBC_parts + (i_block * gl.num_programs(2) + i_row) * length * (2 * DSTATE)
    if BEGINS:
        b_D = zeros_like(o_c).to(META.ACC)
        for j in gl.static_range(4):
            b_D += gl.load(Ds + j * DIM + o_c, mask=both(m_c, k == 0), other=0.0).to(META.ACC)
    Bs = SharedMemory(META.ACC, [META.PADDED_DSTATE, STEPS], META.SHARED)
    Cs = SharedMemory(META.ACC, [META.PADDED_DSTATE, STEPS], META.SHARED)
    sums = SharedMemory(META.ACC, [STEPS, META.PADDED_DSTATE, 32], META.SHARED_SUMS)

    i_slot = i_row * num_chunks + i_chunk
    b_ag = gl.load(adjoints + i_slot * (DSTATE * DIM) + o_nc, mask=m_nc, other=0.0)
    m_last = both(m_nc, i_chunk + 1 < num_chunks)
    b_h = gl.load(states + (i_slot + 1) * (DSTATE * DIM) + o_nc, mask=m_last, other=0.0)
    b_e = gl.sum(b_ag * b_h * b_weights, axis=0)

    # Order k from behind is order k + 2, or k - 2.
    walk = first_pixel(length - start - count, (k + 2) % 4, height, width)
    o_pixels, walk = next_group(walk, count, STEPS)
    b_group = _fetch_group(pointers, o_pixels, m_c, META)
    b_recalls = fetch_channels(p_recalled, o_pixels, m_c, META)
    b_dxs = b_recalls
    if not BEGINS:
        b_dxs = fetch_channels(p_dx_sum, o_pixels, m_c, META)
    for i in range(0, count, STEPS):
        b_Bs, b_Cs, b_xs, b_dys, b_deltas = b_group
        Bs.store(b_Bs)
        Cs.store(b_Cs)
        o_nexts, walk = next_group(walk, count - i - STEPS, STEPS)
        b_group = _fetch_group(pointers, o_nexts, m_c, META)
        b_next_recalls = fetch_channels(p_recalled, o_nexts, m_c, META)
        b_next_dxs = b_next_recalls
        if not BEGINS:
            b_next_dxs = fetch_channels(p_dx_sum, o_nexts, m_c, META)
        for t in gl.static_range(STEPS):
            b_B = Bs.slice(t, 1, 1).load(META.BY_LANE)[:, :, None]
            b_C = Cs.slice(t, 1, 1).load(META.BY_LANE)[:, :, None]
            b_x = b_xs[t]
            b_delta = b_deltas[t]
            b_u = b_delta * b_x
            b_e += b_recalls[t] - b_u * _sum_over_states(b_ag, b_B * b_weights, META)
            b_e = gl.where(b_delta < FORGETS, b_e, 0.0)
            b_g = b_ag + b_C * b_dys[t][None, :, :]
            b_gB = _sum_over_states(b_g, b_B, META)
            sums.index(t).store(gl.sum(b_g * b_u[None, :, :], axis=2))
            b_a = decays(b_delta[None, :, :], 0.0, o_n[:, None, None], True, META.PADDED_DSTATE)
            b_ag = b_g * b_a

            b_dz = (b_gB * b_x - b_e) * sigmoid_of(b_delta)
            b_dx = b_gB * b_delta
            if BEGINS:
                b_dx += b_D * b_dys[t]
            else:
                b_dx += b_dxs[t]
            m_t = both(m_c, i + t < count)
            o_pixel = o_pixels[t] * DIM
            gl.store(p_dz + o_pixel, b_dz.to(dz.dtype.element_ty), mask=m_t)
            if ENDS:
                gl.store(p_dx + o_pixel, b_dx.to(dx.dtype.element_ty), mask=m_t)
            else:
                gl.store(p_dx_sum + o_pixel, b_dx, mask=m_t)
        _store_sums(sums, p_dB, o_pixels, count - i, META)
        o_pixels = o_nexts
        b_recalls = b_next_recalls
        b_dxs = b_next_dxs
