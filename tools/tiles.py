"""Measure what tiles cost: bits, quality at seams, time and memory.

    python -m tools.tiles KODAK --checkpoint C --tile-sizes 256 512 [--size 3840 2160]
    python -m tools.tiles KODAK --checkpoint C --megapixels 1 6 24 100

The first compares pictures coded in tiles with the same ones coded whole: the folder's, or with
--size large ones made of them at twice their size. The second codes such pictures with codec.py:
each run is a process, whose time and peak of memory are printed, with those of a region of 512x512
of it. Results go to --json FILE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

import utils
from models import container
from models.checkpoint import check_backend, check_rate, find_checkpoint
from models.memory import DEFAULT_MARGIN
from utils import UsageError

if TYPE_CHECKING:
    from models import Coder

SEAM = 8  # pixels on each side of a seam that count as its neighbourhood
ENLARGED = (1536, 1024)  # size that the parts of a large picture are brought to
ROOT = Path(__file__).parent.parent
# What a run of codec.py prints last: the time without Python's start, and its peaks.
PROGRAM = """
import json, resource, sys, time
import codec, utils
start = time.perf_counter()
try:
    utils.run_main(codec.main)
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch = sys.modules.get("torch")
    gpu = torch.cuda.max_memory_reserved() if torch and torch.cuda.is_initialized() else None
    seconds = time.perf_counter() - start
    row = {"seconds": seconds, "cpu_seconds": time.process_time()}
    print(json.dumps(row | {"peak_bytes": peak, "gpu_peak_bytes": gpu}))
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        prog="python -m tools.tiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    positive = utils.positive_int
    parser.add_argument("folder", type=Path, help="pictures")
    parser.add_argument("--checkpoint", required=True, help="file, or name of a shipped one")
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--quality", type=utils.quality, help="of a network of every rate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results to this file")
    parser.add_argument(
        "--tile-sizes", nargs="+", metavar="T",
        type=utils.multiple_of(container.TILE_UNIT, container.MAX_TILE, container.TILE_UNIT),
        help=f"in pixels, multiples of {container.TILE_UNIT}",
    )  # fmt: skip
    parser.add_argument(
        "--margins", nargs="+", default=[DEFAULT_MARGIN], metavar="M",
        type=utils.multiple_of(container.MARGIN_UNIT, container.MAX_MARGIN),
        help="pixels around a tile that the transforms see, of pictures for --tile-sizes",
    )  # fmt: skip
    parser.add_argument(
        "--size", nargs=2, type=positive, metavar=("W", "H"), help="of pictures for --tile-sizes"
    )
    parser.add_argument("--megapixels", nargs="+", type=positive, metavar="P", help="rising")
    parser.add_argument("--max-memory", metavar="SIZE", help="for codec.py")
    args = parser.parse_args(argv)
    if not args.tile_sizes and not args.megapixels:
        parser.error("give --tile-sizes or --megapixels")
    if args.size and not args.tile_sizes:
        parser.error("--size is of pictures for --tile-sizes; give these, too")
    return args


def seams(stream: container.TiledStream) -> np.ndarray:
    """Where pixels (height, width) are near a seam."""
    near = np.zeros((stream.height, stream.width), dtype=bool)
    for start, _ in stream.rows[1:]:
        near[start - SEAM : start + SEAM] = True
    for start, _ in stream.columns[1:]:
        near[:, start - SEAM : start + SEAM] = True
    return near


def squared_errors(a: Image.Image, b: Image.Image) -> np.ndarray:
    """Mean over the samples of each pixel: (height, width)."""
    difference = np.asarray(a).astype(np.int64) - np.asarray(b).astype(np.int64)
    return np.square(difference).mean(axis=2)


