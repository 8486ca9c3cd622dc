"""Code pictures to `.mvc` files and back.

    python codec.py encode IN.png OUT.mvc --checkpoint C
    python codec.py decode IN.mvc OUT.png --checkpoint C
    python codec.py info IN.mvc

Several inputs go to an output folder. ``-`` is standard input or output. Exit codes: 0 success,
1 the data cannot be used, 2 the command cannot be carried out as given.
"""

import argparse
import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import utils
from models import Coder, SliceHyperprior, container
from models import checkpoint as checkpoint_file
from utils import DataError, UsageError

STANDARD = "-"
MAX_PICTURE_BYTES = 2**30  # of a picture file on standard input


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
        command.add_argument("--force", action="store_true", help="overwrite existing files")
    encode.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode what was written before reporting success (default)",
    )
    encode.add_argument(
        "--fast-entropy",
        action="store_true",
        help="float32 entropy path: the file decodes on the same machine only",
    )
    info.add_argument("inputs", nargs="+", metavar="IN", help="file, or - for standard input")
    return parser.parse_args(argv)


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
    folder = output != STANDARD and (
        len(inputs) > 1 or output[-1:] in "/\\" or Path(output).is_dir()
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
        if job.target.exists() and not force:
            raise UsageError(f"{job.target} exists; give --force to overwrite it")
        if job.target.exists() and job.source and job.target.samefile(job.source):
            raise UsageError(f"{job.target} is both input and output; give another output")
    if folder:
        utils.make_folder(Path(output))
    elif jobs[0].target:
        utils.check_output(jobs[0].target)
    return jobs


def _source(name: str) -> Path | None:
    if name == STANDARD:
        return None
    if not Path(name).exists():
        raise UsageError(f"{name} does not exist")
    if Path(name).is_dir():
        raise UsageError(f"{name} is a folder; give the files in it")
    return Path(name)


def read_bytes(source: Path | None, limit: int) -> bytes:
    """Contents of a file or of standard input.

    Raises:
        DataError: there are more than ``limit`` bytes.
        UsageError: the file cannot be read.
    """
    try:
        with (
            contextlib.nullcontext(sys.stdin.buffer) if source is None else open(source, "rb")
        ) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}") from None
    if len(data) > limit:
        raise DataError(f"{source or 'standard input'} is too long; at most {limit} bytes expected")
    return data


def write_bytes(data: bytes, target: Path | None, check: Callable[[bytes], None]) -> None:
    """Write a file or to standard output; an existing file is replaced at the very end.

    Args:
        check: called with what was written before it takes the target's place.

    Raises:
        UsageError: it cannot be written.
    """
    if target is None:
        check(data)
    try:
        if target is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        with utils.atomic_write(target) as temporary:
            temporary.write_bytes(data)
            check(temporary.read_bytes())
    except OSError as error:
        where = target or "standard output"
        raise UsageError(f"cannot write {where}: {error.strerror or error}") from None


@contextlib.contextmanager
def data_errors(name: str) -> Iterator[None]:
    """Say which input cannot be coded or decoded, and why.

    Raises:
        DataError: in place of the errors of the model and of the container.
    """
    try:
        yield
    except ValueError as error:  # BitstreamError is one
        raise DataError(f"{name}: {error}") from None
    except (MemoryError, RuntimeError) as error:
        # PyTorch's CPU allocator raises a bare RuntimeError.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise DataError(f"{name}: not enough memory for a picture of this size") from None


class Codec:
    """A model with its fingerprint: pictures to `.mvc` files and back.

    Args:
        load: returns the model, on the device. It is called for the first input that can be
            coded: others are refused at once.
    """

    def __init__(self, load: Callable[[], SliceHyperprior], device: torch.device):
        self.load = load
        self.device = device

    @functools.cached_property
    def coders(self) -> dict[bool, Coder]:
        """One that codes exactly and one that does not, of one model."""
        model = self.load()
        return {exact: Coder(model, exact=exact) for exact in (True, False)}

    @property
    def fingerprint(self) -> bytes:
        return self.coders[True].fingerprint

    @torch.inference_mode()
    def encode(self, image: Image.Image, exact: bool) -> bytes:
        """Code an 8-bit RGB picture.

        Raises:
            BitstreamError, ValueError: it is too large, or the model cannot code it.
        """
        container.check_size(image.height, image.width)
        x = utils.to_tensor(image)[None].to(self.device)
        return self.coders[exact].encode(x)

    @torch.inference_mode()
    def decode(self, data: bytes) -> Image.Image:
        """Decode a `.mvc` file.

        Raises:
            BitstreamError: it cannot be decoded to the right picture.
        """
        stream = container.unpack(data)
        return utils.to_image(self.coders[stream.exact].decode(stream)[0])


