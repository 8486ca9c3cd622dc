"""Pillow reads and writes `.mvc` files once this module is imported.

::

    from PIL import Image
    import pillow_mvc  # the project's folder has to be on Python's path

    Image.open("a.png").convert("RGB").save("a.mvc")
    Image.open("a.mvc").show()

`Image.open` reads the header only. PyTorch is imported and weights are loaded when the first
picture is decoded or saved; they stay in memory. Pictures are saved with mambavc-light, or with
another checkpoint that `use` names, and opened with any that comes with the project. A file names
the model that decodes it: those of other models raise an OSError until `use` has named their
checkpoint. A network of every rate, as mambavc-light is, takes a `quality` from 0 to 100, by
default 50: `image.save("a.mvc", quality=30)`. For one of a single rate it is a ValueError.

Limits:

- 8-bit RGB. Grey pictures (mode L) come back as RGB. Other modes raise an OSError; convert them.
- Colours of an embedded profile are converted to sRGB. The profile itself, EXIF (so the
  orientation, too) and all other metadata are not stored: see `ImageOps.exif_transpose`.
- Sides of at most 65,535 pixels. Pictures of more than 4 megapixels are coded in tiles; decoded,
  they must fit in memory as 8-bit samples.
- A file ends where its stream ends: nothing may follow it in the same file.
- Streams are those of the exact entropy path, which any machine decodes. Files made with
  `codec.py encode --fast-entropy` raise an OSError on other machines.
- `save` does not decode what it wrote, as `codec.py encode` does.
- The project's folder must come before those of other packages called `models` or `utils`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image, ImageFile, UnidentifiedImageError

import utils
from models import container
from models.checkpoint import CHECKPOINT_FOLDER, find_checkpoint
from models.memory import (
    DEFAULT_MARGIN,
    MAX_WHOLE_PIXELS,
    check_memory,
    check_tiles,
    choose_tile,
)
from utils import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from models import Coder

MODES = ("RGB", "L")  # of pictures that can be saved
DEFAULT_QUALITY = 50  # of networks of every rate

# (path, device) of the checkpoints that files are decoded with; the first codes new ones.
_in_use = [
    (CHECKPOINT_FOLDER / f"{name}.safetensors", "cpu")
    for name in ("mambavc-light", "mambavc-light-0.0130")
]


def use(checkpoint: Path | str, device: torch.device | str = "cpu") -> None:
    """Save pictures with this checkpoint from now on, and open files that were made with it.

    Files of the checkpoints that were in use before, the shipped ones among them, still open.

    Args:
        checkpoint: file that train.py or tools.export wrote (of weights in parts, the index), or
            the name of a shipped one.
        device: that codes, "cuda" for instance.

    Raises:
        utils.UsageError: there is no such file.
    """
    entry = (find_checkpoint(checkpoint).resolve(), str(device))
    if entry in _in_use:
        _in_use.remove(entry)
    _in_use.insert(0, entry)


class MvcImageFile(ImageFile.ImageFile):
    format = "MVC"
    format_description = "MambaVC"

    def _open(self) -> None:
        try:
            height, width = container.read_size(self.fp.read(container.SIZE_BYTES))
        except container.BitstreamError as error:
            raise UnidentifiedImageError(f"cannot identify image file: {error}") from None
        self._size = (width, height)
        self._mode = "RGB"
        self.tile = [("mvc", (0, 0, width, height), 0, ())]

    def load_seek(self, position: int) -> None:
        """Tells `ImageFile.Parser`, by being there, that only a whole file can be decoded."""
        self.fp.seek(position)


class _Decoder(ImageFile.PyDecoder):
    _pulls_fd = True  # given the file, not its bytes in blocks

    def decode(self, _: bytes) -> tuple[int, int]:
        data = self.fd.read(container.MAX_BYTES + 1)
        with _os_errors():
            stream = container.unpack(data)
            if (stream.width, stream.height) != (self.state.xsize, self.state.ysize):
                raise DataError("the file was changed since it was opened")
            coder = _coder_of_model(stream.fingerprint)
            self.set_as_raw(_decode(coder, stream).tobytes())
        return -1, 0  # all is decoded, without an error


def _decode(coder: Coder, stream: container.Stream | container.TiledStream) -> Image.Image:
    height, width = stream.height, stream.width
    if isinstance(stream, container.TiledStream):
        from models import tiles

        check_tiles(coder.model, height, width, stream.tile, stream.margin, None, 1)
        image, _ = tiles.decode(coder, stream)
        return image
    check_memory(coder.model, height, width)
    return utils.to_image(coder.decode(stream)[0])


def _save(image: Image.Image, file: IO[bytes], _: str | bytes) -> None:
    if image.mode not in MODES:
        raise OSError(f"cannot write mode {image.mode} as MVC; convert the picture to RGB")
    options = image.encoderinfo
    with _os_errors():
        path, device = _in_use[0]
        coder = _load(path, device)
        tile = None
        if image.height * image.width > MAX_WHOLE_PIXELS:
            container.check_tiled_size(image.height, image.width, container.TILE_UNIT)
            tile = choose_tile(coder.model, image.height, image.width, None, 1)
        else:
            container.check_size(image.height, image.width)
            check_memory(coder.model, image.height, image.width)
    quality = _quality(coder, path, options.get("quality"))
    with _os_errors():
        profile = options.get("icc_profile", image.info.get("icc_profile"))
        converted, _ = utils.to_srgb(image, profile)
        if tile:
            from models import tiles

            data = tiles.encode(coder, converted, quality, tile=tile, margin=DEFAULT_MARGIN)
        else:
            data = coder.encode(utils.to_tensor(converted)[None].to(device), quality)
    file.write(data)


def _quality(coder: Coder, path: Path, quality: float | None) -> float | None:
    """The quality to code at: None for a network of a single rate.

    Raises:
        ValueError: it is none, or the network is of a single rate.
    """
    if not coder.model.qualities:
        if quality is not None:
            raise ValueError(
                f"{path.name} is a network of a single rate: leave quality out, or name a network "
                "of every rate with pillow_mvc.use"
            )
        return None
    if quality is None:
        return DEFAULT_QUALITY
    if not isinstance(quality, int | float) or not 0 <= quality <= 100:
        raise ValueError(f"expected a quality from 0 to 100, got {quality!r}")
    return quality


@functools.cache
def _load(path: Path, device: str) -> Coder:
    from models import Coder, load_model

    return Coder(load_model(path, device))


def _coder_of_model(fingerprint: bytes) -> Coder:
    """Of the checkpoints in use, the one whose model has this fingerprint."""
    others = []
    for path, device in _in_use:
        try:
            coder = _load(path, device)
        except UsageError as error:  # the file may be of another that is in use
            others.append(str(error))
            continue
        if coder.fingerprint == fingerprint:
            return coder
        others.append(f"{path.name} is {coder.fingerprint.hex()}")
    raise DataError(
        f"made by model {fingerprint.hex()}, and {', '.join(others)}; name the checkpoint it was "
        "made with: pillow_mvc.use(CHECKPOINT)"
    )


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Errors of data and checkpoints as those that Pillow raises."""
    try:
        with utils.data_errors("MVC"):
            yield
    except (DataError, UsageError) as error:
        raise OSError(str(error)) from None


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(b"MVC")


Image.register_open(MvcImageFile.format, MvcImageFile, _accept)
Image.register_save(MvcImageFile.format, _save)
Image.register_extension(MvcImageFile.format, ".mvc")
Image.register_decoder("mvc", _Decoder)
