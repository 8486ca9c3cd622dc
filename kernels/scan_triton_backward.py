"""The backward kernels of the four-direction scan; `kernels.scan_triton` launches them.

A first walk finds delta, every SUBSTEPS-th state, and what each chunk adds to the state and to the
adjoint. The sweep walks the chunks from behind with the adjoint, and the projection takes the
gradient of delta back to the low-rank input.
"""

# Triton compiles no starred tuples.
# ruff: noqa: RUF005

from typing import NamedTuple

import triton
import triton.language as tl

from kernels.scan_triton_parts import (
    INTERPRETED,
    LN_2,
    LOG2_E,
    SIZES,
    SharedMemory,
    arange,
    both,
    channels_states_ranks,
    chunk_of,
    decays,
    exp2,
    exp2_of_minus,
    fetch_channels,
    fetch_group,
    first_pixel,
    gl,
    grid,
    jit,
    load_direction,
    next_group,
    next_pixel,
    powers,
    project_delta,
    row_buffers,
    sigmoid_of,
    store_group,
    zeros_like,
)

LARGEST_HALF = tl.constexpr(65504.0)  # what a larger delta counts as where it has 16 bits


@jit(do_not_specialize=SIZES)
def adjoint_state_kernel(
    dy,  # (batch, height, width, DIM)
    x,  # (batch, height, width, DIM)
    x_dbl,  # (batch, height, width, 4, RANK + 2 * DSTATE)
    dt_projs_weight,  # (4, DIM, RANK)
    dt_projs_bias,  # (4, DIM)
    A_logs,  # (4 * DIM, DSTATE)
    delta,  # (DIRECTIONS, batch, height, width, DIM), perhaps in float16
    states,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM), of which chunk i + 1 is written, if any
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
    SUBSTEPS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    WITH_STATES: tl.constexpr,
    WITH_DD: tl.constexpr,
    META: tl.constexpr,  # a `Walk`
):
    """Both chunk passes of a direction, k or one after it, in one walk, and delta.

    Without WITH_STATES, for which A has to be fixed, only that of the adjoints.

    With P_t the product of a up to step t of the chunk, the adjoint that leaves the chunk at its
    front is sum_t P_t C_t dy_t: it needs no walk of its own from behind. Where A is fixed, P_t
    comes from the sum of delta.
    """
    STEPS: tl.constexpr = META.STEPS
    ROW: tl.constexpr = META.RANK + 2 * META.DSTATE
    i_block = gl.program_id(0)
    i_chunk = gl.program_id(1)
    batch = gl.num_programs(2) // DIRECTIONS
    i_row = gl.program_id(2).to(gl.int64)
    i_b = i_row % batch
    k += gl.program_id(2) // batch
    length = height * width
    start, count = chunk_of(i_chunk, k, chunk_size, num_chunks, length)

    o_c, o_n, o_r = channels_states_ranks(i_block, META)
    m_c = o_c < META.DIM
    m_nc = (o_n < META.DSTATE)[:, None] & m_c[None, :]
    o_nc = o_n[:, None] * META.DIM + o_c[None, :]
    b_W, b_bias, b_A = load_direction(
        dt_projs_weight, dt_projs_bias, A_logs, k, o_c, o_n, o_r, META
    )
    o_image = i_b * length * META.DIM
    p_x = x + o_image + o_c
    p_dy = dy + o_image + o_c
    p_delta = delta + i_row * length * META.DIM + o_c
    p_r = x_dbl + i_b * length * (4 * ROW) + k * ROW
    i_slot = i_row * num_chunks + i_chunk
    buffers = row_buffers(META)
    rs, Bs, Cs = buffers

    b_h = zeros_like(b_A)  # [N, CH]
    b_P = b_h + 1.0
    b_G = b_h
    b_sum = zeros_like(b_bias)  # [CH]
    b_dD = b_sum
    walk = first_pixel(start, k, height, width)
    o_pixels, walk = next_group(walk, count, STEPS)
    b_rows = fetch_group(p_r, o_pixels, META, WITH_STATES)
    b_dys = fetch_channels(p_dy, o_pixels, m_c, META)
    b_xs = b_dys
    if WITH_STATES or WITH_DD:
        b_xs = fetch_channels(p_x, o_pixels, m_c, META)
    for i in range(0, count, STEPS):
        if SUBSTEPS > 0 and i % SUBSTEPS == 0:
            i_inner = i_slot * num_subchunks + i // SUBSTEPS
            gl.store(inner_states + i_inner * (META.DSTATE * META.DIM) + o_nc, b_h, mask=m_nc)
            gl.store(inner_sums + i_inner * META.DIM + o_c, b_sum, mask=m_c)
        store_group(buffers, b_rows, WITH_STATES)
        o_nexts, walk = next_group(walk, count - i - STEPS, STEPS)
        b_rows = fetch_group(p_r, o_nexts, META, WITH_STATES)
        b_next_dys = fetch_channels(p_dy, o_nexts, m_c, META)
        b_next_xs = b_next_dys
        if WITH_STATES or WITH_DD:
            b_next_xs = fetch_channels(p_x, o_nexts, m_c, META)
        for t in gl.static_range(STEPS):
            # Positions past the end add nothing to the sums.
            is_inside = i + t < count
            b_delta = project_delta(rs.slice(t, 1, 1).load(META.LAYOUT), b_W, b_bias)
            b_delta = gl.where(is_inside, b_delta, 0.0)
            b_dy = gl.where(is_inside, b_dys[t], 0.0)
            b_C = Cs.slice(t, 1, 1).load(META.LAYOUT)
            if WITH_STATES:
                b_B = Bs.slice(t, 1, 1).load(META.LAYOUT)
                b_a = decays(b_delta[None, :], b_A, o_n[:, None], META.FIXED_A, META.PADDED_DSTATE)
                b_h = b_a * b_h + b_B * (b_delta * b_xs[t])[None, :]
            b_sum += b_delta
            if META.FIXED_A:
                # The powers of the whole product have dy as a factor from the first on.
                b_r = exp2_of_minus(b_sum * LOG2_E)
                b_P = powers((b_dy * b_r)[None, :], b_r[None, :], o_n[:, None], META.PADDED_DSTATE)
                b_G = b_C * b_P + b_G
            else:
                b_P = b_P * b_a
                b_G = b_P * (b_C * b_dy[None, :]) + b_G
            if delta.dtype.element_ty == gl.float16:
                b_kept = gl.minimum(b_delta, LARGEST_HALF).to(gl.float16)
            else:
                b_kept = b_delta
            gl.store(p_delta + o_pixels[t] * META.DIM, b_kept, mask=both(m_c, is_inside))
            if WITH_DD:
                b_dD += b_xs[t] * b_dy
        o_pixels = o_nexts
        b_xs = b_next_xs
        b_dys = b_next_dys

    gl.store(delta_sums + i_slot * META.DIM + o_c, b_sum, mask=m_c)
    if WITH_STATES:
        p_states = states + (i_slot + 1) * (META.DSTATE * META.DIM) + o_nc
        gl.store(p_states, b_h, mask=both(m_nc, i_chunk + 1 < num_chunks))
    p_adjoints = adjoints + (i_slot - 1) * (META.DSTATE * META.DIM) + o_nc
    gl.store(p_adjoints, b_G, mask=both(m_nc, i_chunk > 0))
    if WITH_DD:
        # D skips the scan: its gradient comes with direction 0, the same for all.
        gl.store(dD_parts + i_slot * META.DIM + o_c, b_dD, mask=both(m_c, k == 0))


