"""Four-direction selective scan on CUDA GPUs, forward and backward, in Triton.

The scan is cut into chunks of consecutive positions. A first launch finds the state in which each
chunk ends when it starts from zero, a short one carries the states over the chunks, and a last
one walks every chunk again from its true first state. All directions read the picture where it
lies: an order of scanning is only a sequence of pixel addresses.

Forward, a thread owns all states of one or two channels, so that the sum over states needs no
exchange. In the backward sweep a thread owns 4 states of 4 channels, which balances the sums over
states against those over channels. What the walks read is fetched a few positions ahead: a step
takes less time than memory does to answer. The numbers that all channels share go through shared
memory, so that the lanes of a warp fetch them together and each thread then reads them all.
"""

# Triton compiles no starred tuples.
# ruff: noqa: RUF005

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends import product_precision
from kernels.scan_reference import ScanInputs
from kernels.scan_triton_backward import (
    Sweep,
    adjoint_state_kernel,
    projection_kernel,
    sweep_kernel,
)
from kernels.scan_triton_forward import chunk_state_kernel, half_kernel, output_kernel
from kernels.scan_triton_parts import (
    INTERPRETED,
    SIZES,
    Walk,
    arange,
    both,
    exp2,
    gl,
    jit,
    load_A,
    zeros_like,
)
from kernels.scan_triton_walks import Strip, adjoint_walk_kernel, state_walk_kernel
from kernels.sum_triton import sum_parts

# Programs per launch, a whole number of waves on the 132 multiprocessors of a Hopper GPU. They
# are constants, not read from the device, so that the same input gives the same bits on any.
FORWARD_PROGRAMS = 1584
BACKWARD_PROGRAMS = 1056
# Warps of a program and channels of a thread, where the number of channels is a multiple of both.
FORWARD_WARPS, FORWARD_CHANNELS = 1, 2
FORWARD_REGISTERS = 168  # of a thread, at most
ADJOINT_WARPS, ADJOINT_CHANNELS = 1, 2
SHORTEST_CHUNK = 32
# In float64 a step takes many times as long, and what the entropy path scans is small: cut as
# finely as this, it makes enough programs for a GPU.
SHORTEST_CHUNK_IN_FLOAT64 = 8
# Elements of x up to which the backward takes all directions at once: fewer launches with fuller
# waves, for 11 to 16 times x in memory.
SMALL_MAP = 1 << 25
# Sequences, by channel, direction and picture, from which on each is walked by one thread in one
# go, and from which on long ones are: they are enough threads then for a GPU, and nothing is
# computed twice.
ONE_PASS_CHANNELS = 12288
LONG, ONE_PASS_CHANNELS_OF_LONG = 2048, 32768
ONE_PASS_CHANNELS_OF_THREAD = 1
ONE_PASS_GROUP = 8
# Positions of which the inputs are fetched together.
FORWARD_GROUP = 4
ADJOINT_GROUP = 4
# Backward: a state is kept in memory every SUBCHUNK positions, in shared memory every TILE, and
# in registers at each position of one TILE. With 24 and 4 a program takes 24 KiB of shared memory
# and as many registers as let 8 run on a multiprocessor.
SUBCHUNK = 24
TILE = 4
SWEEP_FETCH = 1
CARRY_AHEAD = 8
PROJECTION_WARPS = 4

# The backward walks where A is fixed: channels of a thread, where the number of channels is a
# multiple of 32 times as many, and positions fetched together. As many registers as let 12
# programs run on a multiprocessor: memory limits these walks, and needs many of them in flight.
STRIP_CHANNELS = 4
STRIP_GROUP = 1
STRIP_REGISTERS = 168
STRIP_PROGRAMS = 1584
STRIP_UNIT = 16
# Most bytes of states that the forward pass keeps for these walks: as many or twice those of x.
KEPT_BYTES, KEPT_SHARE = 1 << 24, 2


