"""The forward kernels of the four-direction scan; `kernels.scan_triton` launches them.

Delta is kept in bits here, times log2(e), because the hardware's exponential has base 2. What turns
it back is a factor of B.
"""

# Triton compiles no conditional expressions on pointers, and no `and` of what is known and what is
# not before the kernel runs.
# ruff: noqa: SIM102, SIM108

import triton.language as tl

from kernels.scan_triton_parts import (
    LN_2,
    LOG2_E,
    SIZES,
    both,
    channels_states_ranks,
    chunk_of,
    exp2,
    exp2_of_minus,
    fetch_channels,
    fetch_group,
    first_pixel,
    gl,
    jit,
    load_direction,
    next_group,
    powers,
    row_buffers,
    softplus_in_bits,
    store_group,
    zeros_like,
)


@jit
def _load_direction(
    dt_projs_weight, dt_projs_bias, A_logs, k, o_c, o_n, o_r, META: tl.constexpr
):  # fmt: skip
    """The parameters of direction k for delta in bits: W (R, CH), bias (CH), A (N, CH)."""
    b_W, b_bias, b_A = load_direction(
        dt_projs_weight, dt_projs_bias, A_logs, k, o_c, o_n, o_r, META
    )
    return b_W * LOG2_E, b_bias * LOG2_E, b_A * LN_2


@jit
def _sum_from(b_first, b_x, b_y, o_i):
    """b_first (CH) + the sum of b_x b_y over their first axis, of which o_i are the indices.

    The compiler knows the indices, where a thread owns all, and fuses b_first with the product
    that it is added to.
    """
    b_xy = b_x * b_y
    return gl.sum(gl.where(o_i[:, None] == 0, b_xy + b_first[None, :], b_xy), axis=0)


@jit
def _project(rs, t, direction, o_r, num_left, MASKED: tl.constexpr, META: tl.constexpr):
    """Delta in bits at position t of a group; from the num_left-th on 0, which keeps the state."""
    b_W, b_bias, _ = direction
    b_z = _sum_from(b_bias, rs.slice(t, 1, 1).load(META.LAYOUT), b_W, o_r)
    if MASKED:
        return gl.where(t < num_left, softplus_in_bits(b_z), 0.0)
    else:
        return softplus_in_bits(b_z)


@jit
def _fetch(p_r, p_x, m_c, walk, num_left, META: tl.constexpr):
    o_pixels, walk = next_group(walk, num_left, META.STEPS)
    b_rs, b_Bs, b_Cs = fetch_group(p_r, o_pixels, META)
    b_xs = fetch_channels(p_x, o_pixels, m_c, META)
    return o_pixels, walk, (b_rs, b_Bs * LN_2, b_Cs), b_xs


@jit
def _add_group(
    b_h, b_sum, b_xs, buffers, direction, o_n, o_r, num_left, MASKED: tl.constexpr,
    META: tl.constexpr,
):  # fmt: skip
    """Add STEPS positions, the last one first, to the state at the end of their chunk.

    b_sum is the sum of delta from the position after them to the end of the chunk.
    """
    rs, Bs, _ = buffers
    STEPS: tl.constexpr = META.STEPS
    for t in gl.static_range(STEPS):
        b_delta = _project(rs, t, direction, o_r, num_left, MASKED, META)
        b_B = Bs.slice(t, 1, 1).load(META.LAYOUT)
        b_u = b_delta * b_xs[t]
        if META.FIXED_A:
            b_r = exp2_of_minus(b_sum)
            b_a = powers((b_u * b_r)[None, :], b_r[None, :], o_n[:, None], META.PADDED_DSTATE)
        else:
            b_a = exp2(direction[2] * b_sum[None, :]) * b_u[None, :]
        b_h += b_B * b_a
        b_sum += b_delta
    return b_h, b_sum


