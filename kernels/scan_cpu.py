"""The four-direction scan on the CPU, forward and backward, compiled by Numba.

One job scans a block of channels of one image. It walks the pixels in chunks of a few steps, whose
delta, delta * x and results stay in the first-level cache; inside a chunk the states of a few
channels stay in registers. Vectors of channels are values of a type of their own (`Lanes`), so
speed does not hang on what the compiler manages to vectorise. The exponentials are polynomials.

Jobs run on several threads (`threads.py`). Which thread runs a job changes neither what the job
computes nor the order of any sum, so results do not depend on the number of threads.

Letters are those of the README of this folder. In addition `u` is delta * x, `a` is exp(delta A),
and pixels are numbered row-major in arrays (batch, length, ...).
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence

import llvmlite.binding
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model
from torch import Tensor

from kernels import scan_cpu_threads as threads

FORWARD_CHANNELS = 64  # of one job, at most; the last block of a dim that is no multiple is padded
BACKWARD_CHANNELS = 128
STEPS = 16  # of one chunk
UNROLL = 4  # states, ranks or steps handled together; states and ranks are padded to a multiple
SMALL = 1 << 18  # state updates below which waking other threads costs more than it saves

LOG2E = 1 / math.log(2)
INDEX = ir.IntType(32)


def _vector_bytes() -> int:
    features = llvmlite.binding.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx") else 16


VECTOR_BYTES = _vector_bytes()


def _jit(function, inline=False):
    """`njit` that releases the interpreter lock and caches on disk where a place is writable."""
    flags = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    flags["forceinline"] = inline
    try:
        return njit(cache=True, **flags)(function)
    except RuntimeError:
        return njit(**flags)(function)


_jit_inline = functools.partial(_jit, inline=True)


class Lanes(types.Type):
    """A vector of floats that fills one register, as a value in compiled code."""

    def __init__(self, real: types.Float):
        self.real = real
        super().__init__(f"Lanes({real})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        real = ir.FloatType() if lanes.real == types.float32 else ir.DoubleType()
        count = VECTOR_BYTES * 8 // lanes.real.bitwidth
        super().__init__(manager, lanes, ir.VectorType(real, count))


def _broadcast(builder, value, vector):
    """`value` in all lanes, if it is not a vector already."""
    if value.type == vector:
        return value
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, INDEX(0))
    firsts = ir.Constant(ir.VectorType(INDEX, vector.count), None)
    return builder.shuffle_vector(first, first, firsts)


def _lane_pointer(context, builder, array_type, array, index_type, index):
    view = context.make_array(array_type)(context, builder, array)
    indices = [
        context.cast(builder, i, integer, types.intp)
        for i, integer in zip(cgutils.unpack_tuple(builder, index), index_type, strict=True)
    ]
    pointer = cgutils.get_item_pointer(context, builder, array_type, view, indices)
    return builder.bitcast(pointer, context.get_value_type(Lanes(array_type.dtype)).as_pointer())


def _lanes(array):
    """Numbers in a vector of the array's type: a constant, so that loops need no division."""


@overload(_lanes)
def _overload_lanes(array):
    count = VECTOR_BYTES * 8 // array.dtype.bitwidth
    return lambda array: count


@intrinsic
def _load(typingctx, array, index):
    """The vector that starts at array[index]."""

    def codegen(context, builder, signature, args):
        pointer = _lane_pointer(context, builder, array, args[0], index, args[1])
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Lanes(array.dtype)(array, index), codegen


@intrinsic
def _store(typingctx, array, index, value):
    """Write the vector that starts at array[index]."""

    def codegen(context, builder, signature, args):
        pointer = _lane_pointer(context, builder, array, args[0], index, args[1])
        builder.store(args[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


@intrinsic
def _prefetch(typingctx, array, index):
    """Ask for the cache line of array[index], which need not exist."""

    def codegen(context, builder, signature, args):
        pointer = _lane_pointer(context, builder, array, args[0], index, args[1])
        address = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, INDEX, INDEX, INDEX])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [address, INDEX(0), INDEX(2), INDEX(1)])  # read, to L2, data
        return context.get_dummy_value()

    return types.void(array, index), codegen


