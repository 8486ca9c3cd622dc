"""One picture coded by the network, WebP and JPEG at the same rate, with an enlarged detail.

::

    python -m tools.figures.visual --checkpoint mambavc.pth.tar --image kodim04.png \\
        --detail 220 150 128 --output pic/visual.png
"""

import argparse
import bisect
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import utils
from models import Coder
from models.checkpoint import build_from_checkpoint, check_rate, load_checkpoint
from tools.figures import style
from utils import UsageError

QUALITIES = range(1, 96)  # above 95, JPEG grows without a gain
FORMATS = {"WebP": {"format": "WEBP", "method": 6}, "JPEG": {"format": "JPEG", "optimize": True}}


def encode_pillow(image: Image.Image, quality: int, **options) -> bytes:
    """A picture in one of Pillow's formats, as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, quality=quality, **options)
    return buffer.getvalue()


def at_size(image: Image.Image, num_bytes: int, **options) -> bytes:
    """The best quality of a format that takes at most this many bytes, or else its smallest."""

    def size(quality: int) -> int:
        return len(encode_pillow(image, quality, **options))

    fitting = bisect.bisect_right(QUALITIES, num_bytes, key=size)
    return encode_pillow(image, QUALITIES[max(fitting - 1, 0)], **options)


def compare(
    coder: Coder, name: str, image: Image.Image, quality: float | None = None
) -> list[tuple[str, Image.Image]]:
    """(caption, picture) of the original, of the network, and of each of `FORMATS` at its rate."""
    pixels = image.width * image.height
    original = utils.to_tensor(image)

    def caption(name: str, num_bytes: int, decoded: Image.Image) -> str:
        psnr = utils.psnr(original, utils.to_tensor(decoded))
        return f"{name}\n{8 * num_bytes / pixels:.3f} bpp, {psnr:.2f} dB"

    stream = coder.encode(original[None], quality)
    ours = utils.to_image(coder.decode(stream)[0])
    rows = [("Original\n24 bpp", image), (caption(name, len(stream), ours), ours)]
    for name, options in FORMATS.items():
        data = at_size(image, len(stream), **options)
        decoded = Image.open(io.BytesIO(data)).convert("RGB")
        rows.append((caption(name, len(data), decoded), decoded))
    return rows


@style.styled
def draw(rows: Sequence[tuple[str, Image.Image]], detail: tuple[int, int, int]) -> Figure:
    """Draw pictures with captions, below each the detail (left, top, side) enlarged."""
    left, top, side = detail
    width, height = rows[0][1].size
    cell, head, gap = 2.6, 0.45, 0.06  # inches
    picture = cell * height / width
    total = (len(rows) * cell + (len(rows) - 1) * gap, head + picture + gap + cell)
    figure = Figure(total)

    def show(image: Image.Image, x: float, y: float, high: float, ours: bool) -> Axes:
        axes = figure.add_axes((x / total[0], y / total[1], cell / total[0], high / total[1]))
        axes.imshow(image, interpolation="nearest", aspect="auto")
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=ours, color=style.ACCENT, linewidth=2)
        return axes

    for i, (caption, image) in enumerate(rows):
        x, ours = i * (cell + gap), i == 1
        axes = show(image, x, cell + gap, picture, False)
        axes.add_patch(
            Rectangle((left, top), side, side, fill=False, edgecolor="white", linewidth=1)
        )
        show(image.crop((left, top, left + side, top + side)), x, 0, cell, ours)
        figure.text(
            (x + cell / 2) / total[0],
            1 - 0.06 / total[1],
            caption,
            ha="center",
            va="top",
            fontsize=9,
            linespacing=1.3,
            color=style.ACCENT if ours else style.INK,
            fontweight="bold" if ours else "normal",
        )
    return figure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = style.parser(
        "visual", "Compare the network with WebP and JPEG on one picture at one rate."
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument(
        "--quality", type=utils.quality, metavar="Q", help="of a network of every rate: 0 to 100"
    )
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument(
        "--detail",
        nargs=3,
        type=int,
        metavar=("LEFT", "TOP", "SIDE"),
        help="square to enlarge, in pixels (default: the centre, a quarter of the shorter side)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    style.check_output(args.output)
    image = utils.read_image(args.image)
    side = max(1, min(image.size) // 4)
    detail = args.detail or ((image.width - side) // 2, (image.height - side) // 2, side)
    left, top, side = detail
    if side < 1 or min(left, top) < 0 or left + side > image.width or top + side > image.height:
        raise UsageError(
            f"--detail {left} {top} {side} is not inside the picture of "
            f"{image.width}x{image.height} pixels"
        )
    checkpoint = load_checkpoint(args.checkpoint)
    model = build_from_checkpoint(checkpoint, args.checkpoint)
    check_rate(model, args.quality is not None, args.checkpoint, "--quality")
    name = checkpoint.get("model", "mambavc")
    rows = compare(Coder(model), style.NAMES.get(name, name), image, args.quality)
    for caption, _ in rows:
        print(caption.replace("\n", ": "))
    style.save(draw(rows, detail), args.output, dpi=140)


if __name__ == "__main__":
    utils.run_main(main)
