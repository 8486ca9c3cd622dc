"""Search of the quality at which a network of every rate meets a target."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .container import coded_quality

MAX_CODINGS = 8
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

    Logarithms of size and error are nearly linear in the quality, so that the interval that holds
    the target is not halved, but divided where a line through its ends says. Four codings are
    usual.

    Returns:
        The coding that is nearest to the target, and how many there were, at most `MAX_CODINGS`.
        It is not within the tolerance where the target is out of reach, or where the measure has
        too few values between two qualities, as sizes of tiny pictures have.
    """
    below: Coding | None = None  # the target, and above it
    above: Coding | None = None
    codings: list[Coding] = []
    quality = 50.0
    while len(codings) < MAX_CODINGS:
        coding = code(quality)
        codings.append(coding)
        if abs(coding.measure - target) <= TOLERANCE:
            break
        if coding.measure < target:
            below = coding
        else:
            above = coding
        if below is None:
            quality = 0.0
        elif above is None:
            quality = 100.0
        else:
            share = (target - below.measure) / (above.measure - below.measure)
            # Off the ends, so that the interval shrinks; a perfect picture's measure is infinite.
            share = min(max(share, 0.05), 0.95) if math.isfinite(above.measure) else 0.5
            width = above.quality - below.quality
            quality = coded_quality(below.quality + share * width)
        if quality in {c.quality for c in codings}:
            break
    return min(codings, key=lambda c: abs(c.measure - target)), len(codings)