@jit(do_not_specialize=SIZES)
def chunk_state_kernel(
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
    META: tl.constexpr,  # a `Walk`
):
    """The state that each chunk but the last adds, and its sum of delta.

    Walked from behind, a chunk needs no state: with the sum of delta from a position to the end,
    what the position adds there is known at once. B then multiplies the powers of a decay that
    have delta x as a factor already, one product less for each state than a recurrence needs.
    """
    STEPS: tl.constexpr = META.STEPS
    NUM_BLOCKS: tl.constexpr = (META.DIM + META.CHANNELS - 1) // META.CHANNELS
    i_block = gl.program_id(0) % NUM_BLOCKS
    k = gl.program_id(0) // NUM_BLOCKS
    i_chunk = gl.program_id(1)
    i_b = gl.program_id(2).to(gl.int64)
    length = height * width

    start, count = chunk_of(i_chunk, k, chunk_size, num_chunks, length)
    walk = first_pixel(length - start - count, (k + 2) % 4, height, width)

    o_c, o_n, o_r = channels_states_ranks(i_block, META)
    m_c = o_c < META.DIM
    direction = _load_direction(dt_projs_weight, dt_projs_bias, A_logs, k, o_c, o_n, o_r, META)
    ROW: tl.constexpr = META.RANK + 2 * META.DSTATE
    p_x = x + i_b * length * META.DIM + o_c
    p_r = x_dbl + i_b * length * (4 * ROW) + k * ROW
    buffers = row_buffers(META)

    b_sum = zeros_like(o_c).to(META.ACC)  # [CH]
    b_h = zeros_like(o_n[:, None] + o_c[None, :]).to(META.ACC)  # [N, CH]
    _, walk, b_rows, b_xs = _fetch(p_r, p_x, m_c, walk, count, META)
    whole = count // STEPS * STEPS
    for i in range(0, whole, STEPS):
        buffers[0].store(b_rows[0])
        buffers[1].store(b_rows[1])
        _, walk, b_rows, b_nexts = _fetch(p_r, p_x, m_c, walk, count - i - STEPS, META)
        b_h, b_sum = _add_group(b_h, b_sum, b_xs, buffers, direction, o_n, o_r, STEPS, False, META)
        b_xs = b_nexts
    if whole < count:
        buffers[0].store(b_rows[0])
        buffers[1].store(b_rows[1])
        b_h, b_sum = _add_group(
            b_h, b_sum, b_xs, buffers, direction, o_n, o_r, count - whole, True, META
        )

    i_slot = (k * gl.num_programs(2) + i_b) * num_chunks + i_chunk
    gl.store(delta_sums + i_slot * META.DIM + o_c, b_sum * LN_2, mask=m_c)
    p_states = (
        states + (i_slot + 1) * (META.DSTATE * META.DIM) + o_n[:, None] * META.DIM + o_c[None, :]
    )
    gl.store(p_states, b_h, mask=(o_n < META.DSTATE)[:, None] & m_c[None, :])


