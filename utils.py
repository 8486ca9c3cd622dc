"""What the programs share: errors, pictures, metrics, files, logging."""

import argparse
import contextlib
import logging
import math
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from pytorch_msssim import ms_ssim as _ms_ssim
from torch import Tensor

logger = logging.getLogger("mambavc")

MS_SSIM_MIN_SIDE = 161  # four halvings of an 11-pixel window: (11 - 1) * 2**4 + 1


class UsageError(Exception):
    """The command cannot be carried out as given: one line, exit code 2."""


class DataError(Exception):
    """The data cannot be used: one line, exit code 1."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main function; expected errors become one line and an exit code."""
    try:
        main()
    except UsageError as error:
        sys.exit(_fail(error, 2))
    except DataError as error:
        sys.exit(_fail(error, 1))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _fail(message: object, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # of processes that torchrun started, one speaks
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return code


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line: `UsageError`, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")


def setup_logging(file: Path | None = None) -> None:
    """Send the project's log to the terminal and, where given, append it to a file."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def select_device(cuda: bool) -> torch.device:
    """The GPU if asked for, else the CPU.

    Raises:
        UsageError: a GPU was asked for and there is none.
    """
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--cuda was given but PyTorch sees no GPU; leave it out to use the CPU")
    return torch.device("cuda")


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
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, libraries draw from the legacy generator
    torch.manual_seed(seed)


# Images


def list_images(folder: Path) -> list[Path]:
    """Files of a folder that Pillow has a reader for, by their ending, sorted.

    Raises:
        UsageError: the folder is missing or holds no images.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give one that holds images")
    endings = Image.registered_extensions()
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and p.is_file())
    if not files:
        raise UsageError(f"no images in {folder}; expected PNG, JPEG or another Pillow format")
    return files


def read_image(
    source: Path | str | BinaryIO, *, name: object = None, max_pixels: int | None = None
) -> Image.Image:
    """Read a picture as 8-bit RGB, upright.

    The EXIF orientation is applied. Grey is repeated, palettes are looked up, transparency is
    laid over white. 16-bit grey samples are divided by 257 and rounded; of 16-bit colour samples
    Pillow keeps the high byte. Of an animation the first picture is read.

    Args:
        source: path or file object.
        name: how error messages call it, by default its path.
        max_pixels: refuse larger pictures before they are decoded.

    Raises:
        DataError: the file cannot be read as a picture, or it is too large.
    """
    name = source if name is None else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata and large pictures
            with Image.open(source) as image:
                pixels = image.width * image.height
                if max_pixels is not None and pixels > max_pixels:
                    raise DataError(
                        f"{name}: a picture of {image.width}x{image.height} pixels is too large; "
                        f"at most {max_pixels} pixels are supported"
                    )
                image.load()
                image = ImageOps.exif_transpose(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"cannot read {name} as a picture: no format that Pillow knows") from None
    except Exception as error:  # Pillow's readers raise many types for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"cannot read {name} as a picture: {reason}") from None
    if image.mode == "F":
        raise DataError(f"{name} has floating-point samples; expected 8- or 16-bit integers")
    if image.mode.startswith("I"):
        samples = np.asarray(image, dtype=np.float64) / 257
        return Image.fromarray(samples.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB picture as float32 (3, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def to_image(x: Tensor) -> Image.Image:
    """(3, height, width) in [0, 1], rounded and clamped to 8 bits, as a picture."""
    return Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy())


def to_uint8(x: Tensor) -> Tensor:
    """Values in [0, 1] as the 8-bit samples a PNG would hold."""
    return x.mul(255).round().clamp(0, 255).to(torch.uint8)


# Metrics


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all RGB samples, on values rounded to 8 bits.

    Args:
        a, b: same shape, in [0, 1]. Identical pictures give infinity.
    """
    mse = F.mse_loss(to_uint8(a).double(), to_uint8(b).double()).item()
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def ms_ssim(a: Tensor, b: Tensor) -> float | None:
    """Multi-scale SSIM of RGB pictures (batch, 3, height, width), on values rounded to 8 bits.

    None where a side is under 161 pixels, which five scales of an 11-pixel window need.
    """
    if min(a.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return None
    return _ms_ssim(to_uint8(a).float(), to_uint8(b).float(), data_range=255).item()


def ms_ssim_db(value: float) -> float:
    """MS-SSIM in dB: -10 log10(1 - value)."""
    return -10 * math.log10(1 - value) if value < 1 else math.inf


def estimated_bpp(likelihoods: dict[str, Tensor], num_pixels: int) -> float:
    """Bits per pixel of the picture that ideal coding with these likelihoods would take."""
    return sum(-v.double().log2().sum().item() for v in likelihoods.values()) / num_pixels


# Files


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


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place on success.

    A process that dies on the way leaves the old file as it was.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """Make sure that a file can be written there, before the work whose result it takes.

    Raises:
        UsageError: it cannot.
    """
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: folder {path.parent} does not exist; create it")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; give the name of a file")
    make_folder(path.parent)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return sum(values) / len(values)