@intrinsic
def _sum(typingctx, lanes):
    """The sum of the lanes, by halves: always in the same order."""

    def codegen(context, builder, signature, args):
        value = args[0]
        while value.type.count > 1:
            half = value.type.count // 2
            indices = ir.VectorType(INDEX, half)
            low, high = (
                builder.shuffle_vector(value, value, ir.Constant(indices, list(half_lanes)))
                for half_lanes in (range(half), range(half, 2 * half))
            )
            value = builder.fadd(low, high)
        return builder.extract_element(value, INDEX(0))

    return lanes.real(lanes), codegen


@intrinsic
def _where_less(typingctx, left, right, then, otherwise):
    """`then` in the lanes where left < right, `otherwise` in the others and where one is NaN."""
    lanes = next(t for t in (left, right, then, otherwise) if isinstance(t, Lanes))

    def codegen(context, builder, signature, args):
        vector = context.get_value_type(lanes)
        a, b, c, d = (_broadcast(builder, arg, vector) for arg in args)
        return builder.select(builder.fcmp_ordered("<", a, b), c, d)

    return lanes(left, right, then, otherwise), codegen


def _overload_operator(symbol: Callable, instruction: str) -> None:
    """Let `symbol` work on two vectors, or a vector and a number."""

    @intrinsic
    def apply(typingctx, left, right):
        lanes = left if isinstance(left, Lanes) else right

        def codegen(context, builder, signature, args):
            vector = context.get_value_type(lanes)
            a, b = (_broadcast(builder, arg, vector) for arg in args)
            return getattr(builder, instruction)(a, b, flags=("contract",))

        return lanes(left, right), codegen

    @overload(symbol)
    def overloaded(left, right):
        if isinstance(left, Lanes) or isinstance(right, Lanes):
            return lambda left, right: apply(left, right)


_overload_operator(operator.add, "fadd")
_overload_operator(operator.iadd, "fadd")
_overload_operator(operator.sub, "fsub")
_overload_operator(operator.mul, "fmul")
_overload_operator(operator.imul, "fmul")
_overload_operator(operator.truediv, "fdiv")


def _polynomial(for_float32: Sequence[float], for_float64: Sequence[float]):
    """A compiled function that evaluates one of two polynomials (ascending coefficients)."""

    @intrinsic
    def evaluate(typingctx, x):
        coefficients = for_float32 if x.real == types.float32 else for_float64

        def codegen(context, builder, signature, args):
            vector = args[0].type
            *rest, value = (ir.Constant(vector, [c] * vector.count) for c in coefficients)
            for coefficient in reversed(rest):
                product = builder.fmul(value, args[0], flags=("contract",))
                value = builder.fadd(product, coefficient, flags=("contract",))
            return value

        return x(x), codegen

    return evaluate


# Minimax fits. (2^f - 1) / f on |f| <= 1/2, so that 2^0 is exactly 1 and slow decays stay right:
# 2^f to 9.4e-8 and 3.5e-18 relative. artanh(s) / s in s^2 on |s| <= 1/3: 4e-9 and 1.3e-18.
_exp2_slope = _polynomial(
    (0.69314698601063877, 0.240222481285146498, 0.0555072847917716627, 0.00967123169730154,
     0.00132652255461805142),
    (0.693147180559945324, 0.240226506959101276, 0.0555041086648201692, 0.00961812910759535481,
     0.0013333558146763294, 0.000154035304557422226, 1.52527334989245493e-5,
     1.32154358971462771e-6, 1.01781985157945402e-7, 7.07368662883792531e-9,
     4.43478969482201624e-10),
)  # fmt: skip
_artanh_slope = _polynomial(
    (1.000000003960519073, 0.3333315734106423746, 0.200124551397690607, 0.1398030137358573347,
     0.1408916754336727239),
    (1.0, 0.3333333333333306712, 0.2000000000009516322, 0.1428571427246251379,
     0.1111111205588912065, 0.09090869893795208563, 0.07693317728157597847,
     0.0665005124589510519, 0.06056124544910556113, 0.04157841977895016467,
     0.08531030460052754777),
)  # fmt: skip


