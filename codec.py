"""Code pictures to .mvc files and back.

    python codec.py encode IN.png OUT.mvc --checkpoint C [--quality Q]
    python codec.py decode IN.mvc OUT.png --checkpoint C [--region X Y WIDTH HEIGHT] [--scale 1/8]
    python codec.py info IN.mvc

Pictures of more than 4 megapixels, or more than --max-memory has room for, are coded in tiles, of
which a decoder may need a few only. Several inputs go to an output folder. - is standard input or
output. Pictures in another colour space are converted to sRGB. Decode to .png, .bmp, .tiff, .ppm or
.webp to keep every sample; .jpg, .gif and .avif lose quality again, which a warning says. Exit
codes: 0 success, 1 the data cannot be used, 2 the command cannot be carried out as given.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from PIL import Image

import utils
from models import container, search
from models.checkpoint import check_backend, check_rate, find_checkpoint
from models.memory import (
    DEFAULT_MARGIN,
    MAX_WHOLE_PIXELS,
    check_memory,
    check_tiles,
    choose_tile,
    keep_freed_memory,
    limit_device,
)
from utils import DataError, UsageError, data_errors, number, positive_int

if TYPE_CHECKING:
    from models import Coder

STANDARD = "-"
MAX_PICTURE_BYTES = 2**30  # of a picture file
RATE_FLAGS = "--quality, --target-bpp, --target-psnr or --target-bytes"
SCALES = {"1": 1, "1/2": 2, "1/4": 4, "1/8": 8}
SALVAGE_HINT = "codec.py decode --salvage fills them and keeps the others"
LISTED_TILES = 20  # by info, of each file
# For large pictures: a quarter of the time, which is as long as decoding takes on a GPU, for 13 %
# more bytes.
PNG_OPTIONS = {"compress_level": 1}
FIXED_SIZES = ("ICO", "ICNS")  # formats that scale a picture to one of their own sizes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    encode = commands.add_parser("encode", help="code pictures")
    decode = commands.add_parser("decode", help="decode .mvc files to pictures")
    info = commands.add_parser("info", help="show what .mvc files hold")
    for command, what in (
        (encode, ".mvc file"),
        (decode, "picture, in the format of its ending"),
    ):
        command.add_argument(
            "inputs", nargs="+", metavar="IN", help="file, or - for standard input"
        )
        command.add_argument(
            "output", metavar="OUT", help=f"{what}, folder, or - for standard output"
        )
        command.add_argument(
            "--checkpoint",
            required=True,
            metavar="C",
            help="file that train.py saved, or the name of a shipped one",
        )
        command.add_argument("--cuda", action="store_true", help="run on the GPU")
        utils.add_precision(command)
        command.add_argument("--force", action="store_true", help="overwrite existing files")
        command.add_argument(
            "--max-memory",
            type=utils.size_in_bytes,
            metavar="SIZE",
            help="most that the process, or with --cuda its part of the GPU's memory, may take, "
            "such as 4G; by default what is free",
        )
        command.add_argument(
            "--jobs",
            type=positive_int,
            default=1,
            metavar="J",
            help="tiles that the CPU works on at the same time",
        )
    rate = encode.add_argument_group(
        "rate",
        "A network of every rate needs one of these, one of a single rate takes none. A target is "
        f"searched for in at most {search.MAX_CODINGS} codings, until the file's size or the "
        "picture's squared error is within 1 %; the output says where it cannot be met.",
    ).add_mutually_exclusive_group()
    positive = number(float, 0, exclusive=True)
    rate.add_argument("--quality", type=utils.quality, metavar="Q", help="0 to 100, in hundredths")
    rate.add_argument("--target-bpp", type=positive, metavar="B", help="bits per pixel of the file")
    rate.add_argument("--target-psnr", type=positive, metavar="P", help="dB, of 8-bit samples")
    rate.add_argument("--target-bytes", type=positive_int, metavar="N", help="size of the file")
    encode.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode the coded picture before it is written (default)",
    )
    encode.add_argument(
        "--fast-entropy",
        action="store_true",
        help="float32 entropy path: the file decodes on the same machine only",
    )
    encode.add_argument(
        "--tile-size",
        type=utils.multiple_of(container.TILE_UNIT, container.MAX_TILE),
        metavar="T",
        help="longest side of a tile, a multiple of 64; 0 to code the picture whole. By default "
        "512, or less where memory is short, for pictures of more than 4 megapixels",
    )
    encode.add_argument(
        "--keep-metadata",
        action="store_true",
        help="carry EXIF, and the ICC profile of RGB pictures, which are then coded in its colours",
    )
    decode.add_argument(
        "--region",
        type=number(int, 0),
        nargs=4,
        metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="decode this part only, from the tiles that it needs",
    )
    decode.add_argument(
        "--scale",
        choices=SCALES,
        default="1",
        help="divide both sides, by averaging squares of pixels as they are decoded",
    )
    decode.add_argument(
        "--salvage",
        action="store_true",
        help="fill damaged tiles with the mean of those around them; the exit code is 1 if there "
        "were any",
    )
    info.add_argument("inputs", nargs="+", metavar="IN", help="file, or - for standard input")
    args = parser.parse_args(argv)
    if getattr(args, "quality", None) is not None:
        args.quality = container.coded_quality(args.quality)
    return args


@dataclass(frozen=True)
class Job:
    """One input and where its result goes; None is standard input or output."""

    source: Path | None
    target: Path | None

    @property
    def name(self) -> str:
        return "standard input" if self.source is None else str(self.source)


def plan(inputs: Sequence[str], output: str, ending: str, force: bool) -> list[Job]:
    """Where each input's result goes.

    Args:
        ending: of the files in an output folder.

    Raises:
        UsageError: an input is missing, an output exists and ``force`` is not set, two inputs
            would have the same output, or an output cannot be written.
    """
    sources = [_source(name) for name in inputs]
    if not output:
        raise UsageError("the name of the output is empty; give a file, a folder or -")
    folder = output != STANDARD and (
        len(inputs) > 1 or output[-1] in "/\\" or os.path.isdir(output)
    )
    if len(inputs) > 1 and output == STANDARD:
        raise UsageError("several inputs need an output folder, not standard output")
    if not folder:
        (source,) = sources
        jobs = [Job(source, None if output == STANDARD else Path(output))]
    elif None in sources:
        raise UsageError("standard input needs the name of an output file, not a folder")
    else:
        jobs = [Job(source, Path(output) / f"{source.stem}{ending}") for source in sources]

    targets = set()
    for job in jobs:
        if job.target is None:
            continue
        if job.target in targets:
            raise UsageError(f"two inputs would be written to {job.target}; rename one of them")
        targets.add(job.target)
        if os.path.isfile(job.target):  # a device or a pipe takes data without losing any
            if not force:
                raise UsageError(f"{job.target} exists; give --force to overwrite it")
            if job.source and job.target.samefile(job.source):
                raise UsageError(f"{job.target} is both input and output; give another output")
    if folder:
        utils.make_folder(Path(output))
    for target in targets:
        utils.check_output(target)
    return jobs


def _source(name: str) -> Path | None:
    if name == STANDARD:
        if sys.stdin is None:
            raise UsageError("standard input is closed; give the name of a file")
        return None
    if not os.path.exists(name):
        raise UsageError(f"{name or 'an input with an empty name'} does not exist")
    if os.path.isdir(name):
        raise UsageError(f"{name} is a folder; give the files in it")
    return Path(name)


def read_bytes(job: Job, limit: int) -> bytes:
    """Contents of a file or of standard input.

    Raises:
        DataError: it cannot be read, or there are more than ``limit`` bytes.
    """
    try:
        if job.source is None:
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with open(job.source, "rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"cannot read {job.name}: {error.strerror}") from None
    if len(data) > limit:
        raise DataError(f"{job.name} is too long; at most {limit} bytes expected")
    return data


def write_bytes(data: bytes, target: Path | None) -> None:
    """Write a file or to standard output; an existing file is replaced at the very end.

    Raises:
        BrokenPipeError: nobody reads standard output any more.
        UsageError: it cannot be written for another reason.
    """
    try:
        if target is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            with utils.atomic_write(target) as path:
                path.write_bytes(data)
    except OSError as error:
        if target is None and isinstance(error, BrokenPipeError):
            raise
        where = target or "standard output"
        raise UsageError(f"cannot write {where}: {error.strerror or error}") from None


def warn(line: str) -> None:
    utils.say(f"warning: {line}", sys.stderr)


def encode_file(load: Callable[..., Coder], job: Job, args: argparse.Namespace) -> str:
    """Code one picture; return a line about the result.

    Args:
        load: returns the coder; see `main`.
    """
    tile: int | None = None

    def check_size(height: int, width: int) -> None:
        nonlocal tile
        container.check_tiled_size(height, width, container.TILE_UNIT)
        if args.tile_size is not None:
            container.check_tiled_size(height, width, args.tile_size)
            margin, tile = DEFAULT_MARGIN, args.tile_size
            if tile:
                model = load().model
                check_tiles(model, height, width, tile, margin, args.max_memory, args.jobs)
                return
        elif height * width > MAX_WHOLE_PIXELS or args.max_memory:
            tile = choose_tile(load().model, height, width, args.max_memory, args.jobs)
        if not tile:
            container.check_size(height, width)
            check_memory(load().model, height, width)

    source = io.BytesIO(read_bytes(job, MAX_PICTURE_BYTES))
    image = utils.read_image(
        source,
        name=job.name,
        check_size=check_size,
        report=warn,
        keep_metadata=args.keep_metadata,
    )
    with data_errors(job.name):
        if tile or args.keep_metadata:
            data, remark = encode_in_tiles(load(in_tiles=True), image, tile or 0, job, args)
        else:
            coder = load()
            x = utils.to_tensor(image)[None].to(next(coder.model.parameters()).device)
            data, remark = encode_to_target(
                lambda quality: coder.encode(x, quality),
                lambda data: utils.psnr(coder.decode(data), x),
                image.width * image.height,
                args,
            )
            if args.verify:
                coder.decode(data)
    write_bytes(data, job.target)
    return describe_size(image.width, image.height, len(data)) + remark


def encode_in_tiles(
    coder: Coder, image: Image.Image, tile: int, job: Job, args: argparse.Namespace
) -> tuple[bytes, str]:
    """`encode_to_target` for files of version 3, which are verified if flags say so."""
    from models import tiles

    track = functools.partial(utils.progress, unit="tile", name=job.name)
    profile, exif = (
        (image.info.get(name) or b"" if args.keep_metadata else b"")
        for name in ("icc_profile", "exif")
    )

    def code(quality: float | None) -> bytes:
        return tiles.encode(
            coder,
            image,
            quality,
            tile=tile,
            margin=DEFAULT_MARGIN,
            icc=profile,
            exif=exif,
            jobs=args.jobs,
            verify=args.verify,
            track=track,
        )

    def psnr(data: bytes) -> float:
        decoded, _ = tiles.decode(coder, container.unpack(data), jobs=args.jobs, track=track)
        return utils.picture_psnr(decoded, image)

    return encode_to_target(code, psnr, image.width * image.height, args)


def encode_to_target(
    encode: Callable[[float | None], bytes],
    psnr: Callable[[bytes], float],
    pixels: int,
    args: argparse.Namespace,
) -> tuple[bytes, str]:
    """Code a picture of so many pixels at the quality, or for the target, that flags give.

    Args:
        encode: codes it at a quality.
        psnr: of a coded picture, in dB.

    Returns:
        The `.mvc` file, and what there is to say about its quality.
    """
    if args.target_psnr is not None:
        target, unit = args.target_psnr, "dB"
    elif args.target_bpp is not None:
        target, unit = args.target_bpp, "bpp"
    elif args.target_bytes is not None:
        target, unit = args.target_bytes, "bytes"
    else:
        data = encode(args.quality)
        return data, "" if args.quality is None else f", quality {args.quality:g}"

    def measure(data: bytes) -> float:
        """What has a target, in its unit."""
        if unit == "dB":
            return psnr(data)
        return 8 * len(data) / pixels if unit == "bpp" else len(data)

    def logarithm(value: float) -> float:
        """Natural logarithm of the size, or of one over the mean squared error."""
        return value * math.log(10) / 10 if unit == "dB" else math.log(value)

    def code(quality: float) -> search.Coding:
        data = encode(quality)
        return search.Coding(quality, data, logarithm(measure(data)))

    found, codings = search.find_coding(code, logarithm(target))
    remark = f", quality {found.quality:g} found in {codings} codings"
    if unit == "dB":
        remark += f", {10 / math.log(10) * found.measure:.2f} dB"
    if abs(found.measure - logarithm(target)) > search.TOLERANCE:
        remark += f", the nearest to the target of {target:g} {unit}, which was not met"
    return found.data, remark


def decode_file(load: Callable[..., Coder], job: Job, args: argparse.Namespace) -> str:
    """Decode one `.mvc` file; return a line about the result.

    Raises:
        DataError: it cannot be decoded; or tiles are damaged and, as flags ask for, were filled.
    """
    data = read_bytes(job, container.MAX_BYTES)
    scale = SCALES[args.scale]
    damage = None
    with data_errors(job.name):
        stream = container.unpack(data, args.salvage)
        region = check_region(stream, args.region)
        if isinstance(stream, container.TiledStream):
            image, damaged = decode_tiles(load, stream, job, args)
            if damaged:
                damage = container.describe_damage(stream, damaged)
            options = {"icc_profile": stream.icc, "exif": stream.exif}
            save_large_picture(image, job.target, {k: v for k, v in options.items() if v})
        else:
            check_memory(load().model, stream.height, stream.width)
            image = utils.to_image(load().decode(stream)[0])
            if region:
                x, y, width, height = region
                image = image.crop((x, y, x + width, y + height))
            if scale > 1:
                image = image.reduce(scale)
            write_bytes(save_picture(image, job.target), job.target)
    if damage:
        raise DataError(f"{job.name}: {damage}; filled with the mean of those around them")
    line = describe_size(stream.width, stream.height, len(data))
    return f"{line}, {image.width}x{image.height} decoded" if region or scale > 1 else line


def check_region(
    stream: container.Stream | container.TiledStream, region: Sequence[int] | None
) -> tuple[int, int, int, int] | None:
    """Check that a region is part of a picture.

    Raises:
        DataError: it is not.
    """
    if region is None:
        return None
    x, y, width, height = region
    if not (0 < width <= stream.width - x and 0 < height <= stream.height - y):
        raise DataError(
            f"a region of {width}x{height} at {x}, {y} is no part of a picture of "
            f"{stream.width}x{stream.height} pixels"
        )
    return x, y, width, height


def decode_tiles(
    load: Callable[..., Coder],
    stream: container.TiledStream,
    job: Job,
    args: argparse.Namespace,
) -> tuple[Image.Image, list[int]]:
    """What `tiles.decode` returns, with the flags' options."""
    height, width = args.region[3:1:-1] if args.region else (stream.height, stream.width)
    # Whole, before PyTorch is loaded.
    if not args.salvage and not args.region:
        damaged = stream.damaged()
        if damaged:
            raise DataError(f"{container.describe_damage(stream, damaged)}; {SALVAGE_HINT}")
    check_tiles(load().model, height, width, stream.tile, stream.margin, args.max_memory, args.jobs)
    from models import tiles

    return tiles.decode(
        load(in_tiles=True),
        stream,
        region=args.region and tuple(args.region),
        scale=SCALES[args.scale],
        jobs=args.jobs,
        salvage=args.salvage,
        track=functools.partial(utils.progress, unit="tile", name=job.name),
    )


