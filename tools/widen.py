"""Give a network more channels of y, to train it on from there.

::

    python -m tools.widen mambavc-light-0.0130 wide.safetensors --M 320
    python train.py --checkpoint wide.safetensors ...

High rates need more of them than low ones: where even the least used channel takes a bit or two,
others are missing. The old channels are coded as they were. What g_a makes of the new ones is
random, but as large as of the old ones: what begins near zero is rounded to it, and stays there.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import utils
from models import SliceHyperprior
from models.checkpoint import (
    build_from_checkpoint,
    check_weights_output,
    load_checkpoint,
    save_weights,
)
from models.gains import Gains


@torch.no_grad()
def widened(model: SliceHyperprior, M: int) -> SliceHyperprior:
    """A network with M channels of y, of which this one's are the first of each slice.

    It predicts and decodes those as if there were no others.

    Args:
        model: is left as it is.
        M: a multiple of the number of slices, not below the channels of this network.

    Raises:
        ValueError: it is not.
    """
    slices, old_M = model.config["num_slices"], model.config["M"]
    if old_M > M:
        raise ValueError(f"M={M} is less than the {old_M} channels that there are")
    wide = type(model)(**{**model.config, "M": M}).eval()
    old_width, width = old_M // slices, M // slices
    parameters = dict(wide.named_parameters())
    for name, old in model.named_parameters():
        new = parameters[name]
        axis = next((i for i in range(old.ndim) if old.shape[i] != new.shape[i]), None)
        if axis is None:
            new.copy_(old)
            continue
        layer = wide.get_submodule(name.rpartition(".")[0])
        # Layers that read channels of y, or what is predicted of them, take nothing from new ones.
        is_input = axis == (0 if isinstance(layer, nn.ConvTranspose2d) else 1)
        if isinstance(layer, Gains):
            new.copy_(old.mean(1, keepdim=True).expand_as(new))
        elif name.startswith("cc_scale_transforms") and not is_input:
            # Channels as large as the old ones have scales like theirs.
            new.copy_(old[torch.arange(width) % old_width])
        elif is_input or name.startswith(("cc_mean_transforms", "lrp_transforms")):
            new.zero_()
        elif name.startswith("g_a") and new.ndim == 4:
            new.mul_(_row_norms(old).median() / _row_norms(new).median())
        channels = torch.arange(old.shape[axis])
        new.index_copy_(axis, channels // old_width * width + channels % old_width, old)
    return wide


def _row_norms(weight: Tensor) -> Tensor:
    """Of a convolution's weight, output by output."""
    return weight.flatten(1).norm(dim=1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = utils.ArgumentParser(prog="python -m tools.widen", description=__doc__.split("::")[0])
    parser.add_argument("checkpoint", help="file that train.py saved, or the name of a shipped one")
    parser.add_argument("output", type=Path, help="file to write, *.safetensors")
    parser.add_argument("--M", type=utils.positive_int, required=True, help="channels of y")
    parser.add_argument("--seed", type=utils.number(int, 0, 2**32), default=0, help="default: 0")
    args = parser.parse_args(argv)
    check_weights_output(args.output)
    utils.seed_everything(args.seed)
    checkpoint = load_checkpoint(args.checkpoint)
    try:
        model = widened(build_from_checkpoint(checkpoint, args.checkpoint), args.M)
    except ValueError as error:
        raise utils.UsageError(f"{args.checkpoint}: {error}") from None
    name = checkpoint.get("model", "mambavc")  # of the published code, which names none
    content = {"model": name, "model_args": model.config, "state_dict": model.state_dict()}
    save_weights(content, args.output)
    print(f"{args.output}: {name} with {args.M} channels of y, to be trained")


if __name__ == "__main__":
    utils.run_main(main)