@jit
def _from_lane(b_x, o_axis, BIT: tl.constexpr, LANES: tl.constexpr, AXIS: tl.constexpr):
    """What the lane holds whose index along AXIS, o_axis here, differs in the bit BIT.

    The number of that lane differs in the bit LANES.
    """
    if INTERPRETED:
        return gl.gather(b_x, o_axis ^ BIT, AXIS)
    elif b_x.dtype == gl.float64:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 lo, hi; mov.b64 {lo, hi}, $1; shfl.sync.bfly.b32 lo, lo, $2, 31, -1;"
            " shfl.sync.bfly.b32 hi, hi, $2, 31, -1; mov.b64 $0, {lo, hi}; }",
            "=d,d,r", [b_x, zeros_like(o_axis) + LANES], dtype=gl.float64, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;",
            "=f,f,r", [b_x, zeros_like(o_axis) + LANES], dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@jit
def _fold(b_low, b_high, o_axis, BIT: tl.constexpr, LANES: tl.constexpr, AXIS: tl.constexpr):
    """Add pairs of lanes that differ in BIT: one gets the sum of b_low, the other that of b_high.

    The lane without the bit gets the first. A pair exchanges one value to add two, so sums of many
    values over lanes cost less than one exchange for each value.
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
    """Sum (4, S, 8) over its last axis: (8, 4, REST), as the table of `sweep_kernel` has it."""
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
def _descend(walk, position, end):
    """From `position` to the one before it; those from `end` on count as the last before `end`."""
    pixel, left, line, step, jump = walk
    before = next_pixel(walk)
    is_inside = position < end
    pixel = gl.where(is_inside, before[0], pixel)
    return pixel, gl.where(is_inside, before[1], left), line, step, jump


@jit
def _fetch_tile(
    pointers, masks, walk, position, start, end, STEPS: tl.constexpr, META: tl.constexpr
):
    """The inputs of STEPS positions, from `position` backwards; zeros outside of the chunk."""
    p_x, p_dy, p_delta, p_BC = pointers
    m_c, m_BC = masks
    ROW: tl.constexpr = META.RANK + 2 * META.DSTATE
    b_xs = ()
    b_dys = ()
    b_deltas = ()
    b_BCs = ()
    for u in gl.static_range(STEPS):
        is_inside = (position - u >= start) & (position - u < end)
        o_pixel = gl.where(is_inside, walk[0], 0).to(gl.int64)
        o_x = o_pixel * META.DIM
        m_t = both(m_c, is_inside)
        b_xs = b_xs + (gl.load(p_x + o_x, mask=m_t, other=0.0).to(META.ACC),)
        b_dys = b_dys + (gl.load(p_dy + o_x, mask=m_t, other=0.0).to(META.ACC),)
        b_deltas = b_deltas + (gl.load(p_delta + o_x, mask=m_t, other=0.0),)
        b_BC = gl.load(p_BC + o_pixel * (4 * ROW), mask=both(m_BC, is_inside), other=0.0)
        b_BCs = b_BCs + (b_BC.to(META.ACC),)
        walk = _descend(walk, position - u, end)
    return (b_xs, b_dys, b_deltas, b_BCs), walk


@jit
def _store_tile(buffers, b_tile, last, STEPS: tl.constexpr):
    """Write a tile, its position `last` first, into the rows of x, dy, delta, and B and C."""
    for u in gl.static_range(STEPS):
        for i in gl.static_range(4):
            buffers[i].index(last - u).store(b_tile[i][u])


class Sweep(NamedTuple):
    """The constants of the kernel in which a thread owns a patch of states and channels.

    Layouts are None in the interpreter. See the kernel for what lies where.
    """

    DIM: int
    DSTATE: int
    RANK: int
    S: int  # states of a thread
    REST: int  # sums over channels that a thread ends up with
    SUBSTEPS: int  # positions from one state that is kept in memory to the next
    STEPS: int  # of a tile: from one state that is kept in shared memory to the next
    FETCH: int  # positions of which the inputs are fetched together
    ACC: tl.dtype  # of states and sums
    LAYOUT: object  # [4, S, 8, 4], indexed i, s, j, d
    BY_STATE: object  # [4, S], as it lies in LAYOUT
    BY_CHANNEL: object  # [8, 4], as it lies in LAYOUT
    LANES: object  # [8, 4], one number to a lane
    BY_SUM: object  # [8, 4, REST], the sums over channels
    BY_REST: object  # [REST], as it lies in BY_SUM
    SHARED_ROWS: object  # of the inputs in shared memory
    SHARED_STATES: object  # of the states in shared memory


@jit(do_not_specialize=SIZES)
def sweep_kernel(
    dy,  # (batch, height, width, DIM)
    x,  # (batch, height, width, DIM)
    x_dbl,  # (batch, height, width, 4, RANK + 2 * DSTATE)
    A_logs,  # (4 * DIM, DSTATE)
    Ds,  # (4 * DIM)
    delta,  # (DIRECTIONS, batch, height, width, DIM), replaced by the gradient by z = softplus^-1
    states,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM): on entering each chunk
    adjoints,  # (DIRECTIONS, batch, num_chunks, DSTATE, DIM): on entering each chunk from behind
    inner_states,  # (DIRECTIONS, batch, num_chunks, num_subchunks, DSTATE, DIM)
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
    META: tl.constexpr,  # a `Sweep`
):
    """Walk each chunk from behind with the adjoint g of the state.

    g_t = C_t dy_t + a_{t+1} g_{t+1} with, per step, dx = sum_n g B delta + D dy,
    d(delta) = sum_n g (B x + A a h_{t-1}), dA = sum_t g delta a h_{t-1}, dB = sum_c g delta x
    and dC = sum_c dy h. States are found again from the nearest one kept, never by going back:
    inner_states are those every SUBSTEPS positions of a walk that enters the chunk with zero.

    The inputs of a subchunk lie in shared memory. While it is swept, those of the one before it
    are fetched FETCH positions at a time, into the rows that the sweep has done with.

    A program is one warp with 32 channels. Lane 4 j + i, i from 0 to 3 and j from 0 to 7, holds

        h, g, A      (4, S, 8, 4)  states i S + s, s from 0 to S - 1, of channels 4 j + d, d from 0
                                   to 3; the axes are i, s, j and d
        x, dy, delta (8, 4)        channel 4 j + i
        dB, dC       (8, 4, REST)  dB if j < 4, else dC, of the states i S + s where s begins with
                                   the other two bits of j: s = (j // 2 % 2) S / 2 + (j % 2) S / 4 +
                                   (0 to REST - 1). Where S < 4, several lanes hold the same.
    """
    DIM: tl.constexpr = META.DIM
    DSTATE: tl.constexpr = META.DSTATE
    S: tl.constexpr = META.S
    STEPS: tl.constexpr = META.STEPS
    SUBSTEPS: tl.constexpr = META.SUBSTEPS
    FETCH: tl.constexpr = META.FETCH
    ACC: tl.constexpr = META.ACC
    BY_STATE: tl.constexpr = META.BY_STATE
    BY_CHANNEL: tl.constexpr = META.BY_CHANNEL
    LANES: tl.constexpr = META.LANES
    ROW: tl.constexpr = META.RANK + 2 * DSTATE
    TILES: tl.constexpr = SUBSTEPS // STEPS
    i_block = gl.program_id(0)
    i_chunk = gl.program_id(1)
    batch = gl.num_programs(2) // DIRECTIONS
    i_row = gl.program_id(2).to(gl.int64)
    i_b = i_row % batch
    k += gl.program_id(2) // batch
    length = height * width
    start, count = chunk_of(i_chunk, k, chunk_size, num_chunks, length)
    end = start + count

    o_n = grid(4, S, BY_STATE)
    o_c = i_block * 32 + grid(8, 4, BY_CHANNEL)
    o_nc = o_n[:, :, None, None] * DIM + o_c[None, None, :, :]
    m_nc = (o_n < DSTATE)[:, :, None, None] & (o_c < DIM)[None, None, :, :]
    # The sums over lanes ask every element for its i, in the shape (4, 8, 4), and j, in (4, S, 8).
    o_i = gl.max((o_n // S)[:, :, None, None] + (o_c * 0)[None, None, :, :], axis=1)
    o_j = gl.max((o_n * 0)[:, :, None, None] + (o_c % 32 // 4)[None, None, :, :], axis=3)
    p_A = A_logs + (k * DIM + o_c)[None, None, :, :] * DSTATE + o_n[:, :, None, None]
    b_A = -exp2(gl.load(p_A, mask=m_nc, other=0.0).to(ACC) * LOG2_E) * LOG2_E

    # Inputs and results are read and written with one channel, or one number of B or C, to a lane.
    o_lane = i_block * 32 + grid(8, 4, LANES)
    m_c = o_lane < DIM
    o_image = i_b * length * DIM
    p_x = x + o_image + o_lane
    p_dy = dy + o_image + o_lane
    p_delta = delta + i_row * length * DIM + o_lane
    p_dx_sum = dx_sum + i_row * length * DIM + o_lane
    p_dx = dx + o_image + o_lane
    o_BC = grid(8, S, LANES)
    m_BC = o_BC % (4 * S) < DSTATE
    o_BC = o_BC // (4 * S) * DSTATE + o_BC % (4 * S)
    p_BC = x_dbl + i_b * length * (4 * ROW) + k * ROW + META.RANK + o_BC
    pointers = (p_x, p_dy, p_delta, p_BC)
    masks = (m_c, m_BC)
    if BEGINS:
        b_D = zeros_like(o_lane).to(ACC)
        for i in gl.static_range(4):
            b_D += gl.load(Ds + i * DIM + o_lane, mask=both(m_c, k == 0), other=0.0).to(ACC)

    # Where a lane writes its sums over channels: the table's last row.
    o_ji = grid(8, 4, LANES)
    o_s = o_ji // 8 % 2 * (S // 2) + o_ji // 4 % 2 * (S // 4)
    o_s = o_s[:, :, None] + arange(META.REST, META.BY_REST)[None, None, :]  # (8, 4, REST)
    o_sum = (o_ji % 4 * S)[:, :, None] + o_s
    m_sum = o_sum < DSTATE
    o_sum += (o_ji // 16 * DSTATE)[:, :, None]
    p_dBC = dBC_parts + (i_block * gl.num_programs(2) + i_row) * length * (2 * DSTATE)

    i_slot = i_row * num_chunks + i_chunk
    p_state = states + i_slot * (DSTATE * DIM) + o_nc
    b_g = gl.load(adjoints + i_slot * (DSTATE * DIM) + o_nc, mask=m_nc, other=0.0)
    b_dA = zeros_like(b_A)

    xs = SharedMemory(ACC, [SUBSTEPS, 8, 4], META.SHARED_ROWS)
    dys = SharedMemory(ACC, [SUBSTEPS, 8, 4], META.SHARED_ROWS)
    deltas = SharedMemory(ACC, [SUBSTEPS, 8, 4], META.SHARED_ROWS)
    BCs = SharedMemory(ACC, [SUBSTEPS, 8, S], META.SHARED_ROWS)
    buffers = (xs, dys, deltas, BCs)
    kept = SharedMemory(ACC, [TILES, 4, S, 8, 4], META.SHARED_STATES)

    # Two walks from behind: one fetches a subchunk, the other follows a subchunk later.
    num_inner = (end - start + SUBSTEPS - 1) // SUBSTEPS
    position = start + num_inner * SUBSTEPS - 1
    walk = first_pixel(length - end, (k + 2) % 4, height, width)
    fetch_walk = walk
    for i in range(TILES):
        b_tile, fetch_walk = _fetch_tile(
            pointers, masks, fetch_walk, position - i * STEPS, start, end, STEPS, META
        )
        _store_tile(buffers, b_tile, SUBSTEPS - 1 - i * STEPS, STEPS)

    for i in range(num_inner):
        i_inner = i_slot * num_subchunks + num_inner - 1 - i
        b_h = gl.load(inner_states + i_inner * (DSTATE * DIM) + o_nc, mask=m_nc, other=0.0)
        b_sum = gl.load(inner_sums + i_inner * DIM + o_c, mask=o_c < DIM, other=0.0)
        b_h0 = gl.load(p_state, mask=m_nc, other=0.0)
        b_h += exp2(b_A * b_sum[None, None, :, :]) * b_h0
        for i_tile in range(TILES - 1):
            kept.index(i_tile).store(b_h)
            for t in gl.static_range(STEPS):
                b_delta = deltas.index(i_tile * STEPS + t).load(BY_CHANNEL)
                b_u = b_delta * xs.index(i_tile * STEPS + t).load(BY_CHANNEL)
                b_B = BCs.index(i_tile * STEPS + t).slice(0, 4, 0).load(BY_STATE)
                b_a = exp2(b_A * b_delta[None, None, :, :])
                b_h = b_a * b_h + b_B[:, :, None, None] * b_u[None, None, :, :]
        kept.index(TILES - 1).store(b_h)

        for j in range(TILES):
            i_tile = TILES - 1 - j
            o_pixels = ()
            b_dxs = ()
            for u in gl.static_range(STEPS):
                is_inside = position - u < end
                o_pixel = walk[0].to(gl.int64)
                o_pixels = o_pixels + (o_pixel,)
                if BEGINS:
                    b_dy = dys.index(i_tile * STEPS + STEPS - 1 - u).load(LANES)
                    b_dxs = b_dxs + (b_D * b_dy,)
                else:
                    b_dx = gl.load(p_dx_sum + o_pixel * DIM, mask=both(m_c, is_inside), other=0.0)
                    b_dxs = b_dxs + (b_dx,)
                walk = _descend(walk, position - u, end)

            b_as = ()
            b_hs = (kept.index(i_tile).load(META.LAYOUT),)
            for t in gl.static_range(STEPS):
                # Past the end delta is 0: a is 1 and nothing is added.
                b_delta = deltas.index(i_tile * STEPS + t).load(BY_CHANNEL)
                b_u = b_delta * xs.index(i_tile * STEPS + t).load(BY_CHANNEL)
                b_B = BCs.index(i_tile * STEPS + t).slice(0, 4, 0).load(BY_STATE)
                b_a = exp2(b_A * b_delta[None, None, :, :])
                b_h = b_a * b_hs[t] + b_B[:, :, None, None] * b_u[None, None, :, :]
                b_hs = b_hs + (b_h,)
                b_as = b_as + (b_a,)

            for t in gl.static_range(STEPS - 1, -1, -1):
                row = i_tile * STEPS + t
                if (t + 1) % FETCH == 0:
                    before = position - (STEPS - 1 - t) - SUBSTEPS
                    b_tile, fetch_walk = _fetch_tile(
                        pointers, masks, fetch_walk, before, start, end, FETCH, META
                    )
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
                b_delta = deltas.index(row).load(LANES)
                b_ddelta = b_gB * xs.index(row).load(LANES) + b_ghA * LN_2
                b_dx = b_dxs[STEPS - 1 - t] + b_gB * b_delta
                b_dBC = _sum_over_channels(b_dB, b_dC, o_j, META.BY_SUM)  # (8, 4, REST)
                is_inside = position - (STEPS - 1 - t) < end
                o_pixel = o_pixels[STEPS - 1 - t]
                m_t = both(m_c, is_inside)
                if ENDS:
                    gl.store(p_dx + o_pixel * DIM, b_dx.to(dx.dtype.element_ty), mask=m_t)
                else:
                    gl.store(p_dx_sum + o_pixel * DIM, b_dx, mask=m_t)
                gl.store(p_delta + o_pixel * DIM, b_ddelta * sigmoid_of(b_delta), mask=m_t)
                gl.store(p_dBC + o_pixel * (2 * DSTATE) + o_sum, b_dBC, mask=both(m_sum, is_inside))
                if t % FETCH == 0:
                    _store_tile(buffers, b_tile, row + FETCH - 1, FETCH)
            position -= STEPS

    gl.store(dA_parts + i_slot * (DSTATE * DIM) + o_nc, b_dA * b_A * LN_2, mask=m_nc)


@triton.jit(do_not_specialize=SIZES)
def projection_kernel(
    dz,  # (DIRECTIONS, num_rows, DIM)
    x_dbl,  # (num_rows, 4, RANK + 2 * DSTATE)
    dt_projs_weight,  # (4, DIM, RANK)
    dBC_parts,  # (NUM_PARTS, DIRECTIONS, num_rows, 2 * DSTATE)
    dx_dbl,  # (num_rows, 4, RANK + 2 * DSTATE)
    parts,  # (DIRECTIONS, programs, DIM * RANK + DIM): of the gradients by W, then by the bias
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
    PRODUCTS: tl.constexpr,  # as `tl.dot` calls their precision
):
    """Back through z = W r + bias, the projection of delta, to the gradient of a row of x_dbl."""
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
        m_cr = m_c[:, None] & (o_r < RANK)[None, :]
        p_W = dt_projs_weight + (k * DIM + o_c)[:, None] * RANK + o_r[None, :]
        b_W = tl.load(p_W, mask=m_cr, other=0.0).to(ACC)  # [CH, R]
        p_dz = dz + (i_k * num_rows.to(tl.int64) + o_p[:, None]) * DIM + o_c[None, :]
        b_dz = tl.load(p_dz, mask=m_p[:, None] & m_c[None, :], other=0.0).to(ACC)  # [PIXELS, CH]
        b_dr += _dot(b_dz, b_W, PRODUCTS)
        p_parts = parts + (i_k * tl.num_programs(0) + i_p).to(tl.int64) * (DIM * RANK + DIM)
        b_dW = _dot(tl.trans(b_dz), b_r, PRODUCTS)
        tl.store(p_parts + o_c[:, None] * RANK + o_r[None, :], b_dW, mask=m_cr)
        tl.store(p_parts + DIM * RANK + o_c, tl.sum(b_dz, axis=0), mask=m_c)
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
def _dot(b_x, b_y, PRODUCTS: tl.constexpr):
    if b_x.dtype == tl.float64:
        return tl.sum(b_x[:, :, None] * b_y[None, :, :], axis=1)
    else:
        return tl.dot(b_x, b_y, input_precision=PRODUCTS)