def save_large_picture(image: Image.Image, target: Path | None, metadata: dict) -> None:
    """Write a picture in the format of a file's ending, without a copy of it in memory.

    Args:
        metadata: arguments for Pillow.

    Raises:
        BrokenPipeError: nobody reads standard output any more.
        DataError: the format cannot hold it.
        UsageError: it cannot be written.
    """
    # Whether the format keeps every sample shows on some noise.
    noise = Image.merge("RGB", [Image.effect_noise((64, 64), 64) for _ in "RGB"])
    save_picture(noise, target)

    name = picture_format(target)
    options = metadata | {"PNG": PNG_OPTIONS, "WEBP": {"lossless": True}}.get(name, {})
    try:
        if target is None:
            image.save(sys.stdout.buffer, format=name, **options)
            sys.stdout.buffer.flush()
        else:
            with utils.atomic_write(target) as path, open(path, "wb") as file:
                image.save(file, format=name, **options)
    except OSError as error:
        if target is None and isinstance(error, BrokenPipeError):
            raise
        if error.errno is None:  # Pillow's own
            raise DataError(f"cannot write {target} in this format: {error}") from None
        where = target or "standard output"
        raise UsageError(f"cannot write {where}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"cannot write {target} in this format: {error}") from None


def save_picture(image: Image.Image, target: Path | None) -> bytes:
    """A picture in the format of a file's ending; warns if that does not keep every sample.

    Raises:
        DataError: the format cannot hold it.
    """
    name = picture_format(target)
    file = io.BytesIO()
    try:
        image.save(file, format=name, **({"lossless": True} if name == "WEBP" else {}))
        with Image.open(file) as saved:
            same = saved.convert("RGB").tobytes() == image.tobytes()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {target} in this format: {error}") from None
    if not same:
        warn(f"{target}: {name} loses quality again; decode to .png to keep every sample")
    return file.getvalue()


def describe_size(width: int, height: int, num_bytes: int) -> str:
    return f"{width}x{height}, {num_bytes} bytes, {8 * num_bytes / (width * height):.4f} bpp"


def describe(data: bytes) -> str:
    """What there is to say about a `.mvc` file: a line, and one for each of its first tiles.

    Raises:
        BitstreamError: it is not one, or it is damaged.
    """
    stream = container.unpack(data)
    path = "exact" if stream.exact else "fast (same machine only)"
    quality = "" if stream.quality is None else f"quality {stream.quality:g}, "
    line = (
        f"{describe_size(stream.width, stream.height, len(data))}, {quality}"
        f"model {stream.fingerprint.hex()}, version {stream.version}, {path} entropy path, "
    )
    if isinstance(stream, container.TiledStream):
        return line + "\n".join(describe_tiles(stream))
    strings = len(stream.y) + len(stream.z)
    return line + (
        f"y {len(stream.y)} bytes, z {len(stream.z)} bytes, header {len(data) - strings} bytes "
        f"with {len(stream.guards)} guards"
    )


def describe_tiles(stream: container.TiledStream) -> list[str]:
    """The end of a line about a file, and lines about its tiles.

    Raises:
        BitstreamError: tiles are damaged.
    """
    damaged = stream.damaged()
    if damaged:
        raise container.BitstreamError(
            f"{container.describe_damage(stream, damaged)}; {SALVAGE_HINT}"
        )
    rows, columns = stream.rows, stream.columns
    size = f"up to {stream.tile} pixels" if stream.tile else "any size"
    lines = [
        f"{len(rows)}x{len(columns)} tiles of {size}, margin {stream.margin}, "
        f"ICC profile {len(stream.icc)} bytes, EXIF {len(stream.exif)} bytes"
    ]
    for i, tile in enumerate(stream.tiles[:LISTED_TILES]):
        row, column = divmod(i, len(columns))
        (top, bottom), (left, right) = rows[row], columns[column]
        bottom, right = min(bottom, stream.height), min(right, stream.width)
        lines.append(
            f"  {stream.name(i)}: {right - left}x{bottom - top} at {left}, {top}, {len(tile)} bytes"
        )
    if len(stream.tiles) > LISTED_TILES:
        lines.append(f"  and {len(stream.tiles) - LISTED_TILES} more")
    return lines


def picture_format(target: Path | None) -> str:
    """Pillow's name of the format that a file's ending stands for; PNG for standard output.

    Raises:
        UsageError: Pillow writes no such format.
    """
    if target is None:
        return "PNG"
    name = Image.registered_extensions().get(target.suffix.lower())
    if name not in Image.SAVE or name not in Image.OPEN:
        raise UsageError(f"no picture format ends in {target.suffix!r}; use .png, for instance")
    if name in FIXED_SIZES:
        raise UsageError(f"{name} files hold pictures of a few fixed sizes only; use .png instead")
    return name


def run(jobs: Sequence[Job], work: Callable[[Job], str], to: TextIO | None) -> None:
    """Do all jobs and print a line about each to the stream ``to``.

    Raises:
        DataError: one failed, or, where there are several and they have been named, any did.
    """
    if len(jobs) == 1:
        utils.say(f"{jobs[0].name}: {work(jobs[0])}", to)
        return
    failed = 0
    with utils.progress(jobs, len(jobs), "file", label=lambda job: job.name) as tracked:
        for job in tracked:
            try:
                line = work(job)
            except DataError as error:  # noqa: PERF203, the other files are still good
                failed += 1
                utils.say(f"error: {error}", sys.stderr)
            else:
                utils.say(f"{job.name}: {line}", to)
    if failed:
        raise DataError(f"{failed} of {len(jobs)} files failed; they are named above")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.command == "info":

        def work(job: Job) -> str:
            with data_errors(job.name):
                return describe(read_bytes(job, container.MAX_BYTES))

        run([Job(_source(name), None) for name in args.inputs], work, sys.stdout)
        return

    ending = ".mvc" if args.command == "encode" else ".png"
    jobs = plan(args.inputs, args.output, ending, args.force)
    if args.command == "decode":
        picture_format(jobs[0].target)
    if args.output == STANDARD and (sys.stdout is None or sys.stdout.isatty()):
        raise UsageError("standard output is closed or a terminal; redirect it to a file or a pipe")
    checkpoint = find_checkpoint(args.checkpoint)

    @functools.cache
    def load(in_tiles: bool = False) -> Coder:
        """The coder, made when the first input is found fit to be coded.

        All that is checked before costs no PyTorch, which takes seconds to import. On a GPU tiles,
        which are of few sizes, have one that replays CUDA graphs.
        """
        from models import Coder, load_model

        if in_tiles:
            coder = load()
            if not args.cuda:
                return coder
            return Coder(coder.model, exact=coder.exact, graphs=True, precision=coder.precision)
        if args.max_memory is None:  # else what was freed would count
            keep_freed_memory()
        device = utils.select_device(args.cuda)
        check_backend(device)
        exact = args.command == "decode" or not args.fast_entropy
        model = load_model(checkpoint, device)
        limit_device(device, args.max_memory)
        if args.command == "encode":
            rates = (args.quality, args.target_bpp, args.target_psnr, args.target_bytes)
            is_given = any(rate is not None for rate in rates)
            check_rate(model, is_given, args.checkpoint, RATE_FLAGS)
        precision = utils.chosen_precision(args.precision, device)
        coder = Coder(model, exact=exact, precision=precision)
        if args.max_memory:
            coder.prepare()  # so that what it takes is known before tiles are chosen
        return coder

    def work(job: Job) -> str:
        if args.command == "encode":
            return encode_file(load, job, args)
        return decode_file(load, job, args)

    run(jobs, work, sys.stderr if args.output == STANDARD else sys.stdout)


if __name__ == "__main__":
    utils.run_main(main)
