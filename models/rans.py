"""Entropy coding of integer symbols with tabulated distributions: rANS (arXiv:1311.2540).

Format of a string. The coder's state is an integer x that starts at 2**16; symbols are coded last
to first, so that they are decoded first to last. To code a symbol of frequency f whose cumulative
frequency is c (16-bit precision), the low 16 bits of x are moved to the string if x >= f * 2**32;
then x becomes (x // f) * 2**16 + x % f + c. The string is the final x, little-endian, in as few
bytes as it takes (3 to 6), followed by the 16-bit words in the order the decoder needs them, last
moved first. There are words only where x takes 5 or 6 bytes, so the parity of the string's length
tells which. A decoder must end with x = 2**16 and no bytes left.

A value that its table does not hold is coded as the table's last entry, followed by its distance
from the table in Elias gamma code. Distances are 1, 3, 5 and so on for the values above the
table, 2, 4, 6 and so on for those below. Of a distance's bits the highest one is left out; their
number is coded in 5 bits, then those above the lowest 16 bits, then the lowest 16. k bits of value
v are a symbol of frequency 2**(16 - k) and cumulative frequency v * 2**(16 - k).

CompressAI's coder is not used because it trusts its input: it reads beyond the end of a string
that is cut off or made up, takes table indexes as they come, and cannot tell that a string holds
more or less than what was asked for. Here any bytes are safe, and all of these are noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from layers.compressai import EntropyModel

from .container import BitstreamError

# float32 holds every integer up to here; latents beyond it are not worth coding.
MAX_SYMBOL = 2**24

_PRECISION = 16
_TOTAL = 1 << _PRECISION  # of the frequencies of a table
_LOW = _TOTAL - 1
_MAX_UINT64 = np.uint64(2**64 - 1)
_FIRST_STATE = 1 << 16
_REFILL = 1 << 32  # below this the decoder takes a word, if there is one
_LENGTH_BITS = 5
_LOOKUP_BITS = 10  # leading bits of a cumulative frequency that the symbol search starts from
_LOOKUP_SHIFT = _PRECISION - _LOOKUP_BITS
_WORDS_PER_SYMBOL = 4  # an entry, a length and up to 26 bits, each moving at most one word

_OK, _BAD_INDEX, _BAD_SYMBOL, _EXHAUSTED = range(4)


def _jit(function: Callable) -> Callable:
    # What Numba keeps on disk imports this module by the name it had: hubconf.py has another one.
    function.__qualname__ = f"{__name__}.{function.__qualname__}"
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder that the compiled code could be kept in
        return numba.njit(nogil=True)(function)


class Tables(NamedTuple):
    """CDF tables of one entropy model, as CompressAI builds them (16-bit precision).

    Attributes:
        cdf: int32, flat; the rows of all tables, each from 0 to 65,536.
        rows: int32 (tables + 1,); where each table's row starts and ends in ``cdf``.
        offsets: int32 (tables,); symbol value of a table's first entry. The last entry of each
            table stands for all values outside it.
        lookup: int32 (tables, 1024); the entry that the decoder's search for a cumulative
            frequency starts from, by the frequency's leading 10 bits.
        likeliest: int32 (tables,); the entry with the highest frequency.
    """

    cdf: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    lookup: np.ndarray
    likeliest: np.ndarray

    @classmethod
    def of(cls, model: EntropyModel) -> Tables:
        """Tables of a CompressAI entropy model.

        Raises:
            ValueError: the model has none yet, or they are no valid CDF tables.
        """
        if model.quantized_cdf.numel() == 0:
            raise ValueError("the model has no CDF tables; call update() before coding")
        buffers = (model.quantized_cdf, model.cdf_length, model.offset)
        return cls.build(*(b.detach().cpu().numpy().astype(np.int32) for b in buffers))

    @classmethod
    def build(cls, cdfs: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> Tables:
        """Check and prepare tables.

        Args:
            cdfs: int32 (tables, longest); row k is valid up to ``lengths[k]`` and rises strictly
                from 0 to 65,536.
            lengths: int32 (tables,), at least 3: one value and the entry for all others.
            offsets: int32 (tables,), symbol value of a row's first entry.

        Raises:
            ValueError: these are no valid CDF tables.
        """
        if cdfs.ndim != 2 or not (lengths.shape == offsets.shape == cdfs.shape[:1]):
            raise ValueError(
                f"CDF tables of shape {cdfs.shape} do not go with {lengths.shape} lengths and "
                f"{offsets.shape} offsets; build them again with update(force=True)"
            )
        rows = np.zeros(len(cdfs) + 1, dtype=np.int32)
        lookup = np.empty((len(cdfs), 1 << _LOOKUP_BITS), dtype=np.int32)
        likeliest = np.empty(len(cdfs), dtype=np.int32)
        parts = []
        for k, (row, length, offset) in enumerate(zip(cdfs, lengths, offsets, strict=True)):
            part = row[: max(length, 0)].astype(np.int64)  # differences fit
            valid = 3 <= length <= len(row) and abs(int(offset)) <= MAX_SYMBOL
            if not (valid and part[0] == 0 and part[-1] == _TOTAL and (np.diff(part) > 0).all()):
                raise ValueError(
                    f"CDF table {k} is damaged: it should rise strictly from 0 to {_TOTAL}; "
                    "build the tables again with update(force=True)"
                )
            parts.append(part)
            rows[k + 1] = rows[k] + length
            buckets = np.arange(1 << _LOOKUP_BITS) << _LOOKUP_SHIFT
            lookup[k] = np.searchsorted(part, buckets, side="right") - 1
            likeliest[k] = np.diff(part).argmax()
        return cls(np.concatenate(parts).astype(np.int32), rows, offsets, lookup, likeliest)


def encode(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    """Turn symbols (flat integers, at most 2**24 in size), each with its table's index, into bytes.

    Raises:
        ValueError: the two differ in shape, a symbol is larger than 2**24, or an index names no
            table.
    """
    if symbols.ndim != 1 or symbols.shape != indexes.shape:
        raise ValueError(
            f"expected flat symbols with an index each, got {symbols.shape} symbols and "
            f"{indexes.shape} indexes"
        )
    words = np.empty(_WORDS_PER_SYMBOL * len(symbols), dtype=np.uint16)
    status, first, x = _encode(
        symbols.astype(np.int32, copy=False), indexes.astype(np.int32, copy=False), tables, words
    )
    if status == _BAD_INDEX:
        raise ValueError(f"a table index is outside the {len(tables.offsets)} tables")
    if status == _BAD_SYMBOL:
        raise ValueError(f"a symbol is larger than {MAX_SYMBOL}; check the weights and picture")
    x = int(x)
    state = x.to_bytes((x.bit_length() + 7) // 8, "little")
    return state + words[first:].astype("<u2").tobytes()


class SymbolDecoder:
    """Reads the symbols of one string that `encode` made, in their order, in any portions.

    Any bytes are safe to decode: each call takes time proportional to its number of symbols.

    Raises:
        BitstreamError: the string cannot be what an encoder wrote.
    """

    def __init__(self, data: bytes, tables: Tables):
        length = len(data)
        state = length if length <= 6 else 6 - length % 2
        self._x = int.from_bytes(data[:state], "little")
        self._words = np.frombuffer(data, dtype="<u2", offset=state).astype(np.uint16)
        self._position = 0
        self._tables = tables
        if self._x < _FIRST_STATE:
            raise _exhausted()

    def get(self, indexes: np.ndarray, symbols: np.ndarray | None = None) -> np.ndarray:
        """Next symbols (int32, flat), one for each table index (int32, flat).

        Args:
            symbols: filled and returned, if there is such an array.

        Raises:
            BitstreamError: the string ends before, it holds an impossible value, or an index
                names no table.
        """
        if symbols is None:
            symbols = np.empty(len(indexes), dtype=np.int32)
        status, self._position, self._x = _decode(
            self._words,
            self._position,
            self._x,
            indexes.astype(np.int32, copy=False),
            self._tables,
            symbols,
        )
        if status == _EXHAUSTED:
            raise _exhausted()
        if status != _OK:
            raise BitstreamError("a coded value or table index is impossible; the file is damaged")
        return symbols

    def finish(self) -> None:
        """Check that the string holds no more than was read.

        Raises:
            BitstreamError: it does.
        """
        if self._x != _FIRST_STATE or self._position != len(self._words):
            raise BitstreamError(
                "a string holds more than the picture's symbols; the file is damaged"
            )


def _exhausted() -> BitstreamError:
    return BitstreamError("a string ends before the picture's last symbol; the file is damaged")


@intrinsic
def _high_product(context, a, b):
    """The upper 64 of the 128 bits of a product of two uint64."""

    def generate(context, builder, signature, args):
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(arg, wide) for arg in args))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return numba.uint64(numba.uint64, numba.uint64), generate


# Where arrays are handed from function to function they are counted, which takes longer than to
# code a symbol: only what is rare, the bits of values outside their tables, has such functions.


@_jit
def _coded(x, start, frequency):
    """The state after a symbol; before it x, uint64, is below frequency * 2**32."""
    frequency = np.uint64(frequency)
    # x // frequency as a product with 2**64 / frequency, rounded up: each symbol waits for the one
    # before it, and a division takes longest of all. For such a state it is exact.
    quotient = x
    if frequency > 1:
        quotient = _high_product(x, _MAX_UINT64 // frequency + np.uint64(1))
    return x + quotient * (np.uint64(_TOTAL) - frequency) + np.uint64(start)


@_jit
def _push_bits(x, value, count, words, first):
    shift = _PRECISION - count
    if x >> np.uint64(32) >= np.uint64(1 << shift):
        first -= 1
        words[first] = x & np.uint64(_LOW)
        x >>= np.uint64(_PRECISION)
    return _coded(x, value << shift, 1 << shift), first


@_jit
def _encode(symbols, indexes, tables, words):
    """Fill ``words`` from its end; return status, position of the first word, and state."""
    cdf, rows, offsets = tables[:3]
    x = np.uint64(_FIRST_STATE)
    first = len(words)
    for i in range(len(symbols) - 1, -1, -1):
        index = indexes[i]
        if not 0 <= index < len(offsets):
            return _BAD_INDEX, first, x
        if not -MAX_SYMBOL <= symbols[i] <= MAX_SYMBOL:
            return _BAD_SYMBOL, first, x
        row = rows[index]
        other = rows[index + 1] - row - 2
        entry = np.int64(symbols[i]) - offsets[index]
        if not 0 <= entry < other:
            distance = 2 * (entry - other) + 1 if entry >= other else -2 * entry
            length = 0
            while distance >> (length + 1):
                length += 1
            rest = distance - (1 << length)
            low = min(length, 16)
            x, first = _push_bits(x, rest & ((1 << low) - 1), low, words, first)
            x, first = _push_bits(x, rest >> low, length - low, words, first)
            x, first = _push_bits(x, length, _LENGTH_BITS, words, first)
            entry = other
        start = cdf[row + entry]
        frequency = cdf[row + entry + 1] - start
        if x >> np.uint64(32) >= np.uint64(frequency):
            first -= 1
            words[first] = x & np.uint64(_LOW)
            x >>= np.uint64(_PRECISION)
        x = _coded(x, start, frequency)
    return _OK, first, x


@_jit
def _pop_bits(x, count, words, position):
    shift = _PRECISION - count
    value = (x & _LOW) >> shift
    x = ((x >> _PRECISION) << shift) + (x & ((1 << shift) - 1))
    if x < _REFILL and position < len(words):
        x = x << _PRECISION | words[position]
        position += 1
    return value, x, position


@_jit
def _decode(words, position, x, indexes, tables, symbols):
    """Fill ``symbols``; return status, number of words read, and state."""
    cdf, rows, offsets, lookup, likeliest = tables
    for i in range(len(indexes)):
        index = indexes[i]
        if not 0 <= index < len(offsets):
            return _BAD_INDEX, position, x
        row = rows[index]
        frequency = x & _LOW
        # Each symbol waits for the one before it. The processor guesses that it is the likeliest,
        # and goes on with what it loaded in advance.
        entry = likeliest[index]
        start, end = cdf[row + entry], cdf[row + entry + 1]
        if not start <= frequency < end:
            entry = lookup[index, frequency >> _LOOKUP_SHIFT]
            while cdf[row + entry + 1] <= frequency:
                entry += 1
            start, end = cdf[row + entry], cdf[row + entry + 1]
        x = (end - start) * (x >> _PRECISION) + frequency - start
        if x < _REFILL and position < len(words):
            x = x << _PRECISION | words[position]
            position += 1
        other = rows[index + 1] - row - 2
        if entry == other:
            length, x, position = _pop_bits(x, _LENGTH_BITS, words, position)
            low = min(length, 16)
            high_bits, x, position = _pop_bits(x, length - low, words, position)
            low_bits, x, position = _pop_bits(x, low, words, position)
            distance = (1 << length) + (high_bits << low) + low_bits
            entry = other + distance // 2 if distance % 2 else -(distance // 2)
        # An encoder's state never falls below its first one.
        if x < _FIRST_STATE:
            return _EXHAUSTED, position, x
        symbol = offsets[index] + np.int64(entry)
        if not -MAX_SYMBOL <= symbol <= MAX_SYMBOL:
            return _BAD_SYMBOL, position, x
        symbols[i] = symbol
    return _OK, position, x
