"""Write a page that compares pictures coded by the network, JPEG, WebP and AVIF.

    python -m tools.compare PICTURES --checkpoint C --output DIR

DIR/index.html opens in any browser, without a network: the original lies under a slider against
each codec's picture, at the same number of bytes and at the same PSNR. All pictures are decoded
from real files, which lie beside them, and stored as PNG without loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
from PIL import Image, ImageChops

import utils
from models import container
from models.checkpoint import check_backend, check_rate, checkpoint_name, find_checkpoint
from models.memory import check_memory
from tools import pillow_codecs
from utils import DataError, UsageError, logger

if TYPE_CHECKING:
    from models import Coder

PAGE = Path(__file__).parent / "compare_page"
OURS = "Ours"
GAIN = 8  # of the maps of errors: a sample that is 32 levels off, or more, is white
SAME_BYTES, SAME_PSNR = "bytes", "psnr"
CLOSE = 0.02  # relative distance in bytes, and
CLOSE_DB = 0.25  # in dB, up to which a codec counts as being at the same point


@dataclass(frozen=True)
class Entry:
    """What the page says and shows of one codec's picture. Paths are relative to the page."""

    codec: str
    picture: str
    error: str
    file: str
    bytes: str
    bpp: str
    psnr: str
    ms_ssim: str
    note: str


@dataclass(frozen=True)
class Comparison:
    """What the page says and shows of one picture.

    Attributes:
        name: as the page calls it.
        original: path, relative to the page.
        entries: of ours and the other codecs, for `SAME_BYTES` and for `SAME_PSNR`.
    """

    name: str
    width: int
    height: int
    original: str
    entries: dict[str, list[Entry]]


class Writer:
    """Writes all that belongs to one picture to DIR/pictures/NUMBER.

    Names are numbers and codecs only, so that no file's name has to be safe in an address.
    """

    def __init__(self, output: Path, number: int, image: Image.Image):
        self._output = output
        self._folder = Path("pictures", f"{number:03}")
        (output / self._folder).mkdir(parents=True, exist_ok=True)
        self._image = image
        self._x = utils.to_tensor(image)[None]
        self.original = self._png("original", image)

    def entry(
        self, codec: str, name: str, ending: str, data: bytes, image: Image.Image, note: str
    ) -> Entry:
        """Write a codec's file, its picture and the map of its errors, and measure it."""
        difference = ImageChops.difference(self._image, image)
        error = difference.point(lambda level: min(255, GAIN * level))
        file = self._folder / f"{name}{ending}"
        (self._output / file).write_bytes(data)
        x_hat = utils.to_tensor(image)[None]
        similarity = utils.ms_ssim(self._x, x_hat)
        return Entry(
            codec,
            self._png(name, image),
            self._png(f"{name}-error", error),
            file.as_posix(),
            f"{len(data):,}",
            f"{8 * len(data) / (image.width * image.height):.4f}",
            f"{utils.psnr(self._x, x_hat):.2f}",
            "–" if similarity is None else f"{similarity:.4f}",  # noqa: RUF001, no value
            note,
        )

    def _png(self, name: str, image: Image.Image) -> str:
        file = self._folder / f"{name}.png"
        image.save(self._output / file)
        return file.as_posix()


def compare(
    coder: Coder,
    image: Image.Image,
    name: str,
    writer: Writer,
    codecs: Sequence[str],
    quality: float | None,
) -> Comparison:
    """Code one picture with the network and all codecs, and write what the page shows of it.

    Args:
        quality: of a network of every rate; else None.

    Raises:
        ValueError: the network cannot code it.
    """
    device = next(coder.model.parameters()).device
    x = utils.to_tensor(image)[None].to(device)
    stream = coder.encode(x, quality)
    x_hat = coder.decode(stream)
    psnr = utils.psnr(x, x_hat)
    ours = writer.entry(
        OURS, "ours", ".mvc", stream, utils.to_image(x_hat[0]), "the point that others are to meet"
    )
    entries = {SAME_BYTES: [ours], SAME_PSNR: [ours]}
    for codec in codecs:
        ladder = pillow_codecs.Ladder(image, codec)
        ending = f".{codec.lower()}"
        try:
            found = {
                SAME_BYTES: ladder.at_bytes(len(stream)),
                SAME_PSNR: ladder.at_psnr(psnr),
            }
        except (OSError, ValueError) as error:  # it may be too large for the format
            logger.info("%s: %s cannot hold it and is left out (%s)", name, codec, error)
            continue
        for mode, coded in found.items():
            note = describe(coded, len(stream), psnr, mode)
            file = f"{codec.lower()}-{mode}"
            entries[mode].append(writer.entry(codec, file, ending, coded.data, coded.image, note))
    return Comparison(name, image.width, image.height, writer.original, entries)


def describe(coded: pillow_codecs.Coded, num_bytes: int, psnr: float, mode: str) -> str:
    """How near a codec came to our bytes or our PSNR, in words."""
    excess = len(coded.data) / num_bytes - 1
    gain = min(coded.psnr, pillow_codecs.MAX_PSNR) - min(psnr, pillow_codecs.MAX_PSNR)
    missed = abs(excess) > CLOSE if mode == SAME_BYTES else abs(gain) > CLOSE_DB
    nearest = "it comes no nearer: " if missed else ""
    return f"quality {coded.quality}; {nearest}{excess:+.1%} bytes, {gain:+.2f} dB against ours"


