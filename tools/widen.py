"""Give a network another number of channels of y, to train it on from there.

::

    python -m tools.widen mambavc-light wide.safetensors --M 320
    python train.py --checkpoint wide.safetensors ...

High rates need more of them than low ones: where even the least used channel takes a bit or two,
others are missing. All layers whose size depends on that number get new random weights; the blocks
of the transforms, in which most of the training is, keep theirs.
"""

from collections.abc import Sequence
from pathlib import Path

import utils
from models import SliceHyperprior
from models.checkpoint import (
    build_from_checkpoint,
    check_weights_output,
    load_checkpoint,
    save_weights,
)


def widened(model: SliceHyperprior, M: int) -> SliceHyperprior:
    """A network with M channels of y, and of this one's weights those that fit it.

    Args:
        model: is left as it is.
        M: a multiple of the number of its slices.

    Raises:
        ValueError: it is no such multiple.
    """
    wide = type(model)(**{**model.config, "M": M}).eval()
    own = wide.state_dict()
    kept = {k: v for k, v in model.state_dict().items() if v.shape == own[k].shape}
    wide.load_state_dict({**own, **kept})
    return wide


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
