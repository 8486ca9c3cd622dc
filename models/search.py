"""Search of the quality at which a network of every rate meets a target."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .container import QUALITY_STEPS, coded_quality

MAX_CODINGS = 8
STEP = 1 / QUALITY_STEPS  # between the qualities that a file can name
TOLERANCE = math.log(1.01)  # of 1 % of the file, or of the mean squared error


@dataclass(frozen=True)
class Coding:
    """A picture coded at a quality.

    Attributes:
        quality: 0 to 100.
        data: the `.mvc` file.
        measure: natural logarithm of what has a target; it rises with the quality.
    """

    quality: float
    data: bytes
    measure: float


def find_coding(code: Callable[[float], Coding], target: float) -> tuple[Coding, int]:
    """Code a picture until a measure is within `TOLERANCE` of a target.

    Sizes and errors change about exponentially with the quality. So an interval that holds the
    target is not halved, but divided where a line through the measures at its ends meets the
    target. Where the same end stays twice, its distance from the target counts half, or the
    interval would hardly shrink from that side (the Illinois method; Dowell and Jarratt, 1971).

    Returns:
        The coding that is nearest to the target, and how many there were, at most `MAX_CODINGS`.
        It is not within the tolerance where the target is out of reach, or where the measure
        jumps, as the sizes of tiny pictures do.
    """
    codings: list[Coding] = []
    ends = [0.0, 100.0]  # of the interval that holds the target
    excesses: list[float | None] = [None, None]  # of the measures there, of ends that were coded
    quality, last_side = 50.0, None
    while len(codings) < MAX_CODINGS:
        codings.append(code(quality))
        excess = codings[-1].measure - target
        if abs(excess) <= TOLERANCE:
            break
        side = int(excess > 0)
        other = 1 - side
        if quality == ends[other]:
            break  # the target lies beyond it
        ends[side], excesses[side] = quality, excess
        if None in excesses:
            quality = ends[other]
        else:
            if side == last_side:
                excesses[other] /= 2
            below, above = excesses
            # A perfect picture's measure is infinite: no line goes through it.
            share = below / (below - above) if math.isfinite(above) else 0.5
            least, most = (coded_quality(q) for q in (ends[0] + STEP, ends[1] - STEP))
            if least > most:
                break  # no quality lies between them
            quality = coded_quality(ends[0] + share * (ends[1] - ends[0]))
            quality = min(max(quality, least), most)
        last_side = side
    nearest = min(codings, key=lambda coding: abs(coding.measure - target))
    return nearest, len(codings)
