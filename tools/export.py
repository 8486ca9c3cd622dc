"""Turn a training checkpoint into a small file of weights to share."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import utils
from models.checkpoint import build_from_checkpoint, check_rate, load_checkpoint, save_weights


def main(argv: Sequence[str] | None = None) -> None:
    parser = utils.ArgumentParser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("checkpoint", help="file that train.py saved")
    parser.add_argument("output", type=Path, help="file to write, *.safetensors")
    parser.add_argument(
        "--quality",
        type=utils.quality,
        metavar="Q",
        help="write what a network of every rate is at this quality, 0 to 100: a network of a "
        "single rate, with the published keys",
    )
    args = parser.parse_args(argv)
    if args.output.suffix != ".safetensors":
        parser.error(f"the output must end in .safetensors, got {args.output}")
    utils.check_output(args.output)
    checkpoint = load_checkpoint(args.checkpoint)
    missing = {"model", "model_args", "state_dict"} - checkpoint.keys()
    if missing:
        raise utils.UsageError(
            f"{args.checkpoint} lacks {', '.join(sorted(missing))}; give a file that train.py saved"
        )
    # Refuses what could not be loaded again.
    model = build_from_checkpoint(checkpoint, args.checkpoint)
    exact = {}
    if args.quality is not None:
        check_rate(model, True, args.checkpoint, "--quality")
        # At the precision of the gains: other weights of a shared file are rounded already.
        exact = model.scaled_layers
        lmbda = model.lmbda(args.quality)
        print(f"quality {args.quality:g} is lambda {lmbda:.4f}", file=sys.stderr)
        model = model.at_quality(args.quality)
        checkpoint = {
            "model": checkpoint["model"],
            "model_args": model.config,
            "state_dict": model.state_dict(),
        }
    if save_weights(checkpoint, args.output, exact) and args.quality is None:
        print(
            "rounding to half precision changed the model's fingerprint: what was coded with "
            f"{args.checkpoint} decodes with that file only, not with {args.output}",
            file=sys.stderr,
        )
    digest = hashlib.sha256(args.output.read_bytes()).hexdigest()
    print(f"{digest}  {args.output.name}")


if __name__ == "__main__":
    utils.run_main(main)