def encode_file(codec: Codec, job: Job, exact: bool, verify: bool) -> str:
    """Code one picture; return a line about the result."""
    source = job.source or io.BytesIO(read_bytes(None, MAX_PICTURE_BYTES))
    image = utils.read_image(source, name=job.name, max_pixels=container.MAX_PIXELS)

    def check(written: bytes) -> None:
        if verify:
            codec.decode(written)

    with data_errors(job.name):
        data = codec.encode(image, exact)
        write_bytes(data, job.target, check)
    return describe_size(image.width, image.height, len(data))


def decode_file(codec: Codec, job: Job) -> str:
    """Decode one `.mvc` file; return a line about the result."""
    data = read_bytes(job.source, container.MAX_BYTES)
    with data_errors(job.name):
        image = codec.decode(data)
    picture = io.BytesIO()
    try:
        image.save(picture, format=picture_format(job.target))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {job.target} in this format: {error}") from None
    write_bytes(picture.getvalue(), job.target, lambda written: None)
    return describe_size(image.width, image.height, len(data))


def describe_size(width: int, height: int, num_bytes: int) -> str:
    return f"{width}x{height}, {num_bytes} bytes, {8 * num_bytes / (width * height):.4f} bpp"


def describe(data: bytes) -> str:
    """One line about a `.mvc` file.

    Raises:
        BitstreamError: it is not one, or it is damaged.
    """
    stream = container.unpack(data)
    strings = len(stream.y) + len(stream.z)
    path = "exact" if stream.exact else "fast (same machine only)"
    return (
        f"{describe_size(stream.width, stream.height, len(data))}, "
        f"model {stream.fingerprint.hex()}, version {container.VERSION}, {path} entropy path, "
        f"y {len(stream.y)} bytes, z {len(stream.z)} bytes, header {len(data) - strings} bytes "
        f"with {len(stream.guards)} guards"
    )


def picture_format(target: Path | None) -> str:
    """Pillow's name of the format that a file's ending stands for; PNG for standard output.

    Raises:
        UsageError: Pillow writes no such format.
    """
    if target is None:
        return "PNG"
    name = Image.registered_extensions().get(target.suffix.lower())
    if name not in Image.SAVE:
        raise UsageError(f"no picture format ends in {target.suffix!r}; use .png, for instance")
    return name


def run(jobs: Sequence[Job], work: Callable[[Job], str], to: object) -> None:
    """Do all jobs and print a line about each to the stream ``to``.

    Raises:
        DataError: one failed, or, where there are several and they have been named, any did.
    """
    failed = 0
    for job in tqdm(jobs, unit="file", disable=None if len(jobs) > 1 else True, leave=False):
        try:
            line = work(job)
        except DataError as error:  # noqa: PERF203, the other files are still good
            if len(jobs) == 1:
                raise
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
        else:
            tqdm.write(f"{job.name}: {line}", file=to)
    if failed:
        raise DataError(f"{failed} of {len(jobs)} files failed; they are named above")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.command == "info":

        def work(job: Job) -> str:
            with data_errors(job.name):
                return describe(read_bytes(job.source, container.MAX_BYTES))

        run([Job(_source(name), None) for name in args.inputs], work, sys.stdout)
        return

    ending = ".mvc" if args.command == "encode" else ".png"
    jobs = plan(args.inputs, args.output, ending, args.force)
    if args.command == "decode":
        picture_format(jobs[0].target)
    if args.output == STANDARD and sys.stdout.isatty():
        raise UsageError("standard output is a terminal; redirect it to a file or a pipe")
    device = utils.select_device(args.cuda)
    checkpoint = checkpoint_file.find_checkpoint(args.checkpoint)
    codec = Codec(functools.partial(checkpoint_file.load_model, checkpoint, device), device)

    def work(job: Job) -> str:
        if args.command == "encode":
            return encode_file(codec, job, not args.fast_entropy, args.verify)
        return decode_file(codec, job)

    run(jobs, work, sys.stderr if args.output == STANDARD else sys.stdout)


if __name__ == "__main__":
    utils.run_main(main)