@intrinsic
def _times_power(typingctx, value, n):
    """value * 2^n, where n is a whole number that was rounded by adding `rounding` below."""
    bits, mantissa = (32, 23) if value.real == types.float32 else (64, 52)

    def codegen(context, builder, signature, args):
        integers = ir.VectorType(ir.IntType(bits), args[0].type.count)
        shift = ir.Constant(integers, [mantissa] * integers.count)
        power = builder.shl(builder.bitcast(args[1], integers), shift)
        total = builder.add(builder.bitcast(args[0], integers), power)
        return builder.bitcast(total, args[0].type)

    return value(value, n), codegen


# Per type: the number whose addition rounds to an integer and leaves it in the low bits; the power
# of 2 whose bits, made so, are those of 0; the lowest exponent of e with a normal result; ln 2 in
# two parts, the first with so few bits that its product with an exponent is exact.
_LIMITS = {
    types.float32: (np.float32, 1.5 * 2**23, -127.0, -87.0, 0.693359375, -2.1219444005469057e-4),
    types.float64: (
        np.float64, 1.5 * 2**52, -1023.0, -708.0, 0.6931471803691238, 1.9082149292705877e-10
    ),
}  # fmt: skip


def _exp2(t):
    """2^t for t <= 0; NaN stays NaN."""


@overload(_exp2)
def _overload_exp2(t):
    real, *limits = _LIMITS[t.real]
    rounding, lowest, *_ = map(real, limits)
    one = real(1)

    def exp2(t):
        t = _where_less(t, lowest, lowest, t)
        n = t + rounding
        f = t - (n - rounding)
        return _times_power(f * _exp2_slope(f) + one, n)

    return exp2


def _softplus(z):
    """log(1 + e^z), or z above 20 as in PyTorch, and its derivative; both to relative precision."""


@overload(_softplus)
def _overload_softplus(z):
    real, *limits = _LIMITS[z.real]
    rounding, _, lowest, ln2_high, ln2_low = map(real, limits)
    zero, one, two, linear, log2e = real(0), real(1), real(2), real(20), real(LOG2E)

    def softplus(z):
        # e^-|z| = 2^n e^f; log(1 + v) = 2 artanh(v / (2 + v)).
        w = _where_less(z, zero, z, zero - z)
        n = w * log2e + rounding
        whole = n - rounding
        f = ((w - whole * ln2_high) - whole * ln2_low) * log2e
        v = _where_less(w, lowest, zero, _times_power(f * _exp2_slope(f) + one, n))
        s = v / (v + two)
        value = _where_less(z, zero, zero, z) + s * two * _artanh_slope(s * s)
        slope = _where_less(z, zero, v, one) / (v + one)
        return _where_less(linear, z, z, value), _where_less(linear, z, one, slope)

    return softplus


@_jit
def _pixel(direction, step, height, width):
    """Row-major number of the pixel that a direction visits at a step."""
    i = step if direction < 2 else height * width - 1 - step
    return i if direction % 2 == 0 else i % height * width + i // height


# The two below run through rows whose size is known only at run time. The compiler would make
# gathers and scatters of a plain loop, and calls would take longer than what they do.
@_jit_inline
def _copy(source, i, target, j, size):
    """Set `size` numbers of a row of `target`, from index j, to those of `source` from index i."""
    whole = size - size % _lanes(source)
    for c in range(0, whole, _lanes(source)):
        _store(target, (j[0], j[1] + c), _load(source, (i[0], i[1] + c)))
    for c in range(whole, size):
        target[j[0], j[1] + c] = source[i[0], i[1] + c]


