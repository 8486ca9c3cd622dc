"""What the programs share: errors, logging, devices, pictures, metrics and files.

It imports nothing else of this project, and PyTorch and NumPy only where a function computes with
them: they take seconds to import, which a program should not spend on a misspelt flag.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import math
import os
import platform
import random
import re
import secrets
import signal
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, TextIO, TypeVar

from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")

logger = logging.getLogger("mambavc")

MS_SSIM_MIN_SIDE = 161  # four halvings of an 11-pixel window: (11 - 1) * 2**4 + 1
SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal
# A colour profile that moves no sample by more levels than this is sRGB by another name.
MAX_PROFILE_DIFFERENCE = 2


class UsageError(Exception):
    """The command cannot be carried out as given: one line, exit code 2."""


class DataError(Exception):
    """The data cannot be used: one line, exit code 1."""


def run_main(main: Callable[[], None]) -> None:
    """Run a program's main function; expected errors become one line and an exit code."""
    # Ended like this, and not at once, the program removes its temporary files.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may hold bytes that the output's encoding has no character for.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except UsageError as error:
        sys.exit(_fail(error, 2))
    except DataError as error:
        sys.exit(_fail(error, 1))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 128 + signal.SIGINT))
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        # Python flushes once more as it ends, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # whoever read our output has seen enough
            sys.exit(128 + signal.SIGPIPE)
        sys.exit(_fail(f"cannot write: {error.strerror}; make room and try again", 2))
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: object, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # of processes that torchrun started, one speaks
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return code


@contextlib.contextmanager
def data_errors(name: object) -> Iterator[None]:
    """Say which input the network or the file format cannot handle, and why.

    Raises:
        DataError: in place of a ValueError (a `BitstreamError` is one) and of the errors that
            stand for too little memory.
    """
    try:
        yield
    except (ValueError, DataError) as error:
        raise DataError(f"{name}: {error}") from None
    except (MemoryError, RuntimeError) as error:
        # PyTorch's allocators raise RuntimeErrors, and oneDNN speaks of a primitive.
        signs = ("memory", "could not create a primitive")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        raise DataError(f"{name}: not enough memory for a picture of this size") from None


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line: `UsageError`, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def number(
    kind: type,
    least: float,
    below: float = math.inf,
    exclusive: bool = False,
    most: float = math.inf,
) -> Callable[[str], float]:
    """argparse type: an int or float from ``least``, or above it if ``exclusive``, to ``below``.

    Neither ``below`` nor infinity nor NaN is part of the range; ``most``, in its place, is.
    """

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value < below and value <= most and not (exclusive and value == least):
                return value
        limit = f"{'above' if exclusive else 'of at least'} {least}"
        limit += f" and below {below}" if below < math.inf else ""
        limit += f" and at most {most}" if most < math.inf else ""
        name = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {name} {limit}, got {text!r}")

    return parse


def multiple_of(unit: int, most: int, least: int = 0) -> Callable[[str], int]:
    """argparse type: a multiple of ``unit`` from ``least`` to ``most``."""

    def parse(text: str) -> int:
        value = number(int, 0)(text)
        if value % unit or not least <= value <= most:
            above = f" from {least}" if least else ""
            raise argparse.ArgumentTypeError(
                f"expected a multiple of {unit}{above} up to {most}, got {text!r}"
            )
        return value

    return parse


