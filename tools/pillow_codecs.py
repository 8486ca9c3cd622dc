"""Pillow's own lossy codecs: a picture at a number of bytes, or at a PSNR."""

from __future__ import annotations

import bisect
import functools
import io
from dataclasses import dataclass

from PIL import Image

import utils

# Differences in dB beyond it are none: of 8-bit samples only identical pictures get there.
MAX_PSNR = 150.0


@dataclass(frozen=True)
class Codec:
    """A format of Pillow's: its name there, the qualities it has and what else `save` is given."""

    format: str
    qualities: range
    options: dict


CODECS = {
    "JPEG": Codec("JPEG", range(1, 96), {"optimize": True}),  # above 95 it grows without a gain
    "WebP": Codec("WEBP", range(101), {"method": 6}),
    "AVIF": Codec("AVIF", range(101), {"speed": 6}),
}


def available() -> list[str]:
    """Names of the codecs that the installed Pillow writes and reads."""
    Image.init()
    return [n for n, c in CODECS.items() if c.format in Image.SAVE and c.format in Image.OPEN]


@dataclass(frozen=True)
class Coded:
    """A picture at one quality: its file's bytes, what they decode to (RGB), and PSNR in dB."""

    quality: int
    data: bytes
    image: Image.Image
    psnr: float


class Ladder:
    """One picture at all qualities of a codec. Each is coded when it is first asked for.

    Searches take it that bytes and PSNR rise with quality. Where they do not quite, as happens
    between neighbours, the result is near the best.

    Args:
        image: RGB.
        name: of `CODECS`.
    """

    def __init__(self, image: Image.Image, name: str):
        self.image = image
        self.codec = CODECS[name]
        self.at = functools.cache(self._code)

    def at_bytes(self, num_bytes: int) -> Coded:
        """The best quality of at most so many bytes, or the lowest if none is that small."""
        qualities = self.codec.qualities
        fitting = bisect.bisect_right(qualities, num_bytes, key=lambda q: len(self.at(q).data))
        return self.at(qualities[max(fitting - 1, 0)])

    def at_psnr(self, psnr: float) -> Coded:
        """The quality whose PSNR is nearest."""
        qualities = self.codec.qualities
        reached = bisect.bisect_left(qualities, psnr, key=lambda q: self.at(q).psnr)
        around = qualities[max(reached - 1, 0) : reached + 1]

        def distance(quality: int) -> float:
            return abs(min(self.at(quality).psnr, MAX_PSNR) - min(psnr, MAX_PSNR))

        return self.at(min(around, key=distance))

    def _code(self, quality: int) -> Coded:
        file = io.BytesIO()
        codec = self.codec
        self.image.save(file, format=codec.format, quality=quality, **codec.options)
        with Image.open(file) as image:
            decoded = image.convert("RGB")
        psnr = utils.psnr(utils.to_tensor(self.image), utils.to_tensor(decoded))
        return Coded(quality, file.getvalue(), decoded, psnr)
