"""The `.mvc` file: one coded picture, with what a decoder needs to get it right or refuse it.

Three versions, byte by byte: 1 is of networks of a single rate, 2 of those with gains, 3 of
pictures in tiles or with metadata. Integers are little-endian; a varint is LEB128 (seven bits a
byte, lowest first, the top bit set on all bytes but the last) in its shortest form. Versions 1
and 2:

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
version 2 25, and at most 4 for each guard entry, of which there is hardly ever one.

Version 3, whose tiles are laid out as `models/tiles.py` says:

============ ======= ==========================================================================
field        bytes   meaning
============ ======= ==========================================================================
magic        3       ``MVC``
version      1       bits 0 to 6: 3; bit 7: coded with the exact entropy path
fingerprint  4       as above
quality      2       hundredths of the quality, 0 to 10,000; 65,535 of networks of a single rate
height       varint  rows of the picture, 1 to 65,535
width        varint  columns of the picture, 1 to 65,535
tile         1       longest side of a tile, in 64 pixels; 0: the picture is one tile, which may
                     have 2**26 pixels
margin       1       what is seen of the surroundings of a tile, in 16 pixels
ICC length   varint  bytes of the ICC profile, at most 2**20
EXIF length  varint  bytes of the EXIF block, at most 2**20
index        varints bytes of each tile, row by row
header CRC   4       CRC-32 of every byte before it
metadata     above   ICC profile and EXIF block, then, unless both are empty, 4 bytes: their CRC-32
tiles        above   one after another, each of them
                     - guards, z length, string of z, string of y, symbol CRC: as above
                     - tile CRC: CRC-32 of the header CRC, the tile's number (4 bytes) and every
                       byte of the tile before it
============ ======= ==========================================================================

What the CRC of a tile begins with makes it that of this tile of this file: a tile in another's
place is damage. A tile takes 13 bytes beyond its strings, two of them in the index.

What is protected, and what is not:

- Damage by accident: the file CRC, or those of header, metadata and tiles, find it before anything
  is decoded. Tiles that are not damaged can be decoded all the same.
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
the file's: a flat picture of 8192x8192 pixels honestly takes 40 kB. Of a picture in tiles there are
at least 11 bytes for each. Who decodes files of strangers checks the size that `unpack` returns
against the memory there is.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from .grid import Span, spans

QUALITY_STEPS = 100  # in which a quality of 1 is coded
MAX_SIDE = 65_535
MAX_PIXELS = 2**26
MAX_BYTES = 2**28  # of a file
MAX_GUARDS = 2**20
MAX_METADATA = 2**20  # bytes of an ICC profile, and of an EXIF block
TILE_UNIT = 64  # pixels, of the sides of tiles
MARGIN_UNIT = 16  # pixels
MAX_UNITS = 255  # of each, which one byte can name
MAX_TILE, MAX_MARGIN = MAX_UNITS * TILE_UNIT, MAX_UNITS * MARGIN_UNIT
SIZE_BYTES = 20  # that `read_size` needs at most

_MAGIC = b"MVC"
_EXACT = 0x80
_FIXED = struct.Struct("<3sB4s")
_QUALITY = struct.Struct("<H")
_CHECKSUMS = struct.Struct("<II")
_CHECKSUM = struct.Struct("<I")
_NO_QUALITY = 0xFFFF
_TILED = 3  # version
_NAMED = 5  # damaged tiles, by messages
_LEAST_TILE = 11  # bytes: no guards, two empty strings, two checksums, one in the index
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


@dataclass(frozen=True)
class Tile:
    """A tile's part of a file: as of `Stream`, but for this tile."""

    guards: Sequence[tuple[int, int]]
    z: bytes
    y: bytes
    crc: int


@dataclass(frozen=True)
class TiledStream:
    """Contents of a `.mvc` file of version 3, of which tiles may be damaged or missing.

    Attributes:
        fingerprint, exact, height, width, quality: as of `Stream`.
        tile: longest side of a tile in pixels; 0 for one tile of any size.
        margin: pixels around a tile that its analysis and its synthesis see.
        icc, exif: ICC profile of the samples and EXIF block, empty where there is none.
        tiles: bytes of each tile, row by row, as they are in the file.
        seed: header CRC, from which those of the tiles start.
    """

    fingerprint: bytes
    exact: bool
    height: int
    width: int
    quality: float | None
    tile: int
    margin: int
    icc: bytes = b""
    exif: bytes = b""
    tiles: Sequence[bytes] = ()
    seed: int = 0

    version = _TILED

    @property
    def rows(self) -> list[Span]:
        """Rows of pixels of each row of tiles, of the picture padded to multiples of 64."""
        return _tile_spans(self.height, self.tile)

    @property
    def columns(self) -> list[Span]:
        """Columns of pixels of each column of tiles, likewise."""
        return _tile_spans(self.width, self.tile)

    def name(self, number: int) -> str:
        """What messages call a tile."""
        row, column = divmod(number, len(self.columns))
        return f"tile {number} (row {row}, column {column})"

    def is_whole(self, number: int) -> bool:
        """Whether a tile is there and its checksum matches."""
        data = self.tiles[number]
        if len(data) < _CHECKSUM.size:
            return False
        crc = _tile_crc(self.seed, number, memoryview(data)[: -_CHECKSUM.size])
        return _CHECKSUM.unpack_from(data, len(data) - _CHECKSUM.size)[0] == crc

    def damaged(self) -> list[int]:
        """Numbers of the tiles that are damaged or missing."""
        return [number for number in range(len(self.tiles)) if not self.is_whole(number)]

    def unpack_tile(self, number: int) -> Tile:
        """Contents of a tile.

        Raises:
            BitstreamError: it is damaged or missing.
        """
        if not self.is_whole(number):
            raise BitstreamError(f"{self.name(number)} is damaged or cut off")
        reader = _Reader(memoryview(self.tiles[number])[: -_CHECKSUM.size])
        return Tile(*reader.strings())