def size_in_bytes(text: str) -> int:
    """argparse type: bytes, with K, M, G or T for powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)i?B?", text, re.IGNORECASE)
    value = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not value:
        raise argparse.ArgumentTypeError(f"expected a size such as 4G or 800M, got {text!r}")
    return value


positive_int = number(int, 1)
quality = number(float, 0, most=100)  # of a network of every rate


@contextlib.contextmanager
def progress(
    items: Iterable[Item],
    total: int,
    unit: str,
    name: object = None,
    label: Callable[[Item], object] | None = None,
) -> Iterator[Iterable[Item]]:
    """Yield the items, and show how many of them were taken, how fast, and how long the rest takes.

    On a terminal that is a bar, which however the context ends is gone after it; what `say` and the
    log write goes above it. Elsewhere, in a log for instance, it is a line now and then, which work
    that is done sooner does not need. Both go to standard error.

    Args:
        total: number of items.
        unit: what one is called.
        name: of what they are parts of.
        label: gives the name of an item, which is shown as soon as it is taken.
    """

    def names(item: Item) -> list[str]:
        given = [name, None if label is None else label(item)]
        return [str(each) for each in given if each is not None]

    def with_lines() -> Iterator[Item]:
        start = said = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - said >= SECONDS_BETWEEN_LINES and done < total:
                said, speed = now, done / (now - start)
                left = tqdm.format_interval((total - done) / speed)
                count = f"{done} of {total} {unit}s, {speed:.3g} a second, {left} left"
                shown = ", ".join(names(item))
                print(f"{shown}: {count}" if shown else count, file=sys.stderr)

    def with_bar(bar: tqdm) -> Iterator[Item]:
        for item in items:
            shown = names(item)
            bar.set_description(", ".join(_shorten(each, 32 // len(shown)) for each in shown))
            yield item
            bar.update()

    if sys.stderr is None:
        yield items
    # Some terminals, such as those of CI services, have no size; tqdm draws nothing there.
    elif sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno())):
        bar = tqdm(total=total, unit=f" {unit}", leave=False, dynamic_ncols=True)
        with bar, logging_redirect_tqdm([logger]):
            yield with_bar(bar)
    else:
        yield with_lines()


def _shorten(name: str, length: int) -> str:
    """A name whose end is kept, which tells pictures apart; what would move the cursor is not."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    return name if len(name) <= length else f"...{name[3 - length :]}"


def say(line: str, to: TextIO | None) -> None:
    """Print a line above the bars of `progress`; to nowhere if the stream is closed."""
    if to is not None:
        tqdm.write(line, file=to)


def setup_logging(file: Path | None = None) -> None:
    """Send the project's log to the terminal and, where given, append it to a file."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def select_device(cuda: bool) -> torch.device:
    """The GPU if asked for, else the CPU.

    Raises:
        UsageError: a GPU was asked for and there is none.
    """
    import torch

    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--cuda was given but PyTorch sees no GPU; leave it out to use the CPU")
    return torch.device("cuda")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The flag of programs that code pictures; see `chosen_precision`."""
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the blocks of g_a and g_s; streams of one decode in the other. bfloat16 is faster "
        "on a GPU that computes in it, and the default there; it costs 0.002 dB on average",
    )


