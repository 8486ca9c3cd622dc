"""Pictures in tiles: any size in bounded memory, any part by itself.

A picture is padded to multiples of 64 and divided into tiles of about equal size (`grid.spans`).
What overlaps is seen twice, but coded once:

- Analysis: g_a sees a window, the tile and a margin around it, and of its y only the tile's part is
  kept. It is nearly what g_a makes of the whole picture.
- Entropy coding: each tile's y is coded as that of a picture of its size, with a z of its own.
  No tile needs another one's symbols, so they decode in any order and at the same time, and damage
  to one leaves the others.
- Synthesis: g_s sees a window of y_hat, the margins of which come from the tiles beside, and of its
  picture only the tile's part is kept. Where the tiles beside are damaged, it sees their mean.

Measured with `mambavc-light-0.0130` on Kodak (`tools/tiles.py`), against coding whole. Without a
margin, pixels within 8 of a seam lose 0.8 to 1.0 dB, and seams can be seen. With one of 32 pixels
they lose nothing, to 0.02 dB; 64 and 128 do no better, as scans forget. Linear ramps across the
overlap in place of a cut change PSNR at seams by less than 0.01 dB, and would make tiles depend on
each other's pictures: there are none. To code each tile with its margin would cost 27 % of the bits
at 512 pixels. To code it without costs what is predicted less well at the edges, and 13 bytes a
tile: 0.4 % at tiles of 256, at tiles of 512 nothing.

A region is synthesised in windows of its own, with the same margin: unless it is the whole picture
it differs from a part of the whole as much as two choices of tiles do, mostly by less than one
level. Scaled down, a picture is averaged block by block as it is decoded.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from PIL import Image, ImageStat
from torch import Tensor

import utils

from . import container
from .coding import Coder
from .container import BitstreamError, Tile, TiledStream
from .grid import Span, overlapping, spans, windows

LATENT = 16  # pixels for each row and column of y

Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow's
# Yields what it takes, so many items in all, and may show how far it is.
Track = Callable[[Iterable, int], AbstractContextManager[Iterable]]


def untracked(items: Iterable, total: int) -> AbstractContextManager[Iterable]:
    """A `Track` that shows nothing."""
    return contextlib.nullcontext(items)


def encode(
    coder: Coder,
    image: Image.Image,
    quality: float | None = None,
    *,
    tile: int,
    margin: int,
    icc: bytes = b"",
    exif: bytes = b"",
    jobs: int = 1,
    verify: bool = False,
    track: Track = untracked,
) -> bytes:
    """Code a picture as a `.mvc` file of version 3.

    Args:
        image: RGB.
        quality: 0 to 100, where the network has gains.
        tile: longest side of a tile, a multiple of 64; 0 for one tile.
        margin: pixels around a tile that its analysis and its synthesis see, a multiple of 16.
        icc, exif: metadata to carry.
        jobs: tiles coded at the same time, on the CPU.
        verify: decode the latents of each tile.

    Raises:
        BitstreamError: the picture is larger than the format allows.
        ValueError: see `Coder.compress`; or metadata is longer than the format allows.
    """
    if quality is not None:
        quality = container.coded_quality(quality)
    stream = TiledStream(
        fingerprint=coder.fingerprint,
        exact=coder.exact,
        height=image.height,
        width=image.width,
        quality=quality,
        tile=tile,
        margin=margin,
        icc=icc,
        exif=exif,
    )
    container.check_tiled_size(image.height, image.width, tile)
    device = next(coder.model.parameters()).device
    boxes = [
        [*zip(parts, windows(parts, margin, LATENT, parts[-1][1]), strict=True)]
        for parts in (stream.rows, stream.columns)
    ]

    def work(place: tuple[tuple[Span, Span], tuple[Span, Span]]) -> Tile:
        (row, row_window), (column, column_window) = place
        y = coder.latents(_pixels(image, row_window, column_window).to(device), quality)
        y = y[..., _within(row, row_window), _within(column, column_window)]
        coded = coder.compress_latents(y, quality)
        ((y_string,), (z_string,)) = coded["strings"]
        (guards,), (crc,) = coded["guards"], coded["crcs"]
        coded_tile = Tile(guards, z_string, y_string, crc)
        if verify:
            _decode_tile(coder, coded_tile, stream, row, column)
        return coded_tile

    places = [*itertools.product(*boxes)]
    with _workers(coder, jobs) as run, track(run(work, places), len(places)) as done:
        tiles = [*done]
    return container.pack_tiles(stream, tiles)


def decode(
    coder: Coder,
    stream: TiledStream,
    *,
    region: tuple[int, int, int, int] | None = None,
    scale: int = 1,
    jobs: int = 1,
    salvage: bool = False,
    track: Track = untracked,
) -> tuple[Image.Image, list[int]]:
    """Decode a file of version 3, or a part of it.

    Args:
        region: (x, y, width, height) of a part, inside the picture.
        scale: 1, 2, 4 or 8: sides are divided by it, by averaging squares of pixels.
        jobs: tiles decoded at the same time, on the CPU.
        salvage: fill tiles that are damaged with the mean of those around them.

    Returns:
        The picture, RGB, and the numbers of tiles that were filled.

    Raises:
        BitstreamError: another model made the file, or a tile that is needed is damaged.
        ValueError: see `Coder.decompress`.
    """
    coder.check_model(stream)
    x, y, width, height = region or (0, 0, stream.width, stream.height)
    if (width, height) == (stream.width, stream.height) or not stream.tile:
        blocks = [stream.rows, stream.columns]
    else:
        blocks = [spans(start, n, stream.tile, LATENT) for start, n in ((y, height), (x, width))]
    rows, columns = (
        [*zip(parts, windows(parts, stream.margin, LATENT, whole[-1][1]), strict=True)]
        for parts, whole in zip(blocks, (stream.rows, stream.columns), strict=True)
    )
    across = len(stream.columns)
    needed_columns = overlapping(stream.columns, (columns[0][1][0], columns[-1][1][1]))
    needed_rows = [overlapping(stream.rows, window) for _, window in rows]

    def numbers(tile_rows: Iterable[int]) -> list[int]:
        return [across * row + column for row in tile_rows for column in needed_columns]

    all_rows = range(needed_rows[0][0], needed_rows[-1][-1] + 1)
    damaged = {number for number in numbers(all_rows) if not stream.is_whole(number)}
    if damaged and not salvage:
        raise BitstreamError(container.describe_damage(stream, sorted(damaged)))

    def read(number: int) -> Tensor | None:
        row, column = divmod(number, across)
        try:
            with coder.bitstream_errors(stream.exact):
                contents = stream.unpack_tile(number)
                return _decode_tile(
                    coder, contents, stream, stream.rows[row], stream.columns[column]
                )
        except BitstreamError as error:
            if salvage:
                return None
            raise BitstreamError(f"{stream.name(number)}: {error}") from None

    picture = Image.new("RGB", (-(-width // scale), -(-height // scale)))
    latents: dict[int, Tensor | None] = {}

    def draw(place: tuple[tuple[Span, Span], tuple[Span, Span]]) -> tuple[Image.Image, Box]:
        (row, row_window), (column, column_window) = place
        y_hat = _gather(stream, latents, row_window, column_window)
        if y_hat is None:  # nothing is known here
            samples = torch.zeros(3, *(stop - start for start, stop in (row_window, column_window)))
        else:
            samples = coder.synthesise(y_hat, stream.quality)[0]
        # What the picture was padded with, and what lies outside the region, is cut off.
        top, bottom = max(row[0], y), min(row[1], y + height)
        left, right = max(column[0], x), min(column[1], x + width)
        samples = samples[
            :,
            top - row_window[0] : bottom - row_window[0],
            left - column_window[0] : right - column_window[0],
        ]
        box = ((left - x) // scale, (top - y) // scale)
        return utils.to_image(samples).reduce(scale), box

    with _workers(coder, jobs) as run:

        def drawn() -> Iterator[tuple[Image.Image, tuple[int, int]]]:
            for row, tile_rows in zip(rows, needed_rows, strict=True):
                wanted = numbers(tile_rows)
                for number in latents.keys() - wanted:
                    del latents[number]
                missing = [number for number in wanted if number not in latents]
                latents.update(zip(missing, run(read, missing), strict=True))
                damaged.update(n for n in missing if latents[n] is None)
                yield from run(draw, [(row, column) for column in columns])

        with track(drawn(), len(rows) * len(columns)) as blocks:
            for block, corner in blocks:
                picture.paste(block, corner)
    filled = sorted(damaged)
    _fill(picture, stream, filled, (x, y), scale)
    return picture, filled


def _pixels(image: Image.Image, rows: Span, columns: Span) -> Tensor:
    """A window of a picture (1, 3, h, w), which repeats the last row and column beyond its ends."""
    right, bottom = min(columns[1], image.width), min(rows[1], image.height)
    x = utils.to_tensor(image.crop((columns[0], rows[0], right, bottom)))[None]
    return F.pad(x, (0, columns[1] - right, 0, rows[1] - bottom), mode="replicate")


def _within(part: Span, window: Span) -> slice:
    """Rows or columns of a window's y that belong to a part of it."""
    return slice((part[0] - window[0]) // LATENT, (part[1] - window[0]) // LATENT)


def _decode_tile(coder: Coder, tile: Tile, stream: TiledStream, row: Span, column: Span) -> Tensor:
    """y_hat of a tile."""
    factor = coder.model.downsampling_factor
    return coder.decompress_latents(
        strings=[[tile.y], [tile.z]],
        shape=((row[1] - row[0]) // factor, (column[1] - column[0]) // factor),
        guards=[tile.guards],
        crcs=[tile.crc],
        quality=stream.quality,
        exact=stream.exact,
    )


def _gather(
    stream: TiledStream, latents: dict[int, Tensor | None], rows: Span, columns: Span
) -> Tensor | None:
    """y_hat of a window; where tiles are damaged, the mean of the others in it, channel by channel.

    None if all are damaged.
    """
    parts, gaps = [], []
    for row in overlapping(stream.rows, rows):
        for column in overlapping(stream.columns, columns):
            places = []
            for part, window in ((stream.rows[row], rows), (stream.columns[column], columns)):
                start, stop = max(part[0], window[0]), min(part[1], window[1])
                places.append((_within((start, stop), window), _within((start, stop), part)))
            (to_rows, from_rows), (to_columns, from_columns) = places
            y_hat = latents[row * len(stream.columns) + column]
            if y_hat is None:
                gaps.append((to_rows, to_columns))
            else:
                parts.append((to_rows, to_columns, y_hat[..., from_rows, from_columns]))
    if not parts:
        return None
    first = parts[0][2]
    size = ((stop - start) // LATENT for start, stop in (rows, columns))
    gathered = first.new_empty((*first.shape[:2], *size))
    for to_rows, to_columns, part in parts:
        gathered[..., to_rows, to_columns] = part
    if gaps:
        mean = torch.cat([part.flatten(2) for *_, part in parts], dim=2).mean(2)[..., None, None]
        for to_rows, to_columns in gaps:
            gathered[..., to_rows, to_columns] = mean
    return gathered


def _fill(
    picture: Image.Image,
    stream: TiledStream,
    damaged: Sequence[int],
    corner: tuple[int, int],
    scale: int,
) -> None:
    """Fill tiles with the mean of those around them, from the edges of a gap inwards."""
    across = len(stream.columns)

    def box(number: int) -> Box | None:
        """Of a tile in the picture, which may be a part of the whole."""
        row, column = divmod(number, across)
        ends = []
        for (start, stop), origin, length in (
            (stream.columns[column], corner[0], picture.width),
            (stream.rows[row], corner[1], picture.height),
        ):
            start, stop = (start - origin) // scale, -((origin - stop) // scale)
            ends.append((max(start, 0), min(stop, length)))
        (left, right), (top, bottom) = ends
        return (left, top, right, bottom) if left < right and top < bottom else None

    left_over = {number for number in damaged if box(number)}
    while left_over:
        colours = {}
        for number in left_over:
            row, column = divmod(number, across)
            beside = [
                box(across * i + j)
                for i in range(max(row - 1, 0), min(row + 2, len(stream.rows)))
                for j in range(max(column - 1, 0), min(column + 2, across))
                if across * i + j not in left_over
            ]
            means = [ImageStat.Stat(picture.crop(b)).mean for b in beside if b]
            if means:
                colours[number] = tuple(
                    round(sum(band) / len(means)) for band in zip(*means, strict=True)
                )
        if not colours:
            colours = dict.fromkeys(left_over, (128, 128, 128))  # nothing at all is known
        for number, colour in colours.items():
            picture.paste(colour, box(number))
        left_over -= colours.keys()


@contextlib.contextmanager
def _workers(coder: Coder, jobs: int) -> Iterator[Callable[[Callable, Sequence], Iterable]]:
    """A `map` that works on so many items at the same time, each on its share of the processors."""
    if jobs == 1 or next(coder.model.parameters()).device.type != "cpu":
        yield map  # graphs of a GPU share their memory
        return
    coder.prepare()
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(threads,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