def page(title: str, missing: Sequence[str], comparisons: Sequence[Comparison]) -> str:
    """The page's HTML."""
    notes = {
        SAME_BYTES: "Each codec at its best quality of at most as many bytes as ours.",
        SAME_PSNR: "Each codec at the quality whose PSNR is nearest to ours.",
    }
    options = {
        name: ", ".join(f"{key}={value}" for key, value in codec.options.items())
        for name, codec in pillow_codecs.CODECS.items()
        if name not in missing
    }
    about = f"Pillow {PIL.__version__}: " + "; ".join(f"{n} {o}" for n, o in options.items()) + "."
    if missing:
        about += f" This Pillow has no {', '.join(missing)}."
    data = {
        "title": title,
        "gain": GAIN,
        "notes": notes,
        "about": about,
        "pictures": [dataclasses.asdict(comparison) for comparison in comparisons],
    }
    # JSON in ASCII; without these three, no name can end the element that it stands in.
    text = json.dumps(data, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return string.Template((PAGE / "index.html").read_text("utf-8")).substitute(data=text)


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files among these paths, and the pictures of the folders among them.

    Raises:
        UsageError: a path does not exist, or a folder holds no pictures.
    """
    files = []
    for path in paths:
        if path.is_file():
            files.append(path)
        elif path.exists():
            files += utils.list_images(path)
        else:
            raise UsageError(f"{path} does not exist; give pictures or folders of pictures")
    return files


def display_names(files: Sequence[Path]) -> list[str]:
    """Names of files, with their folders where several have one name."""
    count = Counter(file.name for file in files)
    return [f.name if count[f.name] == 1 else f"{f.name} ({f.parent})" for f in files]


def prepare_output(folder: Path, force: bool) -> None:
    """Make the page's folder.

    Raises:
        UsageError: it cannot be written to, or there is something in it.
    """
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; give a new folder, or --force to write over it")
    utils.make_folder(folder)


def write_all(
    coder: Coder,
    files: Sequence[Path],
    output: Path,
    codecs: Sequence[str],
    quality: float | None,
) -> list[Comparison]:
    """Compare all pictures that can be read.

    Raises:
        DataError: the network fails on one, or none can be read.
    """

    def check_size(height: int, width: int) -> None:
        container.check_size(height, width)
        check_memory(coder.model, height, width)

    comparisons: list[Comparison] = []
    named = zip(files, display_names(files), strict=True)
    with utils.progress(named, len(files), "picture", label=lambda pair: pair[1]) as tracked:
        for i, (file, name) in enumerate(tracked, 1):
            try:
                image = utils.read_image(file, check_size=check_size, report=logger.info)
            except DataError as error:
                logger.info("%d/%d skipped: %s", i, len(files), error)
                continue
            with utils.data_errors(file):
                writer = Writer(output, len(comparisons) + 1, image)
                comparisons.append(compare(coder, image, name, writer, codecs, quality))
            logger.info("%d/%d %s: %s", i, len(files), name, summary(comparisons[-1]))
    if not comparisons:
        raise DataError(f"none of the {len(files)} pictures can be read; see above")
    return comparisons


def summary(comparison: Comparison) -> str:
    """One line: PSNR of each at our bytes, then bytes of each at our PSNR."""
    first = [f"{e.codec} {e.psnr} dB" for e in comparison.entries[SAME_BYTES]]
    second = [f"{e.codec} {e.bytes} bytes" for e in comparison.entries[SAME_PSNR]]
    return f"{', '.join(first)}; {', '.join(second)}"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        prog="python -m tools.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pictures", nargs="+", type=Path, help="pictures, or folders of them")
    parser.add_argument(
        "--checkpoint", required=True, help="file that train.py saved, or the name of a shipped one"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the page"
    )
    parser.add_argument(
        "--quality", type=utils.quality, metavar="Q", help="of a network of every rate: 0 to 100"
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that has files")
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    files = find_pictures(args.pictures)
    prepare_output(args.output, args.force)
    codecs = pillow_codecs.available()
    missing = [name for name in pillow_codecs.CODECS if name not in codecs]
    if missing:
        logger.info("the installed Pillow has no %s: left out", ", ".join(missing))
    checkpoint = find_checkpoint(args.checkpoint)

    from models import Coder, load_model

    device = utils.select_device(args.cuda)
    check_backend(device)
    model = load_model(checkpoint, device)
    check_rate(model, args.quality is not None, args.checkpoint, "--quality")
    comparisons = write_all(Coder(model), files, args.output, codecs, args.quality)
    for name in ("page.css", "page.js"):
        (args.output / name).write_bytes((PAGE / name).read_bytes())
    title = checkpoint_name(checkpoint) + (
        "" if args.quality is None else f", quality {args.quality:g}"
    )
    with utils.atomic_write(args.output / "index.html") as path:
        path.write_text(page(title, missing, comparisons), encoding="utf-8")
    print(f"wrote {args.output / 'index.html'}")


if __name__ == "__main__":
    utils.run_main(main)