@_jit_inline
def _add(source, i, target, j, size):
    """As `_copy`, but add to what is there."""
    whole = size - size % _lanes(source)
    for c in range(0, whole, _lanes(source)):
        total = _load(target, (j[0], j[1] + c)) + _load(source, (i[0], i[1] + c))
        _store(target, (j[0], j[1] + c), total)
    for c in range(whole, size):
        target[j[0], j[1] + c] += source[i[0], i[1] + c]


@_jit
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


@_jit
def _prefetch_chunk(k, start, height, width, first, size, x_dbl, images):
    """Fetch a chunk's part of x_dbl and of `images` (length, dim) while another one is scanned.

    The loads of a chunk are too short, and too far apart in the column-major directions, for the
    processor to see them coming.
    """
    line = 64 // VECTOR_BYTES * _lanes(x_dbl)
    row = x_dbl.shape[1] // 4
    for step in range(max(start, 0), min(start + STEPS, height * width)):
        p = _pixel(k, step, height, width)
        for i in range(0, row + line - 1, line):
            _prefetch(x_dbl, (p, k * row + i))
        for image in images:
            for c in range(0, size, line):
                _prefetch(image, (p, first + c))


@_jit
def _project(W, bias, r, z):
    """Set z (STEPS, channels), delta before its softplus, to W r + bias.

    W (ranks, channels), r (STEPS, ranks), bias (channels).
    """
    for c in range(0, W.shape[1], _lanes(z)):
        for t in range(0, STEPS, 4):
            w = _load(W, (0, c))
            z0, z1, z2, z3 = w * r[t, 0], w * r[t + 1, 0], w * r[t + 2, 0], w * r[t + 3, 0]
            for i in range(1, W.shape[0]):
                w = _load(W, (i, c))
                z0 += w * r[t, i]
                z1 += w * r[t + 1, i]
                z2 += w * r[t + 2, i]
                z3 += w * r[t + 3, i]
            b = _load(bias, (c,))
            _store(z, (t, c), z0 + b)
            _store(z, (t + 1, c), z1 + b)
            _store(z, (t + 2, c), z2 + b)
            _store(z, (t + 3, c), z3 + b)


@_jit
def _scan_chunk(steps, A, delta, u, B, C, h, y):
    """Advance the states h (states, channels) over a chunk and add C . h to y (STEPS, channels)."""
    for n in range(0, A.shape[0], 4):
        for c in range(0, h.shape[1], _lanes(h)):
            A0, A1 = _load(A, (n, c)), _load(A, (n + 1, c))
            A2, A3 = _load(A, (n + 2, c)), _load(A, (n + 3, c))
            h0, h1 = _load(h, (n, c)), _load(h, (n + 1, c))
            h2, h3 = _load(h, (n + 2, c)), _load(h, (n + 3, c))
            for t in range(steps):
                d, v = _load(delta, (t, c)), _load(u, (t, c))
                h0 = _exp2(A0 * d) * h0 + v * B[t, n]
                h1 = _exp2(A1 * d) * h1 + v * B[t, n + 1]
                h2 = _exp2(A2 * d) * h2 + v * B[t, n + 2]
                h3 = _exp2(A3 * d) * h3 + v * B[t, n + 3]
                y_t = _load(y, (t, c)) + h0 * C[t, n] + h1 * C[t, n + 1]
                _store(y, (t, c), y_t + h2 * C[t, n + 2] + h3 * C[t, n + 3])
            _store(h, (n, c), h0)
            _store(h, (n + 1, c), h1)
            _store(h, (n + 2, c), h2)
            _store(h, (n + 3, c), h3)