@jit(do_not_specialize=SIZES)
def _carry_kernel(
    A_logs,  # (4 * DIM, DSTATE)
    states,  # (states, adjoints or both, DIRECTIONS, batch, num_chunks, DSTATE, DIM), in place
    delta_sums,  # (DIRECTIONS, batch, num_chunks, DIM)
    num_chunks,
    k,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    WITH_STATES: tl.constexpr,
    WITH_ADJOINTS: tl.constexpr,
    FIXED_A: tl.constexpr,
    ACC: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
):
    """Turn what each chunk adds into the state on entering it, for directions from k on.

    `states` of chunk i holds what the chunk before it added. Adjoints, which come second, are
    carried from the last chunk to the first: there chunk i holds what the chunk after it added.
    """
    i_n = gl.program_id(1)
    i_set = gl.program_id(2)
    num_rows = gl.num_programs(2)
    num_states = num_rows
    if WITH_ADJOINTS:
        if WITH_STATES:
            num_rows = num_rows // 2
            num_states = num_rows
        else:
            num_states = 0
    is_adjoint = i_set >= num_states
    i_row = i_set % num_rows
    o_c = gl.program_id(0) * CHANNELS + arange(CHANNELS, BY_CHANNEL)
    m_c = o_c < DIM
    direction = k + i_row // (num_rows // DIRECTIONS)
    b_A = load_A(A_logs, direction * DIM + o_c, i_n, m_c, FIXED_A, DSTATE, ACC)
    p_states = states + i_set.to(gl.int64) * num_chunks * (DSTATE * DIM) + i_n * DIM + o_c
    p_sums = delta_sums + i_row.to(gl.int64) * num_chunks * DIM + o_c

    b_h = zeros_like(b_A)
    first = gl.where(is_adjoint, num_chunks - 1, 0)
    sign = gl.where(is_adjoint, -1, 1)
    gl.store(p_states + first.to(gl.int64) * (DSTATE * DIM), b_h, mask=m_c)
    for i in range(0, num_chunks - 1, AHEAD):
        b_as = ()
        b_hs = ()
        for j in gl.static_range(AHEAD):
            m_ahead = both(m_c, i + j < num_chunks - 1)
            o_chunk = (first + sign * (i + j)).to(gl.int64)
            b_sum = gl.load(p_sums + o_chunk * DIM, mask=m_ahead, other=0.0)
            b_as = b_as + (exp2(b_A * b_sum),)
            p_next = p_states + (o_chunk + sign) * (DSTATE * DIM)
            b_hs = b_hs + (gl.load(p_next, mask=m_ahead, other=0.0),)
        for j in gl.static_range(AHEAD):
            m_ahead = both(m_c, i + j < num_chunks - 1)
            b_h = b_as[j] * b_h + b_hs[j]
            p_next = p_states + (first + sign * (i + j + 1)).to(gl.int64) * (DSTATE * DIM)
            gl.store(p_next, b_h, mask=m_ahead)