@jit
def _scan_group(
    y, p_y, o_pixels, b_h, b_xs, b_ys, buffers, direction, b_D, o_c, o_n, o_r, num_left,
    BEGINS: tl.constexpr, MASKED: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Scan STEPS positions from the state b_h, write what they add to y, and return the state."""
    STEPS: tl.constexpr = META.STEPS
    rs, Bs, Cs = buffers
    for t in gl.static_range(STEPS):
        b_delta = _project(rs, t, direction, o_r, num_left, MASKED, META)
        b_B = Bs.slice(t, 1, 1).load(META.LAYOUT)
        b_C = Cs.slice(t, 1, 1).load(META.LAYOUT)
        if META.FIXED_A:
            b_r = exp2_of_minus(b_delta)[None, :]
            b_a = powers(b_r, b_r, o_n[:, None], META.PADDED_DSTATE)
        else:
            b_a = exp2(direction[2] * b_delta[None, :])
        b_h = b_a * b_h + b_B * (b_delta * b_xs[t])[None, :]
        if BEGINS:
            b_y = b_D * b_xs[t]
        else:
            b_y = b_ys[t]
        b_y = _sum_from(b_y, b_C, b_h, o_n)
        m_t = o_c < META.DIM
        if MASKED:
            m_t = both(m_t, t < num_left)
        gl.store(p_y + o_pixels[t] * META.DIM, b_y.to(y.dtype.element_ty), mask=m_t)
    return b_h


@jit
def _scan(
    x, x_dbl, y_sum, y, b_h, direction, b_D, i_b, start, count, k, height, width, o_c, o_n, o_r,
    buffers, BEGINS: tl.constexpr, META: tl.constexpr, chunks=None, KEEPS: tl.constexpr = False,
):  # fmt: skip
    """Write y_sum plus the outputs of direction k to y, for `count` positions from `start`.

    With KEEPS it writes the state on entering each chunk: `chunks` are where that of chunk 0 goes,
    the mask of states and channels, and size and number of chunks, which begin where groups do.

    Returns the state after the last one.
    """
    STEPS: tl.constexpr = META.STEPS
    ROW: tl.constexpr = META.RANK + 2 * META.DSTATE
    m_c = o_c < META.DIM
    o_image = i_b * height * width
    p_x = x + o_image * META.DIM + o_c
    p_sum = y_sum + o_image * META.DIM + o_c
    p_y = y + o_image * META.DIM + o_c
    p_r = x_dbl + o_image * (4 * ROW) + k * ROW
    walk = first_pixel(start, k, height, width)
    o_pixels, walk, b_rows, b_xs = _fetch(p_r, p_x, m_c, walk, count, META)
    b_ys = b_xs
    if not BEGINS:
        b_ys = fetch_channels(p_sum, o_pixels, m_c, META)
    if KEEPS:
        p_kept, m_nc, chunk_size, num_chunks = chunks
        missing = gl.where(k >= 2, num_chunks * chunk_size - height * width, 0)
        i_chunk = (start + missing) // chunk_size
        i_chunk += (gl.maximum(i_chunk * chunk_size - missing, 0) < start).to(gl.int32)
        next_kept = gl.maximum(i_chunk * chunk_size - missing, 0)
    whole = count // STEPS * STEPS
    for i in range(0, whole, STEPS):
        if KEEPS:
            if start + i == next_kept:
                gl.store(p_kept + i_chunk * (META.DSTATE * META.DIM), b_h, mask=m_nc)
                i_chunk += 1
                next_kept = i_chunk * chunk_size - missing
        store_group(buffers, b_rows)
        o_nexts, walk, b_rows, b_next_xs = _fetch(p_r, p_x, m_c, walk, count - i - STEPS, META)
        b_next_ys = b_next_xs
        if not BEGINS:
            b_next_ys = fetch_channels(p_sum, o_nexts, m_c, META)
        b_h = _scan_group(
            y, p_y, o_pixels, b_h, b_xs, b_ys, buffers, direction, b_D, o_c, o_n, o_r, STEPS,
            BEGINS, False, META,
        )  # fmt: skip
        o_pixels = o_nexts
        b_xs = b_next_xs
        b_ys = b_next_ys
    if whole < count:
        store_group(buffers, b_rows)
        b_h = _scan_group(
            y, p_y, o_pixels, b_h, b_xs, b_ys, buffers, direction, b_D, o_c, o_n, o_r,
            count - whole, BEGINS, True, META,
        )  # fmt: skip
    return b_h


@jit
def _load_D(Ds, o_c, mask, META: tl.constexpr):
    """The sum of D over the directions."""
    b_D = zeros_like(o_c).to(META.ACC)
    for i in gl.static_range(4):
        b_D += gl.load(Ds + i * META.DIM + o_c, mask=mask, other=0.0).to(META.ACC)
    return b_D


@jit(do_not_specialize=SIZES)
def output_kernel(
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
    META: tl.constexpr,  # a `Walk`
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

    o_c, o_n, o_r = channels_states_ranks(i_block, META)
    m_c = o_c < META.DIM
    batch = gl.num_programs(2)
    p_states = states + o_n[:, None] * META.DIM + o_c[None, :]
    m_nc = (o_n < META.DSTATE)[:, None] & m_c[None, :]
    b_D = zeros_like(o_c).to(META.ACC)
    if ORDER == 0:
        b_D = _load_D(Ds, o_c, m_c, META)
    buffers = row_buffers(META)

    # Forwards.
    direction = _load_direction(dt_projs_weight, dt_projs_bias, A_logs, ORDER, o_c, o_n, o_r, META)
    o_states = ((ORDER * batch + i_b) * num_chunks + i_chunk) * (META.DSTATE * META.DIM)
    b_h = gl.load(p_states + o_states, mask=m_nc, other=0.0)  # [N, CH]
    _scan(
        x, x_dbl, y_sum, y_sum, b_h, direction, b_D, i_b, first, count, ORDER, height, width,
        o_c, o_n, o_r, buffers, ORDER == 0, META,
    )  # fmt: skip

    # And back.
    direction = _load_direction(
        dt_projs_weight, dt_projs_bias, A_logs, ORDER + 2, o_c, o_n, o_r, META
    )
    i_slot = ((ORDER + 2) * batch + i_b + 1) * num_chunks - 1 - i_chunk
    b_h = gl.load(p_states + i_slot * (META.DSTATE * META.DIM), mask=m_nc, other=0.0)
    if ORDER == 0:
        p_out = y_sum
    else:
        p_out = y
    _scan(
        x, x_dbl, y_sum, p_out, b_h, direction, b_D, i_b, length - first - count, count,
        ORDER + 2, height, width, o_c, o_n, o_r, buffers, False, META,
    )  # fmt: skip


@jit(do_not_specialize=SIZES)
def half_kernel(
    x,  # (batch, height, width, DIM)
    x_dbl,  # (batch, height, width, 4, RANK + 2 * DSTATE)
    dt_projs_weight,  # (4, DIM, RANK)
    dt_projs_bias,  # (4, DIM)
    A_logs,  # (4 * DIM, DSTATE)
    Ds,  # (4 * DIM)
    states,  # (4, batch, DSTATE, DIM): between the halves
    y_parts,  # (2, batch, height, width, DIM): along rows, and along columns
    kept,  # (4, batch, num_chunks, DSTATE, DIM): on entering each chunk, where KEEPS
    height,
    width,
    chunk_size,
    num_chunks,
    IS_SECOND: tl.constexpr,
    KEEPS: tl.constexpr,
    META: tl.constexpr,  # a `Walk`
):
    """One half of all directions at the same time, each in one go.

    A direction and its reverse share a part of y. Their first halves write each its half of the
    pixels, and their second halves, in another launch, add to what the other has written.

    States are kept on request only for maps of a length, and for chunks of a size, that are
    multiples of STEPS.
    """
    NUM_BLOCKS: tl.constexpr = (META.DIM + META.CHANNELS - 1) // META.CHANNELS
    STEPS: tl.constexpr = META.STEPS
    i_block = gl.program_id(0) % NUM_BLOCKS
    k = gl.program_id(0) // NUM_BLOCKS
    i_b = gl.program_id(1).to(gl.int64)
    length = height * width
    half = length // 2 // STEPS * STEPS
    count = gl.where(k >= 2, length - half, half)
    start = 0
    if IS_SECOND:
        start = count
        count = length - count

    o_c, o_n, o_r = channels_states_ranks(i_block, META)
    m_c = o_c < META.DIM
    m_nc = (o_n < META.DSTATE)[:, None] & m_c[None, :]
    b_D = zeros_like(o_c).to(META.ACC)
    if not IS_SECOND:
        b_D = _load_D(Ds, o_c, both(m_c, k % 2 == 0), META)
    direction = _load_direction(dt_projs_weight, dt_projs_bias, A_logs, k, o_c, o_n, o_r, META)
    i_row = k * gl.num_programs(1) + i_b
    o_nc = o_n[:, None] * META.DIM + o_c[None, :]
    p_states = states + i_row * (META.DSTATE * META.DIM) + o_nc
    chunks = None
    if KEEPS:
        p_kept = kept + i_row * num_chunks * (META.DSTATE * META.DIM) + o_nc
        chunks = (p_kept, m_nc, chunk_size, num_chunks)
    b_h = zeros_like(o_n[:, None] + o_c[None, :]).to(META.ACC)  # [N, CH]
    if IS_SECOND:
        b_h = gl.load(p_states, mask=m_nc, other=0.0)
    buffers = row_buffers(META)
    p_part = y_parts + (k % 2) * gl.num_programs(1).to(gl.int64) * length * META.DIM
    b_h = _scan(
        x, x_dbl, p_part, p_part, b_h, direction, b_D, i_b, start, count, k, height, width,
        o_c, o_n, o_r, buffers, not IS_SECOND, META, chunks, KEEPS,
    )  # fmt: skip
    if not IS_SECOND:
        gl.store(p_states, b_h, mask=m_nc)
