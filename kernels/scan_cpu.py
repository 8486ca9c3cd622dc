"""The four-direction scan on the CPU, forward and backward, compiled by Numba.

One job scans a block of channels of one image. It walks the pixels in chunks of a few steps, whose
delta, delta * x and results stay in the first-level cache; inside a chunk the states of a few
channels stay in registers, as vectors (`scan_cpu_vectors`).

Jobs run on several threads (`scan_cpu_threads`). Which thread runs a job changes neither what the
job computes nor the order of any sum, so results do not depend on the number of threads.

Letters are those of the README of this folder. In addition `u` is delta * x, `a` is exp(delta A),
and pixels are numbered row-major in arrays (batch, length, ...).

Where A is fixed at -(1..states), `a` of a state is that of the state before times `decay`, which is
exp(-delta); `power` keeps the last of these products from one group of states to the next. The
argument `fixed_A` is then True, else None: Numba compiles each case without the other's branches.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import scan_cpu_threads as threads
from kernels.scan_cpu_vectors import (
    LOG2E,
    VECTOR_BYTES,
    add_lanes,
    exp2,
    jit,
    jit_inline,
    load,
    num_lanes,
    prefetch,
    softplus,
    store,
)
from kernels.scan_reference import ScanInputs

# Of one job; the last block of a dim that is no multiple is padded. A forward job has fewer where
# threads would have none, but not always, because each job reads all of x_dbl.
CHANNELS, FEWEST_CHANNELS = 128, 32
STEPS = 16  # of one chunk
UNROLL = 4  # states, ranks or steps handled together; states and ranks are padded to a multiple
SMALL = 1 << 18  # state updates below which waking other threads costs more than it saves


@jit
def _pixel(direction, step, height, width):
    """Row-major number of the pixel that a direction visits at a step."""
    i = step if direction < 2 else height * width - 1 - step
    return i if direction % 2 == 0 else i % height * width + i // height


# The two below run through rows whose size is known only at run time. The compiler would make
# gathers and scatters of a plain loop, and calls would take longer than what they do.
@jit_inline
def _copy(source, i, target, j, size):
    """Set `size` numbers of a row of `target`, from index j, to those of `source` from index i."""
    whole = size - size % num_lanes(source)
    for c in range(0, whole, num_lanes(source)):
        store(target, (j[0], j[1] + c), load(source, (i[0], i[1] + c)))
    for c in range(whole, size):
        target[j[0], j[1] + c] = source[i[0], i[1] + c]


@jit_inline
def _add(source, i, target, j, size):
    """As `_copy`, but add to what is there."""
    whole = size - size % num_lanes(source)
    for c in range(0, whole, num_lanes(source)):
        total = load(target, (j[0], j[1] + c)) + load(source, (i[0], i[1] + c))
        store(target, (j[0], j[1] + c), total)
    for c in range(whole, size):
        target[j[0], j[1] + c] += source[i[0], i[1] + c]


@jit
def _load_chunk(
    k, start, steps, height, width, x, x_dbl, first, size, rank, dstate, pixels, r, B, C, xs
):
    """Read `steps` pixels from step `start` of direction k of one image.

    x (length, dim), x_dbl (length, 4 (rank + 2 dstate)). Filled are pixels (STEPS), r (STEPS,
    ranks), B and C (STEPS, states) and, with channels first : first + size, xs (STEPS, channels).
    """
    row = k * (rank + 2 * dstate)
    for t in range(steps):
        p = _pixel(k, start + t, height, width)
        pixels[t] = p
        _copy(x_dbl, (p, row), r, (t, 0), rank)
        _copy(x_dbl, (p, row + rank), B, (t, 0), dstate)
        _copy(x_dbl, (p, row + rank + dstate), C, (t, 0), dstate)
        _copy(x, (p, first), xs, (t, 0), size)


@jit
def _prefetch_chunk(k, start, height, width, first, size, x_dbl, images):
    """Fetch a chunk's part of x_dbl and of `images` (length, dim) while another one is scanned.

    The loads of a chunk are too short, and too far apart in the column-major directions, for the
    processor to see them coming.
    """
    line = 64 // VECTOR_BYTES * num_lanes(x_dbl)
    row = x_dbl.shape[1] // 4
    for step in range(max(start, 0), min(start + STEPS, height * width)):
        p = _pixel(k, step, height, width)
        for i in range(0, row + line - 1, line):
            prefetch(x_dbl, (p, k * row + i))
        for image in images:
            for c in range(0, size, line):
                prefetch(image, (p, first + c))


@jit
def _project(W, bias, r, z):
    """Set z (STEPS, channels), delta before its softplus, to W r + bias.

    W (ranks, channels), r (STEPS, ranks), bias (channels).
    """
    for c in range(0, W.shape[1], num_lanes(z)):
        for t in range(0, STEPS, 4):
            w = load(W, (0, c))
            z0, z1, z2, z3 = w * r[t, 0], w * r[t + 1, 0], w * r[t + 2, 0], w * r[t + 3, 0]
            for i in range(1, W.shape[0]):
                w = load(W, (i, c))
                z0 += w * r[t, i]
                z1 += w * r[t + 1, i]
                z2 += w * r[t + 2, i]
                z3 += w * r[t + 3, i]
            b = load(bias, (c,))
            store(z, (t, c), z0 + b)
            store(z, (t + 1, c), z1 + b)
            store(z, (t + 2, c), z2 + b)
            store(z, (t + 3, c), z3 + b)


@jit_inline
def _a(fixed_A, A, d, before, decay):
    """exp(delta A) of one state: from that of the state before where A is fixed."""
    if fixed_A is None:
        return exp2(A * d)
    return before * decay


@jit
def _begin_powers(steps, fixed_A, delta, decay, power):
    """Where A is fixed, set decay and power, all (STEPS, channels), for the first state."""
    if fixed_A is not None:
        minus_log2e = delta.dtype.type(-LOG2E)
        for t in range(steps):
            for c in range(0, delta.shape[1], num_lanes(delta)):
                store(decay, (t, c), exp2(load(delta, (t, c)) * minus_log2e))
        power[:] = 1


@jit
def _scan_chunk(steps, fixed_A, A, delta, decay, power, u, B, C, h, y):
    """Advance the states h (states, channels) over a chunk and add C . h to y (STEPS, channels)."""
    for n in range(0, A.shape[0], 4):
        for c in range(0, h.shape[1], num_lanes(h)):
            A0, A1 = load(A, (n, c)), load(A, (n + 1, c))
            A2, A3 = load(A, (n + 2, c)), load(A, (n + 3, c))
            h0, h1 = load(h, (n, c)), load(h, (n + 1, c))
            h2, h3 = load(h, (n + 2, c)), load(h, (n + 3, c))
            for t in range(steps):
                d, v, r = load(delta, (t, c)), load(u, (t, c)), load(decay, (t, c))
                a0 = _a(fixed_A, A0, d, load(power, (t, c)), r)
                a1 = _a(fixed_A, A1, d, a0, r)
                a2 = _a(fixed_A, A2, d, a1, r)
                a3 = _a(fixed_A, A3, d, a2, r)
                if fixed_A is not None:
                    store(power, (t, c), a3)
                h0 = a0 * h0 + v * B[t, n]
                h1 = a1 * h1 + v * B[t, n + 1]
                h2 = a2 * h2 + v * B[t, n + 2]
                h3 = a3 * h3 + v * B[t, n + 3]
                y_t = load(y, (t, c)) + h0 * C[t, n] + h1 * C[t, n + 1]
                store(y, (t, c), y_t + h2 * C[t, n + 2] + h3 * C[t, n + 3])
            store(h, (n, c), h0)
            store(h, (n + 1, c), h1)
            store(h, (n + 2, c), h2)
            store(h, (n + 3, c), h3)


@jit
def _advance_chunk(steps, fixed_A, A, delta, decay, power, u, B, h, h_next):
    """h_next (states, channels): the states h advanced over a chunk."""
    for n in range(0, A.shape[0], 2):
        for c in range(0, h.shape[1], num_lanes(h)):
            A0, A1 = load(A, (n, c)), load(A, (n + 1, c))
            h0, h1 = load(h, (n, c)), load(h, (n + 1, c))
            for t in range(steps):
                d, v, r = load(delta, (t, c)), load(u, (t, c)), load(decay, (t, c))
                a0 = _a(fixed_A, A0, d, load(power, (t, c)), r)
                a1 = _a(fixed_A, A1, d, a0, r)
                if fixed_A is not None:
                    store(power, (t, c), a1)
                h0 = a0 * h0 + v * B[t, n]
                h1 = a1 * h1 + v * B[t, n + 1]
            store(h_next, (n, c), h0)
            store(h_next, (n + 1, c), h1)


@jit
def _sweep_chunk(
    steps, fixed_A, A, delta, decay, power, u, B, C, dy, h, g, du, ddelta, dA, dB, dC, work
):
    """Walk backwards over a chunk that began with the states h (states, channels).

    g (states, channels) is a_{t+1} dL/dh_{t+1} on entry, of the step after the chunk, and becomes
    a_t dL/dh_t of its first step. du and ddelta (STEPS, channels) and dA (states, channels) are
    added to, but dA only where A is not fixed; ddelta lacks a factor ln(2), because A has one of
    log2(e). dB and dC (STEPS, states) are set. work (4, 2 STEPS, lanes) keeps a, h and the terms of
    dB and dC of two states.
    """
    a_s, h_s, dB_s, dC_s = work[0], work[1], work[2], work[3]
    for n in range(0, A.shape[0], 2):
        for c in range(0, h.shape[1], num_lanes(h)):
            A0, A1 = load(A, (n, c)), load(A, (n + 1, c))
            h0, h1 = load(h, (n, c)), load(h, (n + 1, c))
            for t in range(steps):
                d, v, r = load(delta, (t, c)), load(u, (t, c)), load(decay, (t, c))
                a0 = _a(fixed_A, A0, d, load(power, (t, c)), r)
                a1 = _a(fixed_A, A1, d, a0, r)
                if fixed_A is not None:
                    store(power, (t, c), a1)
                store(a_s, (2 * t, 0), a0)
                store(a_s, (2 * t + 1, 0), a1)
                store(h_s, (2 * t, 0), h0)
                store(h_s, (2 * t + 1, 0), h1)
                h0 = a0 * h0 + v * B[t, n]
                h1 = a1 * h1 + v * B[t, n + 1]
            g0, g1 = load(g, (n, c)), load(g, (n + 1, c))
            dA0, dA1 = load(dA, (n, c)), load(dA, (n + 1, c))
            for t in range(steps - 1, -1, -1):
                d, v, w = load(delta, (t, c)), load(u, (t, c)), load(dy, (t, c))
                g0 += w * C[t, n]
                g1 += w * C[t, n + 1]
                dC0, dC1 = w * h0, w * h1
                dB0, dB1 = g0 * v, g1 * v
                store(du, (t, c), load(du, (t, c)) + g0 * B[t, n] + g1 * B[t, n + 1])
                g0 *= load(a_s, (2 * t, 0))
                g1 *= load(a_s, (2 * t + 1, 0))
                h0, h1 = load(h_s, (2 * t, 0)), load(h_s, (2 * t + 1, 0))
                e0, e1 = g0 * h0, g1 * h1
                store(ddelta, (t, c), load(ddelta, (t, c)) + e0 * A0 + e1 * A1)
                if fixed_A is None:
                    dA0 += e0 * d
                    dA1 += e1 * d
                if c > 0:
                    dB0 += load(dB_s, (2 * t, 0))
                    dB1 += load(dB_s, (2 * t + 1, 0))
                    dC0 += load(dC_s, (2 * t, 0))
                    dC1 += load(dC_s, (2 * t + 1, 0))
                store(dB_s, (2 * t, 0), dB0)
                store(dB_s, (2 * t + 1, 0), dB1)
                store(dC_s, (2 * t, 0), dC0)
                store(dC_s, (2 * t + 1, 0), dC1)
            store(g, (n, c), g0)
            store(g, (n + 1, c), g1)
            store(dA, (n, c), dA0)
            store(dA, (n + 1, c), dA1)
        for t in range(steps):
            for i in range(2):
                dB[t, n + i] = add_lanes(load(dB_s, (2 * t + i, 0)))
                dC[t, n + i] = add_lanes(load(dC_s, (2 * t + i, 0)))


@jit
def _sweep_projection(steps, W, r, dz, dr, dW, dbias):
    """dr (STEPS, ranks) is set, dW (ranks, channels) and dbias (channels) are added to."""
    for c in range(0, W.shape[1], num_lanes(r)):
        total = load(dbias, (c,))
        for t in range(steps):
            total += load(dz, (t, c))
        store(dbias, (c,), total)
    for i in range(0, W.shape[0], 4):
        for c in range(0, W.shape[1], num_lanes(r)):
            s0, s1 = load(dW, (i, c)), load(dW, (i + 1, c))
            s2, s3 = load(dW, (i + 2, c)), load(dW, (i + 3, c))
            for t in range(steps):
                d = load(dz, (t, c))
                s0 += d * r[t, i]
                s1 += d * r[t, i + 1]
                s2 += d * r[t, i + 2]
                s3 += d * r[t, i + 3]
            store(dW, (i, c), s0)
            store(dW, (i + 1, c), s1)
            store(dW, (i + 2, c), s2)
            store(dW, (i + 3, c), s3)
        for t in range(steps):
            d = load(dz, (t, 0))
            s0, s1 = d * load(W, (i, 0)), d * load(W, (i + 1, 0))
            s2, s3 = d * load(W, (i + 2, 0)), d * load(W, (i + 3, 0))
            lanes = num_lanes(r)
            for c in range(lanes, W.shape[1], lanes):
                d = load(dz, (t, c))
                s0 += d * load(W, (i, c))
                s1 += d * load(W, (i + 1, c))
                s2 += d * load(W, (i + 2, c))
                s3 += d * load(W, (i + 3, c))
            dr[t, i], dr[t, i + 1] = add_lanes(s0), add_lanes(s1)
            dr[t, i + 2], dr[t, i + 3] = add_lanes(s2), add_lanes(s3)


@jit
def _forward_block(image, block, fixed_A, height, width, dstate, rank, x, x_dbl, W, bias, A, D, y):
    """Scan one block of channels of one image in all four directions, adding into y.

    x, y (batch, length, dim); x_dbl (batch, length, 4 (rank + 2 dstate)); W (4, blocks, ranks,
    channels); bias, D (4, blocks, channels); A (4, blocks, states, channels), times log2(e).
    """
    length, dim = x.shape[1:]
    channels = W.shape[3]
    first = block * channels
    size = min(channels, dim - first)
    states = A.shape[2]
    x, x_dbl, y = x[image], x_dbl[image], y[image]
    pixels = np.empty(STEPS, np.int64)
    r = np.zeros((STEPS, W.shape[2]), x.dtype)
    B, C = np.zeros((STEPS, states), x.dtype), np.zeros((STEPS, states), x.dtype)
    xs, ys = np.zeros((STEPS, channels), x.dtype), np.empty((STEPS, channels), x.dtype)
    delta, u = np.empty((STEPS, channels), x.dtype), np.empty((STEPS, channels), x.dtype)
    decay, power = np.empty((STEPS, channels), x.dtype), np.empty((STEPS, channels), x.dtype)
    h = np.empty((states, channels), x.dtype)
    for k in range(4):
        h[:] = 0
        for start in range(0, length, STEPS):
            steps = min(STEPS, length - start)
            _load_chunk(
                k, start, steps, height, width, x, x_dbl, first, size, rank, dstate, pixels,
                r, B, C, xs,
            )  # fmt: skip
            _project(W[k, block], bias[k, block], r, delta)
            for t in range(steps):
                for c in range(0, channels, num_lanes(x)):
                    d, x_t = softplus(load(delta, (t, c)))[0], load(xs, (t, c))
                    store(delta, (t, c), d)
                    store(u, (t, c), d * x_t)
                    store(ys, (t, c), x_t * load(D, (k, block, c)))
            _begin_powers(steps, fixed_A, delta, decay, power)
            _prefetch_chunk(k, start + STEPS, height, width, first, size, x_dbl, (x, y))
            _scan_chunk(steps, fixed_A, A[k, block], delta, decay, power, u, B, C, h, ys)
            for t in range(steps):
                if k == 0:
                    _copy(ys, (t, 0), y, (pixels[t], first), size)
                else:
                    _add(ys, (t, 0), y, (pixels[t], first), size)


@jit
def _backward_block(
    image, k, block, fixed_A, height, width, dstate, rank, dy, x, x_dbl, W, bias, A, D,
    dx, dx_dbl, dW, dbias, dA, dD,
):  # fmt: skip
    """Gradients of one direction of one block of channels of one image.

    Shapes as in `_forward_block`. dx and dx_dbl are added to; dW, dbias, dA and dD, which have the
    shapes of W, bias, A and D after a leading batch, are set. dA is that of A without log2(e).
    """
    length, dim = x.shape[1:]
    channels = W.shape[3]
    first = block * channels
    size = min(channels, dim - first)
    states, ranks = A.shape[2], W.shape[2]
    row = k * (rank + 2 * dstate)
    chunks = (length + STEPS - 1) // STEPS
    ln2 = x.dtype.type(math.log(2))
    x, x_dbl, dy, dx, dx_dbl = x[image], x_dbl[image], dy[image], dx[image], dx_dbl[image]
    W, bias, A, D = W[k, block], bias[k, block], A[k, block], D[k, block]
    pixels = np.empty(STEPS, np.int64)
    r, dr = np.zeros((STEPS, ranks), x.dtype), np.empty((STEPS, ranks), x.dtype)
    B, C = np.zeros((STEPS, states), x.dtype), np.zeros((STEPS, states), x.dtype)
    dB, dC = np.empty((STEPS, states), x.dtype), np.empty((STEPS, states), x.dtype)
    xs, dys = np.zeros((STEPS, channels), x.dtype), np.zeros((STEPS, channels), x.dtype)
    delta, slope = np.empty((STEPS, channels), x.dtype), np.empty((STEPS, channels), x.dtype)
    u, du = np.empty((STEPS, channels), x.dtype), np.empty((STEPS, channels), x.dtype)
    ddelta = np.empty((STEPS, channels), x.dtype)
    work = np.empty((4, 2 * STEPS, num_lanes(x)), x.dtype)
    decay, power = np.empty((STEPS, channels), x.dtype), np.empty((STEPS, channels), x.dtype)
    g = np.zeros((states, channels), x.dtype)
    # Sums over all pixels are formed in two levels, which keeps their rounding errors small.
    chunk_dA, chunk_dW = np.empty((states, channels), x.dtype), np.empty((ranks, channels), x.dtype)
    chunk_dbias, chunk_dD = np.empty(channels, x.dtype), np.empty(channels, x.dtype)
    dA, dW, dbias, dD = (
        dA[image, k, block], dW[image, k, block], dbias[image, k, block], dD[image, k, block]
    )  # fmt: skip
    dA[:], dW[:], dbias[:], dD[:] = 0, 0, 0, 0
    starts = np.empty((chunks + 1, states, channels), x.dtype)
    starts[0] = 0
    for i in range(2 * chunks):
        forward = i < chunks
        chunk = i if forward else 2 * chunks - 1 - i
        steps = min(STEPS, length - chunk * STEPS)
        _load_chunk(
            k, chunk * STEPS, steps, height, width, x, x_dbl, first, size, rank, dstate, pixels,
            r, B, C, xs,
        )  # fmt: skip
        _project(W, bias, r, delta)
        for t in range(steps):
            for c in range(0, channels, num_lanes(x)):
                d, s = softplus(load(delta, (t, c)))
                store(delta, (t, c), d)
                store(slope, (t, c), s)
                store(u, (t, c), d * load(xs, (t, c)))
        _begin_powers(steps, fixed_A, delta, decay, power)
        if forward:
            _prefetch_chunk(k, (chunk + 1) * STEPS, height, width, first, size, x_dbl, (x,))
            _advance_chunk(
                steps, fixed_A, A, delta, decay, power, u, B, starts[chunk], starts[chunk + 1]
            )
            continue

        _prefetch_chunk(k, (chunk - 1) * STEPS, height, width, first, size, x_dbl, (x, dy, dx))
        for t in range(steps):
            _copy(dy, (pixels[t], first), dys, (t, 0), size)
        du[:], ddelta[:], chunk_dA[:], chunk_dW[:], chunk_dbias[:], chunk_dD[:] = 0, 0, 0, 0, 0, 0
        _sweep_chunk(
            steps, fixed_A, A, delta, decay, power, u, B, C, dys, starts[chunk], g, du, ddelta,
            chunk_dA, dB, dC, work,
        )  # fmt: skip
        for t in range(steps):
            for c in range(0, channels, num_lanes(x)):
                dy_t, x_t, du_t = load(dys, (t, c)), load(xs, (t, c)), load(du, (t, c))
                dz = (load(ddelta, (t, c)) * ln2 + du_t * x_t) * load(slope, (t, c))
                store(ddelta, (t, c), dz)
                store(du, (t, c), du_t * load(delta, (t, c)) + dy_t * load(D, (c,)))
                store(chunk_dD, (c,), load(chunk_dD, (c,)) + dy_t * x_t)
        _sweep_projection(steps, W, r, ddelta, dr, chunk_dW, chunk_dbias)
        dA += chunk_dA
        dW += chunk_dW
        dbias += chunk_dbias
        dD += chunk_dD
        for t in range(steps):
            p = pixels[t]
            _add(du, (t, 0), dx, (p, first), size)
            _add(dr, (t, 0), dx_dbl, (p, row), rank)
            _add(dB, (t, 0), dx_dbl, (p, row + rank), dstate)
            _add(dC, (t, 0), dx_dbl, (p, row + rank + dstate), dstate)


def _num_threads(updates: int) -> int:
    return torch.get_num_threads() if updates > SMALL else 1


def _split(parameter: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    """(4, dim, size) as (4, blocks, size padded to UNROLL, channels), the missing filled with 0."""
    _, dim, size = parameter.shape
    padded = F.pad(parameter.to(dtype), (0, -size % UNROLL, 0, -dim % channels))
    return padded.unflatten(1, (-1, channels)).transpose(2, 3).contiguous()


def _join(blocks: Tensor, dim: int, size: int) -> Tensor:
    """The inverse of `_split`."""
    return blocks.transpose(2, 3).flatten(1, 2)[:, :dim, :size].contiguous()


class _Problem:
    """The arguments of a scan as the compiled functions want them."""

    def __init__(self, inputs: ScanInputs, channels: int):
        x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds = (t.detach() for t in inputs)
        self.batch, self.height, self.width, self.dim = x.shape
        self.rank, self.dstate, self.dtype = inputs.dt_rank, inputs.dstate, inputs.dtype
        channels = min(channels, -(-self.dim // 16) * 16)  # whole vectors of any type
        self.blocks = -(-self.dim // channels)
        self.A = -A_logs.to(self.dtype).exp().view(4, self.dim, self.dstate)
        self.sizes = (self.height, self.width, self.dstate, self.rank)
        self.inputs = (
            self.image(x),
            self.image(x_dbl),
            _split(dt_projs_weight, self.dtype, channels).numpy(),
            _split(dt_projs_bias[..., None], self.dtype, channels)[:, :, 0].contiguous().numpy(),
            _split(self.A * LOG2E, self.dtype, channels).numpy(),
            _split(Ds.view(4, self.dim, 1), self.dtype, channels)[:, :, 0].contiguous().numpy(),
        )

    def image(self, x: Tensor) -> np.ndarray:
        return x.detach().to(self.dtype).contiguous().flatten(1, 2).flatten(2).numpy()


def scan_2d_forward(inputs: ScanInputs, fixed_A: bool = False) -> Tensor:
    """`kernels.scan_reference.scan_2d` for CPU tensors of any strides, without gradients.

    Args:
        fixed_A: see `kernels.selective_scan_2d`.
    """
    batch, dim = len(inputs.x), inputs.x.shape[3]
    num_threads = _num_threads(4 * inputs.x.numel() * inputs.dstate)
    channels = CHANNELS
    while channels > FEWEST_CHANNELS and batch * -(-dim // channels) < num_threads:
        channels //= 2
    problem = _Problem(inputs, channels)
    y = torch.empty(inputs.x.shape, dtype=problem.dtype)
    jobs = [(i, j) for i in range(batch) for j in range(problem.blocks)]
    args = (fixed_A or None, *problem.sizes, *problem.inputs, problem.image(y))
    threads.run(_forward_block, jobs, args, num_threads)
    return y.to(inputs.x.dtype)


def scan_2d_backward(dy: Tensor, inputs: ScanInputs, fixed_A: bool = False) -> ScanInputs:
    """The gradients of `scan_2d_forward` by its inputs, given `dy`, the gradient by its result.

    Each running job holds the states at the start of every chunk: dstate / STEPS times what its
    block of channels takes in `x`.
    """
    problem = _Problem(inputs, CHANNELS)
    batch, dim, blocks = problem.batch, problem.dim, problem.blocks
    dx = torch.zeros(inputs.x.shape, dtype=problem.dtype)
    dx_dbl = torch.zeros(inputs.x_dbl.shape, dtype=problem.dtype)
    dW, dbias, dA, dD = (
        torch.empty((batch, *p.shape), dtype=problem.dtype) for p in problem.inputs[2:]
    )
    results = (problem.image(dx), problem.image(dx_dbl), *(d.numpy() for d in (dW, dbias, dA, dD)))
    args = (fixed_A or None, *problem.sizes, problem.image(dy), *problem.inputs, *results)

    # Jobs of one block add to the same channels of dx, jobs of one direction to the same part of
    # dx_dbl. In each of the rounds every block and every direction of an image occurs once.
    rounds = max(4, blocks)
    num_threads = _num_threads(4 * inputs.x.numel() * inputs.dstate // rounds)
    for i in range(rounds):
        pairs = [(k, (i + k) % rounds) for k in range(4)]
        jobs = [(n, k, j) for n in range(batch) for k, j in pairs if j < blocks]
        threads.run(_backward_block, jobs, args, num_threads)

    dA = _join(dA.sum(0), dim, problem.dstate) * problem.A
    gradients = (
        dx,
        dx_dbl,
        _join(dW.sum(0), dim, problem.rank),
        dbias.sum(0).flatten(1)[:, :dim].contiguous(),
        dA.new_empty(0) if fixed_A else dA.reshape(inputs.A_logs.shape),
        dD.sum(0).flatten(1)[:, :dim].reshape(-1),
    )
    return ScanInputs(*(d.to(t.dtype) for d, t in zip(gradients, inputs, strict=True)))
