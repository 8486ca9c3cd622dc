"""The networks that the tools count and measure, as the command line names them."""

import argparse

import torch

import models
import utils
from models.checkpoint import find_checkpoint, load_model
from utils import UsageError

MEASURED_QUALITY = 50  # of networks of every rate, whose operations are the same at all
# The three that the paper compares.
PAPER = ("mambavc", "convvc", "swinvc")
# Heights and widths of --sweep, from 256x256 to 4K.
SWEEP = ((256, 256), (512, 768), (1024, 1024), (1408, 2048), (2160, 3840))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which networks, and for pictures of which sizes."""
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(models.list_models())}, or checkpoints (default: the paper's three, "
        "or mambavc alone where they are not compared)",
    )
    parser.add_argument("--N", type=utils.positive_int, help="in place of the networks' own N")
    parser.add_argument("--M", type=utils.positive_int, help="in place of the networks' own M")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size", nargs=2, type=utils.positive_int, metavar=("HEIGHT", "WIDTH"), help="of pictures"
    )
    size.add_argument("--sweep", action="store_true", help="sizes from 256x256 to 4K")


def sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(height, width) of the pictures that the flags ask for; none if they do not say."""
    if args.sweep:
        return list(SWEEP)
    return [tuple(args.size)] if args.size else []


def build(name: str, N: int | None = None, M: int | None = None) -> models.SliceHyperprior:
    """The network of a registered name, with random weights that are always the same, or that of
    a checkpoint (of every rate: what it folds to at one quality); in eval mode, on the CPU.

    Raises:
        UsageError: there is no such network.
    """
    sizes = {key: value for key, value in (("N", N), ("M", M)) if value is not None}
    if name in models.list_models():
        torch.manual_seed(0)
        try:
            return models.build_model(name, **sizes).eval()
        except ValueError as error:
            raise UsageError(f"cannot build {name}: {error}") from None
    if sizes:
        raise UsageError(f"--{next(iter(sizes))} is for registered networks, not for {name}")
    try:
        find_checkpoint(name)
    except UsageError:
        raise UsageError(
            f"{name} is neither a network ({', '.join(models.list_models())}) nor a checkpoint"
        ) from None
    model = load_model(name)
    return model.at_quality(MEASURED_QUALITY) if model.qualities else model
