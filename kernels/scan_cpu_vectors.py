"""Vectors of floats as values in code compiled by Numba, and the functions of one number on them.

A vector fills one register and has a type of its own (`Lanes`), so the speed of the scan does not
hang on what the compiler manages to vectorise. The exponentials are polynomials.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

LOG2E = 1 / math.log(2)
INDEX = ir.IntType(32)


def _vector_bytes() -> int:
    features = llvmlite.binding.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx") else 16


VECTOR_BYTES = _vector_bytes()
# What Numba keeps on disk imports modules by the names that they had: hubconf.py has other ones.
_VERSION = hashlib.sha256(Path(__file__).read_bytes() + __name__.encode()).hexdigest()[:8]


def jit(function, inline=False):
    """`njit` that releases the interpreter lock and caches on disk where a place is writable."""
    flags = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    flags["forceinline"] = inline
    # Numba compiles anew when the function's own file changes, but does not see that this one did:
    # the name under which it caches has to tell.
    function.__qualname__ += f"_{_VERSION}"
    try:
        return njit(cache=True, **flags)(function)
    except RuntimeError:
        return njit(**flags)(function)


jit_inline = functools.partial(jit, inline=True)


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


def num_lanes(array):
    """Numbers in a vector of the array's type: a constant, so that loops need no division."""


@overload(num_lanes)
def _overload_lanes(array):
    count = VECTOR_BYTES * 8 // array.dtype.bitwidth
    return lambda array: count


@intrinsic
def load(typingctx, array, index):
    """The vector that starts at array[index]."""

    def codegen(context, builder, signature, args):
        pointer = _lane_pointer(context, builder, array, args[0], index, args[1])
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Lanes(array.dtype)(array, index), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write the vector that starts at array[index]."""

    def codegen(context, builder, signature, args):
        pointer = _lane_pointer(context, builder, array, args[0], index, args[1])
        builder.store(args[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


@intrinsic
def prefetch(typingctx, array, index):
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
def add_lanes(typingctx, lanes):
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
def where_less(typingctx, left, right, then, otherwise):
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


def exp2(t):
    """2^t for t <= 0; NaN stays NaN."""


@overload(exp2)
def _overload_exp2(t):
    real, *limits = _LIMITS[t.real]
    rounding, lowest, *_ = map(real, limits)
    one = real(1)

    def exp2(t):
        t = where_less(t, lowest, lowest, t)
        n = t + rounding
        f = t - (n - rounding)
        return _times_power(f * _exp2_slope(f) + one, n)

    return exp2


def softplus(z):
    """log(1 + e^z), or z above 20 as in PyTorch, and its derivative; both to relative precision."""


@overload(softplus)
def _overload_softplus(z):
    real, *limits = _LIMITS[z.real]
    rounding, _, lowest, ln2_high, ln2_low = map(real, limits)
    zero, one, two, linear, log2e = real(0), real(1), real(2), real(20), real(LOG2E)

    def softplus(z):
        # e^-|z| = 2^n e^f; log(1 + v) = 2 artanh(v / (2 + v)).
        w = where_less(z, zero, z, zero - z)
        n = w * log2e + rounding
        whole = n - rounding
        f = ((w - whole * ln2_high) - whole * ln2_low) * log2e
        v = where_less(w, lowest, zero, _times_power(f * _exp2_slope(f) + one, n))
        s = v / (v + two)
        value = where_less(z, zero, zero, z) + s * two * _artanh_slope(s * s)
        slope = where_less(z, zero, v, one) / (v + one)
        return where_less(linear, z, z, value), where_less(linear, z, one, slope)

    return softplus