@_jit
def _advance_chunk(steps, A, delta, u, B, h, h_next):
    """h_next (states, channels): the states h advanced over a chunk."""
    for n in range(0, A.shape[0], 2):
        for c in range(0, h.shape[1], _lanes(h)):
            A0, A1 = _load(A, (n, c)), _load(A, (n + 1, c))
            h0, h1 = _load(h, (n, c)), _load(h, (n + 1, c))
            for t in range(steps):
                d, v = _load(delta, (t, c)), _load(u, (t, c))
                h0 = _exp2(A0 * d) * h0 + v * B[t, n]
                h1 = _exp2(A1 * d) * h1 + v * B[t, n + 1]
            _store(h_next, (n, c), h0)
            _store(h_next, (n + 1, c), h1)


@_jit
def _sweep_chunk(steps, A, delta, u, B, C, dy, h, g, du, ddelta, dA, dB, dC, work):
    """Walk backwards over a chunk that began with the states h (states, channels).

    g (states, channels) is a_{t+1} dL/dh_{t+1} on entry, of the step after the chunk, and becomes
    a_t dL/dh_t of its first step. du and ddelta (STEPS, channels) and dA (states, channels) are
    added to; ddelta lacks a factor ln(2), because A has one of log2(e). dB and dC (STEPS, states)
    are set. work (4, 2 STEPS, lanes) keeps a, h and the terms of dB and dC of two states.
    """
    a_s, h_s, dB_s, dC_s = work[0], work[1], work[2], work[3]
    for n in range(0, A.shape[0], 2):
        for c in range(0, h.shape[1], _lanes(h)):
            A0, A1 = _load(A, (n, c)), _load(A, (n + 1, c))
            h0, h1 = _load(h, (n, c)), _load(h, (n + 1, c))
            for t in range(steps):
                d, v = _load(delta, (t, c)), _load(u, (t, c))
                a0, a1 = _exp2(A0 * d), _exp2(A1 * d)
                _store(a_s, (2 * t, 0), a0)
                _store(a_s, (2 * t + 1, 0), a1)
                _store(h_s, (2 * t, 0), h0)
                _store(h_s, (2 * t + 1, 0), h1)
                h0 = a0 * h0 + v * B[t, n]
                h1 = a1 * h1 + v * B[t, n + 1]
            g0, g1 = _load(g, (n, c)), _load(g, (n + 1, c))
            dA0, dA1 = _load(dA, (n, c)), _load(dA, (n + 1, c))
            for t in range(steps - 1, -1, -1):
                d, v, w = _load(delta, (t, c)), _load(u, (t, c)), _load(dy, (t, c))
                g0 += w * C[t, n]
                g1 += w * C[t, n + 1]
                dC0, dC1 = w * h0, w * h1
                dB0, dB1 = g0 * v, g1 * v
                _store(du, (t, c), _load(du, (t, c)) + g0 * B[t, n] + g1 * B[t, n + 1])
                g0 *= _load(a_s, (2 * t, 0))
                g1 *= _load(a_s, (2 * t + 1, 0))
                h0, h1 = _load(h_s, (2 * t, 0)), _load(h_s, (2 * t + 1, 0))
                e0, e1 = g0 * h0, g1 * h1
                _store(ddelta, (t, c), _load(ddelta, (t, c)) + e0 * A0 + e1 * A1)
                dA0 += e0 * d
                dA1 += e1 * d
                if c > 0:
                    dB0 += _load(dB_s, (2 * t, 0))
                    dB1 += _load(dB_s, (2 * t + 1, 0))
                    dC0 += _load(dC_s, (2 * t, 0))
                    dC1 += _load(dC_s, (2 * t + 1, 0))
                _store(dB_s, (2 * t, 0), dB0)
                _store(dB_s, (2 * t + 1, 0), dB1)
                _store(dC_s, (2 * t, 0), dC0)
                _store(dC_s, (2 * t + 1, 0), dC1)
            _store(g, (n, c), g0)
            _store(g, (n + 1, c), g1)
            _store(dA, (n, c), dA0)
            _store(dA, (n + 1, c), dA1)
        for t in range(steps):
            for i in range(2):
                dB[t, n + i] = _sum(_load(dB_s, (2 * t + i, 0)))
                dC[t, n + i] = _sum(_load(dC_s, (2 * t + i, 0)))


