"""The `.mvc` file: what is written is what is read, and nothing else is read."""

import dataclasses
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import container
from models.container import BitstreamError, Stream, pack, unpack

KODAK = Stream(
    fingerprint=b"\x01\x02\x03\x04",
    exact=True,
    height=512,
    width=768,
    guards=[(70_000, 5), (160_000, 63), (300_000, 1), (491_519, 40)],
    z=bytes(range(200)) * 5,
    y=bytes(range(250)) * 60,
    crc=0xDEADBEEF,
)


def seal(data):
    """The bytes with a file CRC that fits them."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


@st.composite
def streams(draw):
    height = draw(st.integers(1, container.MAX_SIDE))
    positions = draw(st.lists(st.integers(0, 2**32 - 1), max_size=20, unique=True))
    return Stream(
        fingerprint=draw(st.binary(min_size=4, max_size=4)),
        exact=draw(st.booleans()),
        height=height,
        width=draw(st.integers(1, min(container.MAX_SIDE, container.MAX_PIXELS // height))),
        guards=[(position, draw(st.integers(0, 255))) for position in sorted(positions)],
        z=draw(st.binary(max_size=300)),
        y=draw(st.binary(max_size=300)),
        crc=draw(st.integers(0, 2**32 - 1)),
        quality=draw(st.none() | st.integers(0, 10_000).map(lambda steps: steps / 100)),
    )


@given(streams())
@settings(deadline=None)
def test_what_is_packed_is_unpacked(stream):
    data = pack(stream)
    assert unpack(data) == stream
    assert pack(unpack(data)) == data


@given(streams())
@settings(deadline=None)
def test_size_is_read_from_the_first_bytes(stream):
    assert container.read_size(pack(stream)[: container.SIZE_BYTES]) == (
        stream.height,
        stream.width,
    )


@pytest.mark.parametrize("length", [0, 3, 7, 8, 10])
def test_size_of_a_header_that_is_cut_off_is_refused(length):
    with pytest.raises(BitstreamError):
        container.read_size(pack(KODAK)[:length])


@given(st.binary(max_size=80), st.booleans(), st.sampled_from([b"\x81", b"\x82"]))
@settings(max_examples=500, deadline=None)
def test_random_bytes_are_refused(data, sealed, version):
    """With a CRC that fits, they may be a file, but then this very one."""
    if sealed:
        data = seal(b"MVC" + version + data + bytes(8))
    try:
        stream = unpack(data)
    except BitstreamError as error:
        assert "\n" not in str(error)
    else:
        assert sealed
        assert pack(stream) == data


def test_kodak_picture_takes_at_most_40_bytes_beyond_its_strings():
    assert len(pack(KODAK)) - len(KODAK.y) - len(KODAK.z) == 39
    bare = dataclasses.replace(KODAK, guards=[])
    assert len(pack(bare)) - len(bare.y) - len(bare.z) == 23
    assert len(pack(dataclasses.replace(bare, quality=50.0))) == len(pack(bare)) + 2


def test_bytes_are_those_of_the_table_in_the_docstring():
    data = pack(dataclasses.replace(KODAK, height=1, width=300, z=b"zz", y=b"yyy"))
    body = (
        b"MVC\x81\x01\x02\x03\x04" + b"\x01" + b"\xac\x02" + b"\x04"
        b"\xf0\xa2\x04\x05" + b"\x90\xbf\x05\x3f" + b"\xe0\xc5\x08\x01" + b"\x9f\xd8\x0b\x28"
        b"\x02zzyyy" + b"\xef\xbe\xad\xde"
    )
    assert data == body + struct.pack("<I", zlib.crc32(body))
    of_version_2 = dataclasses.replace(unpack(data), quality=43.21)
    body = b"MVC\x82" + body[4:8] + b"\xe1\x10" + body[8:]
    assert pack(of_version_2) == body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize("quality", [None, 33.3])
def test_every_flipped_bit_and_every_cut_is_refused(quality):
    data = pack(dataclasses.replace(KODAK, z=b"zz", y=b"yyy", quality=quality))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            unpack(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            unpack(data[:length])
    with pytest.raises(BitstreamError):
        unpack(data + b"\0")


def header(height=b"\x01", width=b"\x01", guards=b"\x00", z=b"\x00", version=b"\x81"):
    """A file with the given fields, a fitting CRC and two bytes of y."""
    return seal(b"MVC" + version + bytes(4) + height + width + guards + z + b"yy" + bytes(8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an .mvc file"),
        (b"\x89PNG\r\n\x1a\n", "not an .mvc file"),
        (b"MVC\x81", "cut off"),
        (header(version=b"\x84"), "version 4"),
        (header(version=b"\x82", height=b"\x11\x27\x01"), "quality of 100.01 is outside"),
        (header(version=b"\x00"), "version 0"),
        (header(height=b"\x00"), "1x0"),
        (header(width=b"\x80\x80\x04"), "65536x1"),
        (header(height=b"\xff\xff\x03", width=b"\xff\xff\x03"), "65535x65535"),
        (header(height=b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), "five bytes"),
        (header(height=b"\xff\xff\xff\xff\x7f"), "shortest"),
        (header(height=b"\x81\x00"), "shortest"),
        (header(guards=b"\xff\xff\xff\xff\x0f"), "4294967295 guard entries"),
        (header(guards=b"\x02\x05\x01\x00\x01"), "do not rise"),
        (header(guards=b"\x02\xff\xff\xff\xff\x0f\x01\x05\x01"), "do not rise"),
        (header(z=b"\x7f"), "length of 127"),
        (header(z=b"\xff\xff\xff\xff\x0f"), "length of 4294967295"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_header_is_refused_at_once(data, message):
    with pytest.raises(BitstreamError, match=message):
        unpack(data)


TILED = container.TiledStream(b"1234", True, 150, 180, 12.5, 64, 32, b"a profile", b"exif")
TILES = [container.Tile([(5, 1), (9, 2)], bytes(i), bytes([i]) * 9, i) for i in range(9)]


def test_what_is_packed_in_tiles_is_unpacked():
    stream = unpack(container.pack_tiles(TILED, TILES))
    assert [stream.unpack_tile(i) for i in range(9)] == TILES
    assert dataclasses.replace(stream, tiles=(), seed=0) == TILED
    plain = dataclasses.replace(TILED, quality=None, tile=0, icc=b"", exif=b"", exact=False)
    stream = unpack(container.pack_tiles(plain, TILES[:1]))
    assert (dataclasses.replace(stream, tiles=(), seed=0), len(stream.tiles)) == (plain, 1)


def test_tile_takes_13_bytes_beyond_its_strings():
    """And the header 22 of this picture."""
    tiles = [container.Tile([], bytes(10), bytes(200), 0)] * 9
    plain = dataclasses.replace(TILED, icc=b"", exif=b"")
    assert len(container.pack_tiles(plain, tiles)) == 22 + 9 * (210 + 12)


def test_damaged_metadata_is_refused_or_salvaged_without():
    data = container.pack_tiles(TILED, TILES)
    damaged = data.replace(b"a profile", b"b profile")
    with pytest.raises(BitstreamError, match="metadata is damaged"):
        unpack(damaged)
    stream = unpack(damaged + b"more", salvage=True)
    assert (stream.icc, stream.exif, stream.damaged()) == (b"", b"", [])


def tiled_header(height=b"\x01", width=b"\x01", tile=b"\x01", icc=b"\0", exif=b"\0", index=b"\x0a"):
    """A file of version 3 up to its metadata, with a fitting CRC."""
    head = b"MVC\x83" + bytes(6) + height + width + tile + b"\x02" + icc + exif + index
    return head + struct.pack("<I", zlib.crc32(head))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiled_header(height=b"\x00"), "1x0"),
        (tiled_header(width=b"\x80\x80\x04"), "65536x1"),
        (tiled_header(height=b"\x80\x80\x40", width=b"\x80\x80\x40"), "1048576x1048576"),
        (tiled_header(height=b"\xff\xff\x03", width=b"\xff\xff\x03"), "1048576 tiles with 5 b"),
        (tiled_header(b"\xff\xff\x03", b"\xff\xff\x03", tile=b"\0"), "at most 67108864 pixels"),
        (tiled_header(index=b"\x09"), "lengths in its header"),
        (tiled_header(icc=b"\x81\x80\x40"), "lengths in its header"),
        (tiled_header(index=b""), "checksum does not match|cut off|length of"),
        (tiled_header(index=b"\x0a\x0a"), "header is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_header_of_tiles_is_refused_at_once(data, message):
    with pytest.raises(BitstreamError, match=message):
        unpack(data)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": b"123"},
        {"tile": 100},
        {"tile": 256 * 64},
        {"margin": 8},
        {"icc": bytes(2**20 + 1)},
        {"exif": bytes(2**20 + 1)},
        {"tile": 0},
        {"height": 65_536},
        {"quality": 33.333},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tiles_that_could_not_be_read_are_not_written(change):
    with pytest.raises(ValueError, match=r"fingerprint|multiple|bytes of|tiles|pixels|quality"):
        container.pack_tiles(dataclasses.replace(TILED, **change), TILES)


def test_smallest_and_largest_pictures_are_accepted():
    assert unpack(header()).height == 1
    assert unpack(header(height=b"\x80\x40", width=b"\x80\x40")).width == 8192


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": b"123"},
        {"guards": [(5, 1), (5, 2)]},
        {"guards": [(-1, 1)]},
        {"guards": [(2**32, 1)]},
        {"guards": [(1, 256)]},
        {"guards": [(i, 1) for i in range(container.MAX_GUARDS + 1)]},
        {"height": 0},
        {"width": container.MAX_SIDE + 1},
        {"height": 8193, "width": 8192},
        {"quality": 100.01},
        {"quality": float("nan")},
        {"quality": 33.333},
    ],
    ids=" ".join,
)
def test_what_could_not_be_read_is_not_written(change):
    with pytest.raises(ValueError, match=r"fingerprint|guard|pixels|quality"):
        pack(dataclasses.replace(KODAK, **change))