def _fetch_layout(size: int, num_warps: int):
    lanes = min(8, size)
    return gl.BlockedLayout([size // lanes, 1], [lanes, 32 // lanes], [1, num_warps], [0, 1])


def _warps(dim: int, most: int) -> int:
    return next((w for w in (4, 2) if w <= most and dim % (32 * w) == 0), 1)


@functools.lru_cache
def _walk_options(
    dim, dstate, rank, acc, most_warps, most_channels, steps, fixed_A=False
) -> tuple[Walk, int]:
    """The constants of a walking kernel and the number of its warps."""
    per_thread = most_channels if dim % (32 * most_channels) == 0 and acc == tl.float32 else 1
    num_warps = _warps(dim // per_thread, most_warps)
    padded_dstate, padded_rank = triton.next_power_of_2(dstate), triton.next_power_of_2(rank)
    layouts = [None] * 6
    if not INTERPRETED.value:
        layout = gl.BlockedLayout([1, per_thread], [1, 32], [1, num_warps], [1, 0])
        layouts = (
            layout,
            gl.SliceLayout(1, layout),
            gl.SliceLayout(0, layout),
            _fetch_layout(padded_rank, num_warps),
            _fetch_layout(padded_dstate, num_warps),
            gl.SwizzledSharedLayout(1, 1, 1, order=[0, 1]),
        )
    sizes = dim, dstate, rank, 32 * per_thread * num_warps, padded_dstate, padded_rank, steps
    return Walk(*sizes, fixed_A, acc, *map(tl.constexpr, layouts)), num_warps


@functools.lru_cache
def _sweep_options(dim, dstate, rank, acc, substeps, steps, fetch) -> Sweep:
    S = triton.cdiv(triton.next_power_of_2(dstate), 4)
    rest = max(1, S // 4)
    layouts = [None] * 8
    if not INTERPRETED.value:
        layout = gl.BlockedLayout([1, S, 1, 4], [4, 1, 8, 1], [1, 1, 1, 1], [3, 1, 0, 2])
        by_sum = gl.BlockedLayout([1, 1, rest], [8, 4, 1], [1, 1, 1], [2, 1, 0])
        layouts = (
            layout,
            gl.SliceLayout(2, gl.SliceLayout(3, layout)),
            gl.SliceLayout(0, gl.SliceLayout(1, layout)),
            gl.SliceLayout(2, by_sum),
            by_sum,
            gl.SliceLayout(0, gl.SliceLayout(1, by_sum)),
            gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]),
            gl.SwizzledSharedLayout(1, 1, 1, order=[3, 0, 2, 1]),
        )
    sizes = dim, dstate, rank, S, rest, substeps, steps, fetch, acc
    return Sweep(*sizes, *map(tl.constexpr, layouts))


@functools.lru_cache
def _strip_options(dim, dstate, rank, acc, most_channels, steps) -> Strip:
    channels = next((c for c in (4, 2) if c <= most_channels and dim % (32 * c) == 0), 1)
    N = triton.next_power_of_2(dstate)
    layouts = [None] * 9
    if not INTERPRETED.value:
        layout = gl.BlockedLayout([N, 1, channels], [1, 32, 1], [1, 1, 1], [2, 0, 1])
        n_lanes = min(32, N)
        sums = gl.BlockedLayout([1, n_lanes], [n_lanes, 32 // n_lanes], [1, 1], [1, 0])
        by_channel = gl.SliceLayout(0, layout)
        by_lane = gl.SliceLayout(2, layout)
        layouts = (
            layout,
            gl.SliceLayout(1, by_lane),
            by_lane,
            by_channel,
            _fetch_layout(N, 1),
            gl.SwizzledSharedLayout(1, 1, 1, order=[0, 1]),
            sums,
            gl.SliceLayout(1, sums),
            gl.SwizzledSharedLayout(4, 1, 8, order=[1, 0]),
        )
    return Strip(dim, dstate, rank, channels, N, steps, acc, *map(tl.constexpr, layouts))


def _chunks(length: int, programs: int, wanted: int, unit: int) -> tuple[int, int]:
    """Size and number of chunks, a multiple of `unit`, for about `wanted` programs in all."""
    chunk_size = triton.cdiv(length, max(1, wanted // programs))
    chunk_size = triton.cdiv(chunk_size, unit) * unit
    return chunk_size, triton.cdiv(length, chunk_size)


def _carry(A_logs, states, adjoints, delta_sums, k, acc, fixed_A=False):
    """Carry the states or the adjoints, or both where they lie one behind the other."""
    directions, batch, num_chunks, dim = delta_sums.shape
    is_given = [each is not None for each in (states, adjoints)]
    num_warps = _warps(dim, 4)
    layout = None
    if not INTERPRETED.value:
        layout = gl.BlockedLayout([1], [32], [num_warps], [0])
    channels = 32 * num_warps
    grid = (triton.cdiv(dim, channels), A_logs.shape[1], directions * batch * sum(is_given))
    _carry_kernel[grid](
        A_logs, states if is_given[0] else adjoints, delta_sums, num_chunks, k, DIM=dim,
        DSTATE=A_logs.shape[1], CHANNELS=channels, AHEAD=CARRY_AHEAD, DIRECTIONS=directions,
        WITH_STATES=is_given[0], WITH_ADJOINTS=is_given[1], FIXED_A=fixed_A, ACC=acc,
        BY_CHANNEL=layout, num_warps=num_warps,
    )  # fmt: skip


def _strip_chunks(inputs: ScanInputs) -> tuple[Strip, int, int, int]:
    """Where A is fixed: constants of the backward walks, directions at once, size and number of
    chunks."""
    batch, height, width, dim = inputs.x.shape
    # A compiler's symbolic sizes become numbers, which a cache can hold.
    sizes = map(int, (dim, inputs.dstate, inputs.dt_rank))
    strip = _strip_options(*sizes, tl.float32, STRIP_CHANNELS, STRIP_GROUP)
    directions = _directions(inputs.x)
    programs = triton.cdiv(dim, 32 * strip.CHANNELS) * batch * directions
    return strip, directions, *_chunks(height * width, programs, STRIP_PROGRAMS, STRIP_UNIT)


def _projection_options(dtype: torch.dtype) -> tuple[str, int, int]:
    """How the gradients by delta's projection multiply for maps of a dtype.

    Returns the products, as `tl.dot` calls their precision, and a tile's pixels and channels.

    TF32 keeps more than maps of 16 bits hold, and so does the gradient by x_dbl, which is one. In
    float32 it has to be allowed; three products of TF32 parts keep float32's accuracy.
    """
    if dtype == torch.float64:
        return "ieee", 16, 16
    if dtype.itemsize == 2:
        return "tf32", 128, 64
    if product_precision(dtype) == "tf32":
        return "tf32", 128, 32
    return "tf32x3", 64, 64


def _directions(x: Tensor) -> int:
    return 4 if x.numel() <= SMALL_MAP else 1


def kept_shape(inputs: ScanInputs) -> tuple[int, ...]:
    """Shape of the states that `scan_2d_forward` can keep for `scan_2d_backward`.

    These are the ones on entering each chunk of the backward pass where A is fixed: (4, batch,
    chunks, dstate, dim), float32. (0,) where that would take much memory, and for float64.
    """
    x = inputs.x
    batch, height, width, dim = x.shape
    _, _, _, num_chunks = _strip_chunks(inputs)
    shape = 4, batch, num_chunks, inputs.dstate, dim
    most = max(KEPT_BYTES, KEPT_SHARE * x.numel() * x.element_size())
    is_cut = height * width % STRIP_UNIT == 0  # for any direction where groups of pixels are
    fits = is_cut and inputs.dtype == torch.float32 and 4 * math.prod(shape) <= most
    return shape if fits else (0,)


def scan_2d_forward(
    inputs: ScanInputs, fixed_A: bool = False, kept: Tensor | None = None
) -> Tensor:
    """Scan x along four orders of its pixels and sum the results in image order.

    Besides the result it allocates, for few channels, the chunk states, a few percent of x, and for
    a dtype of 16 bits a buffer of the shape of x in which the directions are summed. For many
    channels it allocates two of these. They are float32, or float64.

    Args:
        inputs: contiguous.
        fixed_A: see `kernels.selective_scan_2d`.
        kept: of `kept_shape`, to be filled, only where A is fixed.

    Returns:
        y: (batch, height, width, dim), in the dtype of x. States and sums are float32, or float64.
    """
    batch, height, width, dim = inputs.x.shape
    kept = None if kept is None or kept.numel() == 0 else kept
    channels = ONE_PASS_CHANNELS_OF_LONG if height * width > LONG else ONE_PASS_CHANNELS
    with torch.cuda.device_of(inputs.x):
        scan = _scan_in_chunks if 4 * batch * dim < channels else _scan_in_halves
        return scan(inputs, fixed_A, kept)


def _scan_in_chunks(inputs: ScanInputs, fixed_A: bool, kept: Tensor | None) -> Tensor:
    x, A_logs = inputs.x, inputs.A_logs
    batch, height, width, dim = x.shape
    dstate, accumulator = inputs.dstate, inputs.dtype
    acc = tl.float64 if accumulator == torch.float64 else tl.float32
    meta, num_warps = _walk_options(
        dim, dstate, inputs.dt_rank, acc, FORWARD_WARPS, FORWARD_CHANNELS, FORWARD_GROUP, fixed_A
    )
    blocks = triton.cdiv(dim, meta.CHANNELS)
    shortest = SHORTEST_CHUNK if acc == tl.float32 else SHORTEST_CHUNK_IN_FLOAT64
    if kept is None:
        chunk_size, num_chunks = _chunks(height * width, blocks * batch, FORWARD_PROGRAMS, shortest)
        states = x.new_empty(4, batch, num_chunks, dstate, dim, dtype=accumulator)
    else:
        *_, chunk_size, num_chunks = _strip_chunks(inputs)
        states = kept
    delta_sums = x.new_empty(4, batch, num_chunks, dim, dtype=accumulator)
    y = torch.empty_like(x)
    y_sum = y if x.dtype == accumulator else torch.empty_like(x, dtype=accumulator)
    sizes = height, width, chunk_size, num_chunks
    options = {"META": meta, "num_warps": num_warps, "maxnreg": FORWARD_REGISTERS}
    if num_chunks > 1:
        grid = (blocks * 4, num_chunks - 1, batch)
        chunk_state_kernel[grid](*inputs[:5], states, delta_sums, *sizes, **options)
    _carry(A_logs, states, None, delta_sums, 0, acc, fixed_A)
    for order in range(2):
        output_kernel[(blocks, num_chunks, batch)](
            *inputs, states, y_sum, y, *sizes, ORDER=order, **options
        )
    return y


def _scan_in_halves(inputs: ScanInputs, fixed_A: bool, kept: Tensor | None) -> Tensor:
    x = inputs.x
    batch, height, width, dim = x.shape
    dstate, accumulator = inputs.dstate, inputs.dtype
    acc = tl.float64 if accumulator == torch.float64 else tl.float32
    meta, num_warps = _walk_options(
        dim, dstate, inputs.dt_rank, acc, 1, ONE_PASS_CHANNELS_OF_THREAD, ONE_PASS_GROUP, fixed_A
    )
    states = x.new_empty(4, batch, dstate, dim, dtype=accumulator)
    y_parts = x.new_empty(2, *x.shape, dtype=accumulator)
    chunk_size = num_chunks = 0
    if kept is not None:
        *_, chunk_size, num_chunks = _strip_chunks(inputs)
    grid = (triton.cdiv(dim, meta.CHANNELS) * 4, batch)
    for is_second in (False, True):
        half_kernel[grid](
            *inputs, states, y_parts, kept, height, width, chunk_size, num_chunks,
            IS_SECOND=is_second, KEEPS=kept is not None, META=meta, num_warps=num_warps,
        )  # fmt: skip
    return torch.add(*y_parts, out=torch.empty_like(x))


def scan_2d_backward(
    dy: Tensor, inputs: ScanInputs, fixed_A: bool = False, kept: Tensor | None = None
) -> ScanInputs:
    """The gradients of `scan_2d_forward` by its inputs, given dy, the gradient by y.

    Directions are taken one after the other, but together on maps of up to `SMALL_MAP` elements.
    Besides the results it allocates, one after the other and at a state size of 16, about 3 times
    x in float32: delta, states or what is handed over between the walks, and the partial sums of
    the gradients by B and C. Together, that is 11 to 16 times x.

    Args:
        dy: (batch, height, width, dim), contiguous, in the dtype of x.
        inputs: as in `scan_2d_forward`.
        fixed_A: as there; the gradient by A_logs is then an empty tensor. Maps in float64 gain
            nothing by it.
        kept: what the forward pass has kept, if it did; it makes the backward pass shorter.
    """
    x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds = inputs
    batch, height, width, dim = x.shape
    length = height * width
    dstate, rank, accumulator = inputs.dstate, inputs.dt_rank, inputs.dtype
    acc = tl.float64 if accumulator == torch.float64 else tl.float32
    wants_dA = not fixed_A
    fixed_A = fixed_A and acc == tl.float32
    walk, num_warps = _walk_options(
        dim, dstate, rank, acc, ADJOINT_WARPS, ADJOINT_CHANNELS, ADJOINT_GROUP, fixed_A
    )
    has_states = fixed_A and kept is not None and kept.numel() > 0
    blocks = triton.cdiv(dim, walk.CHANNELS)
    if fixed_A:
        strip, directions, chunk_size, num_chunks = _strip_chunks(inputs)
        num_parts = triton.cdiv(dim, 32 * strip.CHANNELS)
        num_subchunks = 0
    else:
        sweep = _sweep_options(dim, dstate, rank, acc, SUBCHUNK, TILE, SWEEP_FETCH)
        directions = _directions(x)
        num_parts = triton.cdiv(dim, 32)
        chunk_size, num_chunks = _chunks(length, blocks * batch, BACKWARD_PROGRAMS, SUBCHUNK)
        num_subchunks = chunk_size // SUBCHUNK
    products, pixels, channels = _projection_options(x.dtype)
    num_tiles = triton.cdiv(batch * length, pixels)

    def buffer(*shape):
        return x.new_empty(shape, dtype=accumulator)

    delta_shape = directions, batch, height, width, dim
    if fixed_A and x.element_size() == 2:
        # What a pixel hands over from walk to walk is most of what they wait for. Delta, of which
        # exponentials are taken, gets the dtype with more bits, its gradient that of more range.
        delta = x.new_empty(delta_shape, dtype=torch.float16)
        dz = delta.view(torch.bfloat16)
    else:
        delta = dz = buffer(*delta_shape)
    *states, adjoints = buffer(2 - has_states, directions, batch, num_chunks, dstate, dim)
    delta_sums = buffer(directions, batch, num_chunks, dim)
    # The partial sums of dW and dbias come when what the walks hand over is done with.
    if fixed_A:
        walked_shape = delta.shape
    else:
        walked_shape = directions, batch, num_chunks, num_subchunks, dstate, dim
    parts_shape = directions, num_tiles, dim * (rank + 1)
    scratch = buffer(max(math.prod(walked_shape), math.prod(parts_shape)))
    walked = scratch[: math.prod(walked_shape)]
    parts = scratch[: math.prod(parts_shape)].view(parts_shape)
    inner_sums = buffer(directions, batch, num_chunks, num_subchunks, dim)
    dBC_parts = buffer(num_parts, directions, batch, length, 2 * dstate)
    dA_parts = buffer(directions, batch * num_chunks, 0 if fixed_A else dstate, dim)
    dD_parts = buffer(batch * num_chunks, dim)
    dx = torch.empty_like(x)
    dx_sum = dx
    if directions > 1 or x.dtype != accumulator:
        dx_sum = buffer(directions, *x.shape)
    dx_dbl = torch.empty_like(x_dbl)
    dW = torch.empty_like(dt_projs_weight)
    dbias = torch.empty_like(dt_projs_bias)
    dDs = torch.empty_like(Ds)
    dA_logs = torch.empty_like(A_logs) if wants_dA else A_logs.new_empty(0)

    sizes = height, width, chunk_size, num_chunks
    grid = num_parts, num_chunks, directions * batch
    with torch.cuda.device_of(x):
        for k in range(0, 4, directions):
            done = slice(k, k + directions)
            entered = kept[done] if has_states else states[0]
            adjoint_state_kernel[(blocks, num_chunks, directions * batch)](
                dy, *inputs[:5], delta, entered, adjoints, delta_sums, walked, inner_sums,
                dD_parts, *sizes, num_subchunks, k, DIRECTIONS=directions,
                SUBSTEPS=0 if fixed_A else SUBCHUNK, WITH_STATES=not has_states,
                WITH_DD=k == 0, META=walk, num_warps=num_warps,
            )  # fmt: skip
            _carry(A_logs, *(states or [None]), adjoints, delta_sums, k, acc, fixed_A)
            ends = {"BEGINS": k == 0, "ENDS": directions == 1 and k == 3}
            if fixed_A:
                state_walk_kernel[grid](
                    dy, x, x_dbl, delta, entered, walked, dBC_parts, *sizes, k,
                    DIRECTIONS=directions, META=strip, num_warps=1, maxnreg=STRIP_REGISTERS,
                )  # fmt: skip
                adjoint_walk_kernel[grid](
                    dy, x, x_dbl, Ds, delta, dz, entered, adjoints, walked, dx_sum, dx, dBC_parts,
                    *sizes, k, DIRECTIONS=directions, **ends, META=strip, num_warps=1,
                    maxnreg=STRIP_REGISTERS,
                )  # fmt: skip
            else:
                sweep_kernel[grid](
                    dy, x, x_dbl, A_logs, Ds, delta, entered, adjoints, walked, inner_sums, dx_sum,
                    dx, dBC_parts, dA_parts, *sizes, num_subchunks, k, DIRECTIONS=directions,
                    **ends, META=sweep, num_warps=1,
                )  # fmt: skip
            projection_kernel[(num_tiles, directions)](
                dz, x_dbl, dt_projs_weight, dBC_parts, dx_dbl, parts, batch * length, k,
                DIM=dim, DSTATE=dstate, RANK=rank, CHANNELS=channels,
                PADDED_DSTATE=walk.PADDED_DSTATE, PADDED_RANK=max(16, walk.PADDED_RANK),
                PIXELS=pixels, NUM_PARTS=num_parts, ACC=acc, PRODUCTS=products,
                num_warps=PROJECTION_WARPS,
            )  # fmt: skip
            sum_parts(parts, dW[done], dbias[done])
            if wants_dA:
                dA = dA_parts.sum(1).transpose(1, 2)
                dA_logs.view(4, dim, dstate)[done] = dA
        if directions > 1:
            sum_parts(dx_sum.flatten(1)[None], dx)
        sum_parts(dD_parts.expand(4, -1, -1), dDs)
    if fixed_A:
        dA_logs = dA_logs.new_empty(0)
    return ScanInputs(dx, dx_dbl, dW, dbias, dA_logs, dDs)