@_jit
def _sweep_projection(steps, W, r, dz, dr, dW, dbias):
    """dr (STEPS, ranks) is set, dW (ranks, channels) and dbias (channels) are added to."""
    for c in range(0, W.shape[1], _lanes(r)):
        total = _load(dbias, (c,))
        for t in range(steps):
            total += _load(dz, (t, c))
        _store(dbias, (c,), total)
    for i in range(0, W.shape[0], 4):
        for c in range(0, W.shape[1], _lanes(r)):
            s0, s1 = _load(dW, (i, c)), _load(dW, (i + 1, c))
            s2, s3 = _load(dW, (i + 2, c)), _load(dW, (i + 3, c))
            for t in range(steps):
                d = _load(dz, (t, c))
                s0 += d * r[t, i]
                s1 += d * r[t, i + 1]
                s2 += d * r[t, i + 2]
                s3 += d * r[t, i + 3]
            _store(dW, (i, c), s0)
            _store(dW, (i + 1, c), s1)
            _store(dW, (i + 2, c), s2)
            _store(dW, (i + 3, c), s3)
        for t in range(steps):
            d = _load(dz, (t, 0))
            s0, s1 = d * _load(W, (i, 0)), d * _load(W, (i + 1, 0))
            s2, s3 = d * _load(W, (i + 2, 0)), d * _load(W, (i + 3, 0))
            lanes = _lanes(r)
            for c in range(lanes, W.shape[1], lanes):
                d = _load(dz, (t, c))
                s0 += d * _load(W, (i, c))
                s1 += d * _load(W, (i + 1, c))
                s2 += d * _load(W, (i + 2, c))
                s3 += d * _load(W, (i + 3, c))
            dr[t, i], dr[t, i + 1] = _sum(s0), _sum(s1)
            dr[t, i + 2], dr[t, i + 3] = _sum(s2), _sum(s3)


@_jit
def _forward_block(image, block, height, width, dstate, rank, x, x_dbl, W, bias, A, D, y):
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
                for c in range(0, channels, _lanes(x)):
                    d, x_t = _softplus(_load(delta, (t, c)))[0], _load(xs, (t, c))
                    _store(delta, (t, c), d)
                    _store(u, (t, c), d * x_t)
                    _store(ys, (t, c), x_t * _load(D, (k, block, c)))
            _prefetch_chunk(k, start + STEPS, height, width, first, size, x_dbl, (x, y))
            _scan_chunk(steps, A[k, block], delta, u, B, C, h, ys)
            for t in range(steps):
                if k == 0:
                    _copy(ys, (t, 0), y, (pixels[t], first), size)
                else:
                    _add(ys, (t, 0), y, (pixels[t], first), size)


