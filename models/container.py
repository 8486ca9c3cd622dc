"""The `.mvc` file: one coded picture, with what a decoder needs to get it right or refuse it.

Two versions, byte by byte: 1 is of networks of a single rate, 2 of those with gains. Integers are
little-endian; a varint is LEB128 (seven bits a byte, lowest first, the top bit set on all bytes but
the last) in its shortest form.

============ ======= ==========================================================================
field        bytes   meaning
============ ======= ==========================================================================
magic        3       ``MVC``
version      1       bits 0 to 6: version, 1 or 2; bit 7: coded with the exact entropy path
fingerprint  4       which model decodes it; see `coding.fingerprint`
quality      2       in version 2 only: hundredths of the quality, 0 to 10,000
height       varint  rows of the picture, 1 to 65,535
width        varint  columns of the picture, 1 to 65,535; at most 2**26 pixels in all
guards       varint  number of guard entries, at most 2**20, then for each of them
             varint  - position of the symbol of y, less that of the entry before it
             1       - index of its table
z length     varint  bytes of the string of z
z            above   string of z (format in `models/rans.py`)
y            rest    string of y, up to the two checksums
symbol CRC   4       CRC-32 of all symbols of z and y, as the model counts them
file CRC     4       CRC-32 of every byte before it
============ ======= ==========================================================================

A picture of 768x512 takes 23 bytes beyond its two strings (3 + 1 + 4 + 2 + 2 + 1 + 2 + 4 + 4), in
version 2 25, and at most 4 for each guard entry: 39 and 41 with four.

What is protected, and what is not:

- Damage by accident: the file CRC finds it before anything is decoded.
- A decoder whose entropy path finds other means or scales than the encoder's did, as another
  machine's may: it reads other symbols, and the symbol CRC finds that.
- The wrong checkpoint: the fingerprint, 32 bits of a SHA-256 over all that decoding depends on,
  tells models apart, but not one that was made to share it. The symbol CRC is no second guard, as
  it says nothing of the synthesis behind the symbols: there, another model makes another picture.
- The picture's samples: not at all, since devices may differ by one grey level.
- Anything changed on purpose: not at all. Both checksums can be computed anew; a signature has to
  come from outside.

What limits a hostile file: its strings cannot be longer than it is, and decoding takes time and
memory in proportion to the picture's size, which the header states. That size is not bounded by
the file's: a flat picture of 8192x8192 pixels honestly takes 40 kB. Who decodes files of strangers
checks the size that `unpack` returns against the memory there is.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

QUALITY_STEPS = 100  # in which a quality of 1 is coded
MAX_SIDE = 65_535
MAX_PIXELS = 2**26
MAX_BYTES = 2**28  # of a file
MAX_GUARDS = 2**20

_MAGIC = b"MVC"
_EXACT = 0x80
_FIXED = struct.Struct("<3sB4s")
_QUALITY = struct.Struct("<H")
_CHECKSUMS = struct.Struct("<II")
_MAX_VARINT = 2**32


class BitstreamError(ValueError):
    """The bytes are not a stream that this model can decode to the right picture."""


@dataclass(frozen=True)
class Stream:
    """Contents of a `.mvc` file.

    Attributes:
        fingerprint: 4 bytes that name the model.
        exact: coded with the exact entropy path, so that any machine can decode it.
        height, width: of the picture, in pixels.
        guards: (position, table index) of guarded symbols of y, positions rising.
        z, y: strings of the latents.
        crc: CRC-32 of the symbols.
        quality: 0 to 100 in steps of 0.01, of a network with gains; else None.
    """

    fingerprint: bytes
    exact: bool
    height: int
    width: int
    guards: Sequence[tuple[int, int]]
    z: bytes
    y: bytes
    crc: int
    quality: float | None = None

    @property
    def version(self) -> int:
        """Of the format."""
        return 1 if self.quality is None else 2


def check_quality(quality: float) -> float:
    """Return the quality of a network with gains, if it is one.

    Raises:
        BitstreamError: it is not from 0 to 100.
    """
    if not 0 <= quality <= 100:
        raise BitstreamError(f"a quality of {quality:g} is outside the range from 0 to 100")
    return quality


def coded_quality(quality: float) -> float:
    """The quality that a file can name and that is nearest to this one.

    Raises:
        BitstreamError: it is not from 0 to 100.
    """
    return round(check_quality(quality) * QUALITY_STEPS) / QUALITY_STEPS


def check_size(height: int, width: int) -> None:
    """Check a picture's size against the format's limits.

    Raises:
        BitstreamError: it is outside them.
    """
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * width <= MAX_PIXELS):
        raise BitstreamError(
            f"a picture of {width}x{height} pixels is outside the limits: sides of 1 to "
            f"{MAX_SIDE} and at most {MAX_PIXELS} pixels in all"
        )


def pack(stream: Stream) -> bytes:
    """Write a `.mvc` file.

    Raises:
        BitstreamError: the picture's size or quality is outside the format's limits.
        ValueError: a field cannot be written; the message names it.
    """
    check_size(stream.height, stream.width)
    if len(stream.fingerprint) != 4:
        raise ValueError(f"expected a fingerprint of 4 bytes, got {len(stream.fingerprint)}")
    version = stream.version | (_EXACT if stream.exact else 0)
    out = bytearray(_FIXED.pack(_MAGIC, version, stream.fingerprint))
    if stream.quality is not None:
        if coded_quality(stream.quality) != stream.quality:
            raise ValueError(
                f"a quality of {stream.quality!r} cannot be written; see coded_quality"
            )
        out += _QUALITY.pack(round(stream.quality * QUALITY_STEPS))
    _write_varint(out, stream.height)
    _write_varint(out, stream.width)
    if len(stream.guards) > MAX_GUARDS:
        raise ValueError(f"{len(stream.guards)} guard entries are more than {MAX_GUARDS}")
    _write_varint(out, len(stream.guards))
    last = -1
    for position, index in stream.guards:
        if not (last < position < _MAX_VARINT and 0 <= index < 256):
            raise ValueError(
                f"guard ({position}, {index}) cannot be written: positions must rise and be below "
                "2**32, indexes must be below 256"
            )
        _write_varint(out, position - max(last, 0))
        out.append(index)
        last = position
    _write_varint(out, len(stream.z))
    out += stream.z
    out += stream.y
    if len(out) + _CHECKSUMS.size > MAX_BYTES:
        raise ValueError(f"the file would take more than {MAX_BYTES} bytes; check the weights")
    out += struct.pack("<I", stream.crc)
    out += struct.pack("<I", zlib.crc32(out))
    return bytes(out)


def unpack(data: bytes) -> Stream:
    """Read a `.mvc` file. Time and memory are bounded by the file's own length.

    Raises:
        BitstreamError: it is not one, it is damaged, or its version, size or quality is not
            supported.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise BitstreamError("not an .mvc file: it does not begin with the letters MVC")
    if len(data) > MAX_BYTES:
        raise BitstreamError(f"the file is too long: at most {MAX_BYTES} bytes are supported")
    if len(data) < _FIXED.size + _CHECKSUMS.size:
        raise BitstreamError(f"the file is cut off: {len(data)} bytes are less than any header")
    _, version, model = _FIXED.unpack_from(data)
    exact, version = bool(version & _EXACT), version & ~_EXACT
    if version not in (1, 2):
        raise BitstreamError(f"version {version} of the format is not supported, only 1 and 2")
    crc, file_crc = _CHECKSUMS.unpack_from(data, len(data) - _CHECKSUMS.size)
    if zlib.crc32(memoryview(data)[:-4]) != file_crc:
        raise BitstreamError("the file is damaged or cut off: its checksum does not match")
    reader = _Reader(memoryview(data)[_FIXED.size : -_CHECKSUMS.size])
    quality = None
    if version == 2:
        (steps,) = _QUALITY.unpack(reader.take(_QUALITY.size))
        quality = check_quality(steps / QUALITY_STEPS)
    height, width = reader.varint(), reader.varint()
    check_size(height, width)
    guards = reader.guards()
    z = reader.take(reader.varint())
    y = reader.take(len(reader.left))
    return Stream(model, exact, height, width, guards, z, y, crc, quality)


