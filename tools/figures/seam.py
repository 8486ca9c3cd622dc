"""The neighbourhood of a seam between tiles, enlarged: coded whole, with a margin, without one.

::

    python -m tools.figures.seam --checkpoint mambavc-light-0.0130 --image demo/test/kodim20.png \\
        --output pic/seam.png

Below each the difference to the picture coded whole, times 8.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import utils
from models import Coder, container, load_model, tiles
from models.memory import DEFAULT_MARGIN
from tools.figures import style
from utils import UsageError

GAIN = 8  # of differences


def decoded(coder: Coder, image: Image.Image, tile: int) -> list[tuple[str, Image.Image]]:
    """(caption, picture) coded whole, in tiles, and in tiles without a margin."""
    rows = []
    for name, side, margin in (
        ("whole", 0, 0),
        (f"tiles of {tile}, margin {DEFAULT_MARGIN}", tile, DEFAULT_MARGIN),
        (f"tiles of {tile}, no margin", tile, 0),
    ):
        data = tiles.encode(coder, image, tile=side, margin=margin)
        picture, _ = tiles.decode(coder, container.unpack(data))
        rows.append((name, picture))
    return rows


@style.styled
def draw(rows: Sequence[tuple[str, Image.Image]], box: tuple[int, int, int, int]) -> Figure:
    """Parts of the pictures, and their differences to the first one."""
    figure = Figure((7.8, 5.5))
    whole = np.asarray(rows[0][1].crop(box)).astype(int)
    for i, (caption, picture) in enumerate(rows):
        part = np.asarray(picture.crop(box)).astype(int)
        difference = np.clip(128 + GAIN * (part - whole), 0, 255)
        for j, values in enumerate((part, difference)):
            axes = figure.add_axes((i / 3 + 0.005, 0.005 + 0.475 * (1 - j), 0.323, 0.465))
            axes.imshow(values.astype(np.uint8), interpolation="nearest")
            axes.set_axis_off()
        figure.text((i + 0.5) / 3, 0.965, caption, ha="center", fontsize=9)
    return figure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = style.parser("seam", "Enlarge the place where four tiles meet.")
    parser.add_argument("--checkpoint", required=True, help="of a network of a single rate")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--tile", type=utils.positive_int, default=256, help="multiple of 64")
    parser.add_argument("--side", type=utils.positive_int, default=96, help="pixels to enlarge")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    style.check_output(args.output)
    image = utils.read_image(args.image)
    if min(image.size) < args.tile + args.side:
        raise UsageError(f"{args.image} is too small for tiles of {args.tile} to meet in it")
    rows = decoded(Coder(load_model(args.checkpoint)), image, args.tile)
    # Where the first four tiles meet.
    stream = container.TiledStream(b"", True, image.height, image.width, None, args.tile, 0)
    x, y = stream.columns[0][1], stream.rows[0][1]
    half = args.side // 2
    style.save(draw(rows, (x - half, y - half, x + half, y + half)), args.output, dpi=140)


if __name__ == "__main__":
    utils.run_main(main)