@_jit
def _backward_block(
    image, k, block, height, width, dstate, rank, dy, x, x_dbl, W, bias, A, D,
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
    work = np.empty((4, 2 * STEPS, _lanes(x)), x.dtype)
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
            for c in range(0, channels, _lanes(x)):
                d, s = _softplus(_load(delta, (t, c)))
                _store(delta, (t, c), d)
                _store(slope, (t, c), s)
                _store(u, (t, c), d * _load(xs, (t, c)))
        if forward:
            _prefetch_chunk(k, (chunk + 1) * STEPS, height, width, first, size, x_dbl, (x,))
            _advance_chunk(steps, A, delta, u, B, starts[chunk], starts[chunk + 1])
            continue

        _prefetch_chunk(k, (chunk - 1) * STEPS, height, width, first, size, x_dbl, (x, dy, dx))
        for t in range(steps):
            _copy(dy, (pixels[t], first), dys, (t, 0), size)
        du[:], ddelta[:], chunk_dA[:], chunk_dW[:], chunk_dbias[:], chunk_dD[:] = 0, 0, 0, 0, 0, 0
        _sweep_chunk(
            steps, A, delta, u, B, C, dys, starts[chunk], g, du, ddelta, chunk_dA, dB, dC, work
        )
        for t in range(steps):
            for c in range(0, channels, _lanes(x)):
                dy_t, x_t, du_t = _load(dys, (t, c)), _load(xs, (t, c)), _load(du, (t, c))
                dz = (_load(ddelta, (t, c)) * ln2 + du_t * x_t) * _load(slope, (t, c))
                _store(ddelta, (t, c), dz)
                _store(du, (t, c), du_t * _load(delta, (t, c)) + dy_t * _load(D, (c,)))
                _store(chunk_dD, (c,), _load(chunk_dD, (c,)) + dy_t * x_t)
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


def _run(function: Callable, jobs: Sequence[tuple[int, ...]], args: tuple, updates: int) -> None:
    threads.run(function, jobs, args, torch.get_num_threads() if updates > SMALL else 1)


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

    def __init__(self, channels: int, *tensors: Tensor):
        x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds = (t.detach() for t in tensors)
        self.batch, self.height, self.width, self.dim = x.shape
        self.rank, self.dstate = dt_projs_weight.shape[2], A_logs.shape[1]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        channels = min(channels, -(-self.dim // 16) * 16)  # whole vectors of any type
        self.blocks = -(-self.dim // channels)
        self.updates = 4 * x.numel() * self.dstate
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


def scan_2d_forward(
    x: Tensor,
    x_dbl: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
) -> Tensor:
    """`kernels.scan_reference.scan_2d` for CPU tensors, without gradients."""
    problem = _Problem(FORWARD_CHANNELS, x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    y = torch.empty(x.shape, dtype=problem.dtype)
    jobs = [(i, j) for i in range(problem.batch) for j in range(problem.blocks)]
    args = (*problem.sizes, *problem.inputs, problem.image(y))
    _run(_forward_block, jobs, args, problem.updates)
    return y.to(x.dtype)


def scan_2d_backward(
    dy: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six arguments of `scan_2d_forward` from `dy`, the gradient of its result.

    Each running job holds the states at the start of every chunk: dstate / STEPS times what its
    block of channels takes in `x`.
    """
    problem = _Problem(BACKWARD_CHANNELS, x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    batch, dim, blocks = problem.batch, problem.dim, problem.blocks
    dx = torch.zeros(x.shape, dtype=problem.dtype)
    dx_dbl = torch.zeros(x_dbl.shape, dtype=problem.dtype)
    dW, dbias, dA, dD = (
        torch.empty((batch, *p.shape), dtype=problem.dtype) for p in problem.inputs[2:]
    )
    results = (problem.image(dx), problem.image(dx_dbl), *(d.numpy() for d in (dW, dbias, dA, dD)))
    args = (*problem.sizes, problem.image(dy), *problem.inputs, *results)

    # Jobs of one block add to the same channels of dx, jobs of one direction to the same part of
    # dx_dbl. In each of the rounds every block and every direction of an image occurs once.
    rounds = max(4, blocks)
    for i in range(rounds):
        pairs = [(k, (i + k) % rounds) for k in range(4)]
        jobs = [(n, k, j) for n in range(batch) for k, j in pairs if j < blocks]
        _run(_backward_block, jobs, args, problem.updates // rounds)

    dA = _join(dA.sum(0), dim, problem.dstate) * problem.A
    return (
        dx.to(x.dtype),
        dx_dbl.to(x.dtype),
        _join(dW.sum(0), dim, problem.rank).to(dt_projs_weight.dtype),
        dbias.sum(0).flatten(1)[:, :dim].contiguous().to(dt_projs_bias.dtype),
        dA.reshape(A_logs.shape).to(A_logs.dtype),
        dD.sum(0).flatten(1)[:, :dim].reshape(-1).to(Ds.dtype),
    )