def chosen_precision(precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype that ``--precision`` names, by default the quicker one of a device."""
    import torch

    if precision is not None:
        return getattr(torch, precision)
    is_quick = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_quick else torch.float32


def cpu_name() -> str:
    """What Linux calls the processor, elsewhere its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def clock(device: torch.device) -> float:
    """Seconds of a steady clock, once the device has finished what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, libraries draw from the legacy generator
    torch.manual_seed(seed)


def list_images(folder: Path) -> list[Path]:
    """Files of a folder whose endings stand for formats that Pillow can read, sorted.

    Raises:
        UsageError: the folder is missing or holds no images.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give one that holds images")
    formats = Image.registered_extensions()
    files = sorted(
        path
        for path in folder.iterdir()
        if formats.get(path.suffix.lower()) in Image.OPEN and path.is_file()
    )
    if not files:
        raise UsageError(f"no images in {folder}; expected PNG, JPEG or another Pillow format")
    return files


def read_image(
    source: Path | str | BinaryIO,
    *,
    name: object = None,
    check_size: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
    keep_metadata: bool = False,
) -> Image.Image:
    """Read a picture as 8-bit sRGB, upright.

    The EXIF orientation is applied. Colours of another profile are converted to sRGB. Grey is
    repeated, palettes are looked up, transparency is laid over white. 16-bit grey samples are
    divided by 257 and rounded; of 16-bit colour samples Pillow keeps the high byte. Of an
    animation the first picture is read.

    Args:
        source: path or file object.
        name: how messages call it, by default its path.
        check_size: called with height and width before any pixel is decoded; a ValueError or
            DataError that it raises refuses the picture. It stands for Pillow's own limit.
        report: called with one line where the colours were converted, or could not be.
        keep_metadata: leave the samples of RGB pictures in the colours of their profile, which is
            then in ``info["icc_profile"]`` of what is returned, and EXIF in ``info["exif"]``.

    Raises:
        DataError: the file cannot be read as a picture, or it was refused.
    """
    name = source if name is None else name
    limit = Image.MAX_IMAGE_PIXELS if check_size is None else None
    with _picture_errors(name), _pixel_limit(limit):
        image = Image.open(source)
    with image:
        if check_size is not None:
            with data_errors(name):
                check_size(image.height, image.width)
        with _picture_errors(name), _pixel_limit(limit):
            image.load()
            file_format, profile = image.format, image.info.get("icc_profile")
            ImageOps.exif_transpose(image, in_place=True)  # a copy would take memory
    # Mode I holds the 16-bit samples of a PGM, and, with older versions of Pillow, of a PNG.
    if image.mode == "F" or (image.mode == "I" and file_format not in ("PNG", "PPM")):
        raise DataError(
            f"{name} has floating-point, signed or 32-bit samples, whose white is unknown; "
            "expected unsigned integers of at most 16 bits"
        )
    grey = image.mode.startswith(("1", "L", "I")) and image.mode != "LAB"
    opacity = None
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        opacity = image.getchannel("A")
    if grey or image.mode != "CMYK":
        image = image.convert("L" if grey else "RGB")
    # Of white, all profiles of RGB say the same.
    keep_profile = keep_metadata and profile and image.mode == "RGB" and _is_of_rgb(profile)
    if not keep_profile:
        image, note = to_srgb(image, profile)
        if note and report is not None:
            report(f"{name}: {note}")
    if opacity is not None:
        info = image.info
        image = Image.composite(image, Image.new("RGB", image.size, "white"), opacity)
        image.info |= info
    if not keep_profile:
        image.info.pop("icc_profile", None)  # which a saved copy would still claim to be in
    return image


def _is_of_rgb(profile: bytes) -> bool:
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space
    except (OSError, ImageCms.PyCMSError):
        return False
    return space.strip() == "RGB"


@contextlib.contextmanager
def _pixel_limit(limit: int | None) -> Iterator[None]:
    """Let Pillow read pictures of so many pixels, or of any number."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limit
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _picture_errors(name: object) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata and large pictures
            yield
    except UnidentifiedImageError:
        raise DataError(f"cannot read {name} as a picture: no format that Pillow knows") from None
    except Exception as error:  # Pillow's readers raise many types for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"cannot read {name} as a picture: {reason}") from None


def _to_8_bits(image: Image.Image) -> Image.Image:
    import numpy as np

    result = Image.new("L", image.size)
    for top in range(0, image.height, 256):  # rows, or the integers would take four times as much
        part = np.asarray(image.crop((0, top, image.width, min(top + 256, image.height))))
        # Rounded: 257 is odd, so that nothing lies in the middle.
        rounded = ((part.astype(np.int64) + 128) // 257).clip(0, 255)
        result.paste(Image.fromarray(rounded.astype(np.uint8)), (0, top))
    return result


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """A grey, RGB or CMYK picture of this ICC profile in sRGB; what was done, if anything."""
    plain = image.convert("RGB")
    if not profile:
        return plain, None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            # Grey pictures, too, may come with the profile of an RGB one.
            plain if source.profile.xcolor_space.strip() == "RGB" else image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        description = " ".join(ImageCms.getProfileDescription(source).split())
    except (ImageCms.PyCMSError, OSError, ImportError) as error:
        return plain, f"its colour profile cannot be used and is ignored ({error})"
    extrema = ImageChops.difference(plain, converted).getextrema()
    if max(high for _, high in extrema) <= MAX_PROFILE_DIFFERENCE:
        return plain, None
    return converted, f"colours converted to sRGB from the profile {description!r}"


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB picture as float32 (3, height, width) in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def to_image(x: Tensor) -> Image.Image:
    """(3, height, width) in [0, 1], rounded and clamped to 8 bits, as a picture."""
    return Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy())


def to_uint8(x: Tensor) -> Tensor:
    """Values in [0, 1] as the 8-bit samples a PNG would hold.

    Raises:
        DataError: a value is not finite: no sample stands for it.
    """
    import torch

    if not x.isfinite().all():
        raise DataError("the network's picture is not finite; check its weights")
    return x.mul(255).round().clamp(0, 255).to(torch.uint8)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all RGB samples, on values rounded to 8 bits.

    Args:
        a, b: same shape, in [0, 1]. Identical pictures give infinity.
    """
    mse = (to_uint8(a).double() - to_uint8(b).double()).square().mean().item()
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def picture_psnr(a: Image.Image, b: Image.Image) -> float:
    """`psnr` of two RGB pictures of any size, of which a few rows at a time are compared."""
    import numpy as np

    total = 0
    for top in range(0, a.height, 256):
        box = (0, top, a.width, min(top + 256, a.height))
        first, second = (np.asarray(image.crop(box)).astype(np.int64) for image in (a, b))
        total += int(np.square(first - second).sum())
    mse = total / (3 * a.width * a.height)
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def ms_ssim(a: Tensor, b: Tensor) -> float | None:
    """Multi-scale SSIM of RGB pictures (batch, 3, height, width), on values rounded to 8 bits.

    None where a side is under 161 pixels, which five scales of an 11-pixel window need.
    """
    from pytorch_msssim import ms_ssim

    if min(a.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return None
    return ms_ssim(to_uint8(a).float(), to_uint8(b).float(), data_range=255).item()


def ms_ssim_db(value: float) -> float:
    """MS-SSIM in dB: -10 log10(1 - value)."""
    return -10 * math.log10(1 - value) if value < 1 else math.inf


def estimated_bpp(likelihoods: dict[str, Tensor], num_pixels: int) -> float:
    """Bits per pixel of the picture that ideal coding with these likelihoods would take."""
    return sum(-v.double().log2().sum().item() for v in likelihoods.values()) / num_pixels


def make_folder(folder: Path) -> None:
    """Create a folder with its parents, unless it exists, and make sure it can be written to.

    Raises:
        UsageError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder}: {error.strerror}; choose another folder"
        ) from None


def check_output(path: Path) -> None:
    """Make sure that a file can be written there, before the work whose result it takes.

    Raises:
        UsageError: it cannot.
    """
    folder = Path(os.path.realpath(path)).parent if os.path.islink(path) else path.parent
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not folder.is_dir():
            raise UsageError(
                f"cannot write {path}: folder {folder} does not exist; create it"
            ) from None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another name") from None
    else:
        if stat.S_ISDIR(mode):
            raise UsageError(f"cannot write {path}: it is a folder; give the name of a file")
        if not os.access(path, os.W_OK):
            raise UsageError(f"cannot write {path}: Permission denied; choose another name")
        if not stat.S_ISREG(mode):
            return
    make_folder(folder)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place on success.

    A process that dies on the way leaves the old file as it was. The new file has the old one's
    permissions. Of a symbolic link the file that it leads to is replaced. What is no regular
    file, such as a device or a named pipe, cannot be replaced: its own path is yielded.
    """
    exists = path.exists()
    if exists and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    # Names have at most 255 bytes; a character takes up to four.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}")
    permissions = 0o600 if exists else 0o666  # less what the user's umask takes away
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, permissions))
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if exists:
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
