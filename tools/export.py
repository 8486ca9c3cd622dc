"""Turn a training checkpoint into a small file of weights to share."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import utils
from models.checkpoint import (
    PROGRESS,
    build_from_checkpoint,
    check_rate,
    check_weights_output,
    find_checkpoint,
    load_checkpoint,
    save_weights,
)
from models.weights import MAX_PART_BYTES, sha256

UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def file_size(text: str) -> int:
    """argparse type: bytes, of a number with or without a unit."""
    match = re.fullmatch(r"(\d{1,15})(kB|MB|GB|)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 50MB, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


def record_entry(text: str) -> tuple[str, str | int | float]:
    """argparse type: KEY=VALUE, where plain decimals are numbers."""
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    if re.fullmatch(r"-?\d{1,15}", value):
        return key, int(value)
    return key, float(value) if re.fullmatch(r"-?\d{1,15}\.\d{1,15}", value) else value


def training_of(checkpoint: dict) -> dict:
    """What a run's checkpoint says of its training; nothing, of weights alone."""
    if "history" not in checkpoint:
        return {}
    flags, batch = checkpoint["args"], checkpoint["global_batch"]
    return {
        **({} if flags["lmbda"] is None else {"lambda": flags["lmbda"]}),
        "seed": flags["seed"],
        "steps": checkpoint["step"],
        "crops_per_step": batch,
        "software": checkpoint["versions"],
        "validation": checkpoint["history"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = utils.ArgumentParser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("checkpoint", help="file that train.py saved")
    parser.add_argument(
        "output",
        type=Path,
        help="file to write, *.safetensors; what is too large for one is written as parts beside "
        "it and their index, *.safetensors.index.json, and goes by either name",
    )
    parser.add_argument(
        "--quality",
        type=utils.quality,
        metavar="Q",
        help="write what a network of every rate is at this quality, 0 to 100: a network of a "
        "single rate, with the published keys",
    )
    parser.add_argument(
        "--for-training",
        action="store_true",
        help="write the step, and the weights as they are trained in place of their running mean "
        "(--ema): from them `train.py --continue_train --checkpoint OUTPUT` goes on elsewhere",
    )
    parser.add_argument(
        "--weight-bytes",
        type=int,
        choices=[1, 2],
        default=2,
        help="1 is half the size, off by up to 1/254 of the largest weight of a row: for "
        "--for-training, which evens that out (default: 2, half precision)",
    )
    parser.add_argument(
        "--max-part-size",
        type=file_size,
        default=MAX_PART_BYTES,
        metavar="SIZE",
        help="of a file, in bytes, kB, MB or GB (default: 50MB)",
    )
    parser.add_argument(
        "--record",
        nargs="*",
        type=record_entry,
        metavar="KEY=VALUE",
        help="write also *.json with the SHA-256 and with what the checkpoint knows of its "
        "training; entries such as minutes=25 and command=TEXT add what it does not know. Weights "
        "in checkpoints/ are checked against theirs whenever they are loaded",
    )
    args = parser.parse_args(argv)
    check_weights_output(args.output)
    if args.for_training and args.quality is not None:
        parser.error("--for-training writes a network of every rate; leave out --quality")
    if args.weight_bytes == 1 and not args.for_training:
        parser.error("--weight-bytes 1 is for --for-training only; give both, or neither")
    record_path = args.output.with_suffix(".json")
    if args.record is not None and record_path.exists():
        raise utils.UsageError(f"{record_path} exists; rename it, or give another output")
    checkpoint = load_checkpoint(args.checkpoint)
    missing = {"model", "model_args", "state_dict"} - checkpoint.keys()
    if missing:
        raise utils.UsageError(
            f"{args.checkpoint} lacks {', '.join(sorted(missing))}; give a file that train.py saved"
        )
    training = {} if args.record is None else training_of(checkpoint)
    # Of a file without its step, a training starts at 0.
    progress = {key: checkpoint.pop(key, None) for key in PROGRESS}
    if args.for_training:
        if progress["step"] is None or "net" not in checkpoint:
            raise utils.UsageError(
                "--for-training needs a checkpoint of a run, such as its latest, and "
                f"{args.checkpoint} holds weights only"
            )
        checkpoint |= {"state_dict": checkpoint["net"], **progress}
    # Refuses what could not be loaded again.
    model = build_from_checkpoint(checkpoint, args.checkpoint)
    exact = {}
    if args.quality is not None:
        check_rate(model, True, args.checkpoint, "--quality")
        # At the precision of the gains: other weights of a shared file are rounded already.
        exact = model.scaled_layers
        lmbda = model.lmbda(args.quality)
        training |= {"quality": args.quality, "lambda": round(float(lmbda), 6)}
        print(f"quality {args.quality:g} is lambda {lmbda:.4f}", file=sys.stderr)
        model = model.at_quality(args.quality)
        checkpoint = {
            "model": checkpoint["model"],
            "model_args": model.config,
            "state_dict": model.state_dict(),
        }
    is_for_coding = args.quality is None and not args.for_training
    in_bytes = args.weight_bytes == 1
    changed = save_weights(checkpoint, args.output, exact, args.max_part_size, in_bytes)
    if changed and is_for_coding:
        print(
            "rounding to half precision changed the model's fingerprint: what was coded with "
            f"{args.checkpoint} decodes with that file only, not with {args.output}",
            file=sys.stderr,
        )
    written = find_checkpoint(args.output)
    digest = sha256(written)
    if args.record is not None:
        record = {"file": written.name, "sha256": digest, "model": checkpoint["model"]}
        record |= {**training, **dict(args.record)}
        with utils.atomic_write(record_path) as path:
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"{digest}  {written.name}")


if __name__ == "__main__":
    utils.run_main(main)
