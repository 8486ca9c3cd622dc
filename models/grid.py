"""Where the tiles of a picture lie, and what is computed of their surroundings."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[int, int]  # start and stop, of rows or of columns


def spans(start: int, length: int, longest: int, unit: int) -> list[Span]:
    """Divide a range into the fewest spans of at most so many units, as equal as units allow.

    Equal tiles leave no sliver at the end, which would cost bits, and are of few different sizes.

    Args:
        start, length: of the range.
        longest: a multiple of ``unit``; 0 for one span whatever the length.
        unit: the spans but the last one have lengths that are multiples of it.
    """
    units = -(-length // unit)
    count = -(-length // longest) if longest else 1
    edges = [start + unit * (i * units // count) for i in range(count)] + [start + length]
    return [(edges[i], edges[i + 1]) for i in range(count)]


def windows(inner: Sequence[Span], margin: int, unit: int, end: int) -> list[Span]:
    """For each span a window from 0 to ``end`` that has it inside, with a margin where there is
    room for one.

    All windows have one length, so that one CUDA graph serves them all: those at an end of the
    range see more on the other side.

    Args:
        inner: spans whose starts differ by multiples of ``unit``.
        margin, end: multiples of ``unit``.
        unit: of the windows' ends.
    """
    offset = inner[0][0] % unit
    longest = max(stop - start for start, stop in inner)
    length = min(end, -(-(offset + longest) // unit) * unit + 2 * margin)
    starts = [min(max(start - offset - margin, 0), end - length) for start, _ in inner]
    return [(start, start + length) for start in starts]


def overlapping(parts: Sequence[Span], span: Span) -> list[int]:
    """Indexes of the parts that have something in common with a span."""
    return [i for i, (start, stop) in enumerate(parts) if start < span[1] and stop > span[0]]