def compare(args: argparse.Namespace) -> list[dict]:
    """Code each picture whole and in tiles; one row for each picture, tile size and margin."""
    from models import Coder, load_model

    device = utils.select_device(args.cuda)
    check_backend(device)
    model = load_model(find_checkpoint(args.checkpoint), device)
    check_rate(model, args.quality is not None, args.checkpoint, "--quality")
    coder = Coder(model, graphs=args.cuda)
    files = utils.list_images(args.folder)
    groups = [[file] for file in files]
    if args.size:
        parts = math.prod(-(-side // part) for side, part in zip(args.size, ENLARGED, strict=True))
        groups = [files[i : i + parts] for i in range(0, len(files), parts)]
    rows = []
    shown = utils.progress(groups, len(groups), "picture", label=lambda group: group[0].name)
    with shown as tracked:
        for group in tracked:
            image = large_picture(group, *args.size) if args.size else utils.read_image(*group)
            rows += compare_picture(coder, group[0].name, image, args)
    return rows


def compare_picture(
    coder: Coder, name: str, image: Image.Image, args: argparse.Namespace
) -> list[dict]:
    """The rows of one picture."""
    from models import tiles

    device = next(coder.model.parameters()).device
    x = utils.to_tensor(image)[None].to(device)
    whole = coder.encode(x, args.quality)
    error = squared_errors(utils.to_image(coder.decode(whole)[0]), image)
    rows = []
    for tile, margin in itertools.product(args.tile_sizes, args.margins):
        data = tiles.encode(coder, image, args.quality, tile=tile, margin=margin)
        stream = container.unpack(data)
        tiled_error = squared_errors(tiles.decode(coder, stream)[0], image)
        near = seams(stream)
        rows.append(
            {
                "name": name,
                "tile": tile,
                "margin": margin,
                "whole_bytes": len(whole),
                "bytes": len(data),
                "near_pixels": int(near.sum()),
                "pixels": near.size,
                # Sums, so that they can be added up over pictures.
                "near": [float(tiled_error[near].sum()), float(error[near].sum())],
                "others": [float(tiled_error[~near].sum()), float(error[~near].sum())],
            }
        )
    return rows


def print_comparison(rows: Sequence[dict]) -> None:
    """Means over all pictures."""

    def loss(key: str, chosen: Sequence[dict]) -> float:
        """PSNR of tiles less that of the whole, in dB, of the mean squared errors' ratios."""
        ratios = [row[key][0] / row[key][1] for row in chosen if row[key][1]]
        return -10 * sum(map(math.log10, ratios)) / len(ratios) if ratios else math.nan

    print("tile margin    rate  dPSNR near seams  elsewhere  difference dB")
    for tile, margin in sorted({(row["tile"], row["margin"]) for row in rows}):
        chosen = [row for row in rows if (row["tile"], row["margin"]) == (tile, margin)]
        rate = sum(row["bytes"] / row["whole_bytes"] for row in chosen) / len(chosen) - 1
        near, others = loss("near", chosen), loss("others", chosen)
        print(
            f"{tile:4} {margin:6} {rate:+7.2%} {near:+17.3f} {others:+10.3f} {near - others:+14.3f}"
        )


def large_picture(files: Sequence[Path], width: int, height: int) -> Image.Image:
    """Pictures side by side."""
    image = Image.new("RGB", (width, height))
    places = itertools.product(
        range(0, image.height, ENLARGED[1]), range(0, image.width, ENLARGED[0])
    )
    for (top, left), file in zip(places, itertools.cycle(files), strict=False):
        part = utils.read_image(file)
        if part.height > part.width:
            part = part.transpose(Image.Transpose.ROTATE_90)
        image.paste(part.resize(ENLARGED, Image.Resampling.BICUBIC), (left, top))
    return image


def run_codec(*arguments: str) -> dict:
    """Run codec.py; seconds and peaks of memory in bytes.

    Raises:
        UsageError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise UsageError(f"codec.py {' '.join(arguments)}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """Code large pictures and regions of them."""
    files = utils.list_images(args.folder)
    common = ["--checkpoint", str(find_checkpoint(args.checkpoint).resolve()), "--force"]
    common += ["--cuda"] if args.cuda else []
    limit = ["--max-memory", args.max_memory] if args.max_memory else []
    rate = [] if args.quality is None else ["--quality", str(args.quality)]
    with tempfile.TemporaryDirectory() as folder:
        picture, coded, part, out = (
            str(Path(folder, name)) for name in ("a.png", "a.mvc", "b.mvc", "b.png")
        )
        side = 512
        small = utils.read_image(files[0]).crop((0, 0, side, side))
        small.save(picture)
        for _ in range(2):  # compiled code is on the disk from then on
            run_codec("encode", picture, part, *common, *rate, "--no-verify")
            alone = run_codec("decode", part, out, *common)
        for megapixels in args.megapixels:
            height = round(math.sqrt(megapixels * 1e6 / 1.5))
            image = large_picture(files, round(megapixels * 1e6 / height), height)
            image.save(picture, compress_level=1)
            x = min(image.width // 2 + 37, image.width - side)  # across tiles, where there are any
            y = min(image.height // 2 + 53, image.height - side)
            del image
            row = {"megapixels": megapixels}
            row["encode"] = run_codec("encode", picture, coded, *common, *rate, *limit)
            row["bytes"] = Path(coded).stat().st_size
            row["decode"] = run_codec("decode", coded, out, *common, *limit)
            region = map(str, ("--region", x, y, side, side))
            row["region"] = run_codec("decode", coded, out, *common, *limit, *region)
            row["alone"] = alone  # a picture of the region's size
            yield row


def print_row(row: dict) -> None:
    cells = [f"{row['megapixels']:4} MP {8 * row['bytes'] / row['megapixels'] / 1e6:.3f} bpp"]
    for name in ("encode", "decode", "region", "alone"):
        run = row[name]
        peaks = [run["peak_bytes"], run["gpu_peak_bytes"]]
        memory = " + ".join(f"{peak / 2**30:.2f}" for peak in peaks if peak is not None)
        cells.append(
            f"{name} {run['seconds']:.1f} s, {run['cpu_seconds']:.1f} of CPU, {memory} GiB"
        )
    print("; ".join(cells), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.json:
        utils.check_output(args.json)
    rows: list[dict] = []
    if args.tile_sizes:
        rows = compare(args)
        print_comparison(rows)
    runs = []
    for row in measure(args) if args.megapixels else ():
        print_row(row)
        runs.append(row)
    for name in ("encode", "decode") if len(runs) > 1 else ():
        first, last = runs[0], runs[-1]
        clock = "seconds" if args.cuda else "cpu_seconds"  # what others do then counts little
        times = last[name][clock] / first[name][clock]
        exponent = math.log(times) / math.log(last["megapixels"] / first["megapixels"])
        print(f"exponent of time against pixels, {name}: {exponent:.3f}")
    if args.json:
        with utils.atomic_write(args.json) as path:
            path.write_text(json.dumps({"tiles": rows, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    utils.run_main(main)