class _Reader:
    """Takes fields off the front of ``left``, none of them longer than it is."""

    def __init__(self, left: memoryview):
        self.left = left

    def take(self, length: int) -> bytes:
        if length > len(self.left):
            raise BitstreamError(
                f"the file is damaged: a length of {length} bytes with {len(self.left)} bytes left"
            )
        taken, self.left = self.left[:length], self.left[length:]
        return bytes(taken)

    def varint(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 28:
                raise BitstreamError("the file is damaged: a number takes more than five bytes")
        if value >= _MAX_VARINT or (byte == 0 and shift > 7):
            raise BitstreamError("the file is damaged: a number is not in its shortest form")
        return value

    def guards(self) -> list[tuple[int, int]]:
        count = self.varint()
        if 2 * count > len(self.left) or count > MAX_GUARDS:
            raise BitstreamError(
                f"the file is damaged: {count} guard entries with {len(self.left)} bytes left"
            )
        guards: list[tuple[int, int]] = []
        position = 0
        for _ in range(count):
            step = self.varint()
            position += step
            if (guards and step == 0) or position >= _MAX_VARINT:
                raise BitstreamError("the file is damaged: guard positions do not rise")
            guards.append((position, self.take(1)[0]))
        return guards


def _write_varint(out: bytearray, value: int) -> None:
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