def describe_damage(stream: TiledStream, damaged: Sequence[int]) -> str:
    """Which tiles are damaged, in one line."""
    names = ", ".join(stream.name(number) for number in damaged[:_NAMED])
    more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
    verb = "is" if len(damaged) == 1 else "are"
    return f"{names}{more} of {len(stream.tiles)} tiles {verb} damaged or cut off"


def _tile_spans(length: int, tile: int) -> list[Span]:
    return spans(0, -(-length // TILE_UNIT) * TILE_UNIT, tile, TILE_UNIT)


def _tile_crc(seed: int, number: int, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(_CHECKSUMS.pack(seed, number)))


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


def check_tiled_size(height: int, width: int, tile: int) -> None:
    """`check_size` for pictures in tiles; 0 stands for a single one of any size.

    Raises:
        BitstreamError: it is outside the limits.
    """
    if tile == 0:
        check_size(height, width)
    elif not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise BitstreamError(
            f"a picture of {width}x{height} pixels is outside the limits: sides of 1 to {MAX_SIDE}"
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
        out += _QUALITY.pack(_steps(stream.quality))
    _write_varint(out, stream.height)
    _write_varint(out, stream.width)
    _write_strings(out, stream)
    if len(out) + _CHECKSUM.size > MAX_BYTES:
        raise ValueError(f"the file would take more than {MAX_BYTES} bytes; check the weights")
    out += _CHECKSUM.pack(zlib.crc32(out))
    return bytes(out)


def pack_tiles(stream: TiledStream, tiles: Sequence[Tile]) -> bytes:
    """Write a `.mvc` file of version 3.

    Args:
        stream: all but ``tiles`` and ``seed``, which are not read.
        tiles: row by row.

    Raises:
        BitstreamError: the picture's size or quality is outside the format's limits.
        ValueError: a field cannot be written; the message names it.
    """
    check_tiled_size(stream.height, stream.width, stream.tile)
    if len(stream.fingerprint) != 4:
        raise ValueError(f"expected a fingerprint of 4 bytes, got {len(stream.fingerprint)}")
    version = _TILED | (_EXACT if stream.exact else 0)
    out = bytearray(_FIXED.pack(_MAGIC, version, stream.fingerprint))
    out += _QUALITY.pack(_NO_QUALITY if stream.quality is None else _steps(stream.quality))
    _write_varint(out, stream.height)
    _write_varint(out, stream.width)
    for name, unit in (("tile", TILE_UNIT), ("margin", MARGIN_UNIT)):
        steps, rest = divmod(getattr(stream, name), unit)
        if rest or not 0 <= steps <= MAX_UNITS:
            raise ValueError(f"{name} should be a multiple of {unit} from 0 to {MAX_UNITS * unit}")
        out.append(steps)
    for name in ("icc", "exif"):
        length = len(getattr(stream, name))
        if length > MAX_METADATA:
            raise ValueError(f"{length} bytes of {name} are more than {MAX_METADATA}")
        _write_varint(out, length)
    if len(tiles) != len(stream.rows) * len(stream.columns):
        raise ValueError(f"there are {len(tiles)} tiles, which do not make up the picture")
    bodies = []
    for tile in tiles:
        bodies.append(bytearray())
        _write_strings(bodies[-1], tile)
        _write_varint(out, len(bodies[-1]) + _CHECKSUM.size)
    seed = zlib.crc32(out)
    out += _CHECKSUM.pack(seed)
    if metadata := stream.icc + stream.exif:
        out += metadata + _CHECKSUM.pack(zlib.crc32(metadata))
    for number, body in enumerate(bodies):
        out += body + _CHECKSUM.pack(_tile_crc(seed, number, body))
    if len(out) > MAX_BYTES:
        raise ValueError(f"the file would take more than {MAX_BYTES} bytes; check the weights")
    return bytes(out)


def _steps(quality: float) -> int:
    if coded_quality(quality) != quality:
        raise ValueError(f"a quality of {quality!r} cannot be written; see coded_quality")
    return round(quality * QUALITY_STEPS)


def _write_strings(out: bytearray, stream: Stream | Tile) -> None:
    """Write guards, z, y and the checksum of the symbols."""
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
    out += _CHECKSUM.pack(stream.crc)


def unpack(data: bytes, salvage: bool = False) -> Stream | TiledStream:
    """Read a `.mvc` file. Time and memory are bounded by the file's own length.

    Of a file of version 3 the header is checked; tiles are when they are unpacked.

    Args:
        salvage: let metadata go that is damaged, and what follows the last tile.

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
    exact, version = _exact_and_version(version)
    if version == _TILED:
        return _unpack_tiles(data, model, exact, salvage)
    (file_crc,) = _CHECKSUM.unpack_from(data, len(data) - _CHECKSUM.size)
    if zlib.crc32(memoryview(data)[: -_CHECKSUM.size]) != file_crc:
        raise BitstreamError("the file is damaged or cut off: its checksum does not match")
    reader = _Reader(memoryview(data)[_FIXED.size : -_CHECKSUM.size])
    quality = None
    if version == 2:
        quality = reader.quality()
    height, width = reader.varint(), reader.varint()
    check_size(height, width)
    return Stream(model, exact, height, width, *reader.strings(), quality)


def _unpack_tiles(data: bytes, model: bytes, exact: bool, salvage: bool) -> TiledStream:
    reader = _Reader(memoryview(data)[_FIXED.size :])
    quality = reader.quality(or_none=True)
    height, width = reader.varint(), reader.varint()
    tile, margin = (
        int(byte) * unit
        for byte, unit in zip(reader.take(2), (TILE_UNIT, MARGIN_UNIT), strict=True)
    )
    # Nothing is allocated for a picture whose header nobody wrote: its checksum is yet to come.
    check_tiled_size(height, width, tile)
    sizes = reader.varint(), reader.varint()
    # Counted without laying them out.
    count = 1
    if tile:
        for side in (height, width):
            count *= -(-(-(-side // TILE_UNIT) * TILE_UNIT) // tile)
    if count > len(reader.left):
        raise BitstreamError(
            f"the file is damaged or cut off: {count} tiles with {len(reader.left)} bytes left"
        )
    lengths = [reader.varint() for _ in range(count)]
    seed = zlib.crc32(memoryview(data)[: len(data) - len(reader.left)])
    if reader.take(_CHECKSUM.size) != _CHECKSUM.pack(seed):
        raise BitstreamError("the file's header is damaged: its checksum does not match")
    if max(sizes) > MAX_METADATA or min(lengths) < _LEAST_TILE - 1:
        raise BitstreamError("the file is damaged: lengths in its header are out of range")
    icc, exif = _read_metadata(reader, *sizes, salvage) if any(sizes) else (b"", b"")
    tiles = [reader.take_some(length) for length in lengths]
    if reader.left and not salvage:
        raise BitstreamError(f"{len(reader.left)} bytes follow the last tile: the file is damaged")
    return TiledStream(model, exact, height, width, quality, tile, margin, icc, exif, tiles, seed)


def _read_metadata(
    reader: "_Reader", icc_length: int, exif_length: int, salvage: bool
) -> tuple[bytes, bytes]:
    metadata = reader.take_some(icc_length + exif_length)
    if reader.take_some(_CHECKSUM.size) == _CHECKSUM.pack(zlib.crc32(metadata)):
        return metadata[:icc_length], metadata[icc_length:]
    if salvage:
        return b"", b""
    raise BitstreamError("the file's metadata is damaged; --salvage decodes it without")


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width that a `.mvc` file states, from its first `SIZE_BYTES` bytes.

    They are not checked, neither against the format's limits nor by the file's checksum.

    Raises:
        BitstreamError: these bytes begin no file of a supported version.
    """
    if data[: len(_MAGIC)] != _MAGIC or len(data) < _FIXED.size:
        raise BitstreamError("not an .mvc file: it does not begin with a whole header")
    _, version = _exact_and_version(data[len(_MAGIC)])
    reader = _Reader(memoryview(data)[_FIXED.size :])
    if version != 1:
        reader.take(_QUALITY.size)
    return reader.varint(), reader.varint()


def _exact_and_version(byte: int) -> tuple[bool, int]:
    exact, version = bool(byte & _EXACT), byte & ~_EXACT
    if version not in (1, 2, _TILED):
        raise BitstreamError(f"version {version} of the format is not supported, only 1 to 3")
    return exact, version


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

    def take_some(self, length: int) -> bytes:
        """At most so many bytes, fewer where the file is cut off."""
        return self.take(min(length, len(self.left)))

    def quality(self, or_none: bool = False) -> float | None:
        """A quality; ``or_none`` if that may be written in its place."""
        (steps,) = _QUALITY.unpack(self.take(_QUALITY.size))
        return None if or_none and steps == _NO_QUALITY else check_quality(steps / QUALITY_STEPS)

    def strings(self) -> tuple[list[tuple[int, int]], bytes, bytes, int]:
        """Guards, z, y and the checksum of the symbols, with which the bytes end."""
        guards = self.guards()
        z = self.take(self.varint())
        y = self.take(max(len(self.left) - _CHECKSUM.size, 0))
        (crc,) = _CHECKSUM.unpack(self.take(_CHECKSUM.size))
        return guards, z, y, crc

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
