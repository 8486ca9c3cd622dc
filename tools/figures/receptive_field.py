"""Effective receptive fields: how much each pixel of the picture moves one point of the output.

The gradient of the central point of the output to the picture, in absolute value, summed over
colours and averaged over pictures (Luo et al., arXiv:1701.04128).

::

    python -m tools.figures.receptive_field mambavc.pth.tar convvc.pth.tar swinvc.pth.tar \\
        --data kodak --save results/receptive_field.npz
    python -m tools.figures.receptive_field results/receptive_field.npz
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

import models
import utils
from models.checkpoint import build_from_checkpoint, load_checkpoint
from tools.figures import style
from utils import UsageError

SHARES = (0.5, 0.9, 0.99)
FLOOR = 1e-5  # of the peak; what is below is drawn in the darkest colour


def gradient(transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Absolute gradient of the central point of an output to a picture, summed over colours.

    Args:
        transform: from pictures to the output (1, channels, height, width).
        x: one picture (1, 3, height, width), sides multiples of 64.

    Returns:
        (height, width), float32.
    """
    x = x.detach().requires_grad_()
    output = transform(x)
    height, width = output.shape[-2:]
    (grad,) = torch.autograd.grad(output[0, :, height // 2, width // 2].sum(), x)
    return grad.abs().sum((0, 1))


def field(
    model: models.SliceHyperprior, files: Iterable[Path], size: int, device: torch.device
) -> np.ndarray:
    """Mean of `gradient` over the centres of pictures: (size, size), sums to 1.

    The output is the reconstruction from latents that are not rounded: rounding has no gradient.

    Raises:
        UsageError: a picture is smaller than ``size``.
    """
    total = torch.zeros(size, size, dtype=torch.float64)
    for file in files:
        x = utils.to_tensor(utils.read_image(file))
        height, width = x.shape[-2:]
        if min(height, width) < size:
            raise UsageError(f"{file} is {width}x{height}, smaller than --size {size}")
        top, left = (height - size) // 2, (width - size) // 2
        x = x[None, :, top : top + size, left : left + size].to(device)
        own = gradient(lambda x: model.g_s(model.g_a(x)), x).double().cpu()
        total += own / own.sum()
    return (total / total.sum()).numpy()


def sides(values: np.ndarray) -> dict[float, int]:
    """Side of the smallest centred square that holds each of `SHARES` of a field, in pixels."""
    size = len(values)
    centre = size // 2
    result = {}
    for share in SHARES:
        for radius in range(size):
            low, high = max(centre - radius, 0), min(centre + radius + 1, size)
            if values[low:high, low:high].sum() >= share * values.sum():
                break
        result[share] = high - low
    return result


def save(fields: dict[str, np.ndarray], about: str, path: Path) -> None:
    """Write fields to an .npz file, relative to their peaks, in half precision."""
    with utils.atomic_write(path) as temporary, open(temporary, "wb") as file:
        relative = {k: (v / v.max()).astype(np.float16) for k, v in fields.items()}
        np.savez_compressed(file, about=np.array(about), **relative)


def load(path: Path) -> dict[str, np.ndarray]:
    """Read what `save` wrote, as float64.

    Raises:
        UsageError: the file is not one of these.
    """
    try:
        with np.load(path) as file:
            fields = {k: v.astype(np.float64) for k, v in file.items() if k != "about"}
        if not fields or any(v.ndim != 2 or v.shape[0] != v.shape[1] for v in fields.values()):
            raise ValueError("it does not hold square maps")
    except (OSError, EOFError, TypeError, AttributeError, ValueError, BadZipFile) as error:
        raise UsageError(f"{path} is not a file that --save wrote: {error}") from None
    return fields


@style.styled
@rc_context({"axes.grid": False, "axes.titlelocation": "center"})
def draw(fields: dict[str, np.ndarray]) -> Figure:
    """Draw fields side by side, each relative to its peak."""
    figure = Figure((2.9 * len(fields) + 0.7, 3.3), layout="constrained")
    row = figure.subplots(1, len(fields), squeeze=False)[0]
    for axes, (name, values) in zip(row, fields.items(), strict=True):
        relative = np.maximum(values / values.max(), FLOOR)
        image = axes.imshow(relative, norm=LogNorm(FLOOR, 1), cmap="inferno")
        held = sides(values)
        label = ", ".join(f"{share:.0%}: {side} px" for share, side in held.items())
        axes.set(title=style.NAMES.get(name, name), xlabel=label, xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(image, ax=row.tolist(), shrink=0.8, pad=0.02)
    bar.set_label("gradient, relative to its peak")
    bar.outline.set_visible(False)
    return figure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = style.parser(
        "receptive_field", "Draw the effective receptive fields of trained networks."
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, help="checkpoints, or one .npz file that --save wrote"
    )
    parser.add_argument("--data", type=Path, help="folder of pictures to average over")
    parser.add_argument(
        "--size", type=utils.positive_int, default=512, help="side of the centre crops, pixels"
    )
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--save", type=Path, metavar="FILE.npz", help="write the fields here")
    args = parser.parse_args(argv)
    measured = args.inputs[0].suffix != ".npz"
    if measured and args.data is None:
        parser.error("checkpoints need --data FOLDER, the pictures to average over")
    if not measured and (len(args.inputs) > 1 or args.data or args.save):
        parser.error("an .npz file is drawn alone, without --data and --save")
    if args.size % 64:
        parser.error(f"--size {args.size} is not a multiple of 64; give one that is")
    style.check_output(args.output)
    if args.save is not None:
        if args.save.suffix != ".npz":
            parser.error(f"--save needs a name that ends in .npz, got {args.save}")
        utils.check_output(args.save)
    return args


def measure(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The field of each checkpoint, by the name of its model; saved if --save says so."""
    device = utils.select_device(args.cuda)
    files = utils.list_images(args.data)
    fields = {}
    for path in args.inputs:
        checkpoint = load_checkpoint(path)
        model = build_from_checkpoint(checkpoint, path).to(device)
        name = checkpoint.get("model", path.stem)
        shown = utils.progress(files, len(files), "picture", name, lambda file: file.name)
        with shown as tracked:
            fields[name] = field(model, tracked, args.size, device)
    if args.save is not None:
        about = f"gradient of the centre of x_hat, mean over {len(files)} pictures"
        save(fields, about, args.save)
    return fields


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    fields = load(args.inputs[0]) if args.data is None else measure(args)
    for name, values in fields.items():
        held = ", ".join(f"{share:.0%} within {side} px" for share, side in sides(values).items())
        print(f"{name}: {held}")
    style.save(draw(fields), args.output, dpi=150)


if __name__ == "__main__":
    utils.run_main(main)
