"""Train a codec on the pictures of a folder, on one or on many processes.

One process:         python train.py --cuda -d ROOT --lambda 0.0130 --save_path runs
One for each GPU:    torchrun --nproc_per_node=G train.py --cuda -d ROOT ...
"""

import argparse
import logging
import signal
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

import models
import utils
from models import checkpoint as checkpoint_file
from training.distributed import Processes
from training.engine import Trainer, checkpoint_path
from utils import number, positive_int

logger = logging.getLogger("mambavc")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive_float = number(float, 0, exclusive=True)
    # One flag in two lines reads better than ruff's six.
    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=models.list_models(), help="default: mambavc")
    add("--N", type=positive_int, help="half the width of the transforms (default: the model's)")
    add("--M", type=positive_int, help="channels of the latents (default: the model's)")
    add("--checkpoint", type=Path, metavar="FILE",
        help="start from the weights in FILE at step 0 (fine-tuning); with --continue_train go "
        "on from all of its state")

    add = parser.add_argument_group("data").add_argument
    add("-d", "--dataset", type=Path, required=True, metavar="ROOT",
        help="folder with pictures in train/ and test/")
    add("--batch-size", type=positive_int, default=8, help="of one process (default: 8)")
    add("--test-batch-size", type=positive_int, default=1,
        help="test pictures are taken whole, as many of one size together (default: 1)")
    add("--patch-size", type=positive_int, nargs=2, default=[256, 256], metavar=("H", "W"),
        help="of the random crops (default: 256 256)")
    add("-n", "--num-workers", type=number(int, 0), default=4,
        help="processes that read pictures, at most the CPUs there are (default: 4)")
    add("--cache", action="store_true", help="decode all pictures once and keep them in memory")

    add = parser.add_argument_group("optimisation").add_argument
    add("--lambda", dest="lmbda", type=positive_float, default=0.05,
        help="weight of the distortion against the rate (default: 0.05)")
    add("--type", choices=["mse", "ms-ssim"], default="mse", help="distortion (default: mse)")
    add("-e", "--epochs", type=positive_int, default=500, help="default: 500")
    add("--max-steps", type=positive_int, help="length of the run in steps, in place of --epochs")
    add("--optimizer", choices=["adam", "muon"], default="adam",
        help="muon: orthogonalised momentum for matrices and kernels, Adam for the rest")
    add("-lr", "--learning-rate", type=positive_float,
        help="default: 1e-4 for adam, 2e-3 for muon")
    add("--aux-learning-rate", type=positive_float, default=1e-3,
        help="of the entropy bottleneck's quantiles (default: 1e-3)")
    add("--schedule", choices=["multistep", "cosine"], default="multistep",
        help="multistep: a tenth from each epoch of --lr_epoch on; cosine: down to zero at the end")
    add("--lr_epoch", type=positive_int, nargs="+", default=[450, 490], help="default: 450 490")
    add("--warmup-steps", type=number(int, 0), default=0,
        help="the learning rate rises linearly over these first (default: 0)")
    add("--clip_max_norm", type=number(float, 0), default=1.0,
        help="largest norm of the gradient; 0: any (default: 1)")
    add("--accumulate", type=positive_int, default=1, metavar="K",
        help="add up the gradients of K batches for one step (default: 1)")
    add("--ema", type=number(float, 0, 1), metavar="DECAY",
        help="keep a running mean of the weights, which is validated and saved for use")
    add("--seed", type=number(int, 0, 2**32), default=0, help="default: 0")

    add = parser.add_argument_group("machine").add_argument
    add("--cuda", action="store_true",
        help='train on GPUs, with float32 matrix products in TF32 (PyTorch\'s precision "high")')
    add("--amp", choices=["bf16"],
        help="mixed precision; scan states and entropy model stay in float32")
    add("--compile", action="store_true", help="compile the transforms with torch.compile")
    add("--cuda-graph", action="store_true",
        help="replay backward passes and optimisers from CUDA graphs: much faster where a GPU "
        "waits for its host; needs --cuda and --type mse, no --accumulate or --grad-checkpoint")
    add("--grad-checkpoint", action="store_true",
        help="recompute blocks in the backward pass: less memory, more time")

    add = parser.add_argument_group("output").add_argument
    add("--save_path", type=Path, default=Path("runs"), metavar="DIR",
        help="the run's folder is DIR/<lambda> (default: runs)")
    add("--save", action=argparse.BooleanOptionalAction, default=True, help="write checkpoints")
    add("--continue_train", action="store_true",
        help="go on from the run's latest checkpoint, from --checkpoint if it has none yet")
    add("--val-every", type=positive_int, metavar="STEPS", help="default: every epoch")
    add("--save-every", type=positive_int, metavar="STEPS", help="default: every epoch")
    add("--log-every", type=positive_int, default=50, metavar="STEPS", help="default: 50")
    # fmt: on
    args = parser.parse_args(argv)
    if args.type == "ms-ssim" and min(args.patch_size) < utils.MS_SSIM_MIN_SIDE:
        parser.error(
            f"--type ms-ssim needs a --patch-size of at least {utils.MS_SSIM_MIN_SIDE}, "
            f"got {args.patch_size[0]} {args.patch_size[1]}"
        )
    if args.cuda_graph and (not args.cuda or args.accumulate > 1):
        parser.error("--cuda-graph needs --cuda and no --accumulate")
    if args.cuda_graph and (args.grad_checkpoint or args.type == "ms-ssim"):
        parser.error("--cuda-graph goes neither with --grad-checkpoint nor with --type ms-ssim")
    if args.learning_rate is None:
        args.learning_rate = 2e-3 if args.optimizer == "muon" else 1e-4
    return args


def find_checkpoint(args: argparse.Namespace, folder: Path) -> Path | None:
    """The checkpoint that the flags ask to start or to go on from.

    A command that is given again after its run was killed goes on with that run, also where
    --checkpoint says how it began; a checkpoint of the run itself is taken as asked.
    """
    latest = checkpoint_path(folder, "latest")
    if not args.continue_train:
        return args.checkpoint
    if latest.exists():
        if args.checkpoint is None:
            return latest
        if args.checkpoint.resolve().parent != folder.resolve():
            logger.info("going on from %s, which is later than %s", latest, args.checkpoint)
            return latest
    elif args.checkpoint is None:
        logger.info("nothing to go on from in %s: starting at step 0", folder)
    return args.checkpoint


def tidy(folder: Path, keep_run: bool) -> None:
    """Remove what a killed run left half written; give another run's checkpoints a new name."""
    for name in ("best", "latest"):
        path = checkpoint_path(folder, name)
        for leftover in folder.glob(f".{path.name}.*"):
            leftover.unlink()
        if path.exists() and not keep_run:
            date = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
            kept = path.replace(folder / f"{date}-{path.name}")
            logger.info("%s of an earlier run is kept as %s", path.name, kept.name)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    processes = Processes(args.cuda)
    try:
        folder = args.save_path / f"{args.lmbda:g}"
        utils.make_folder(folder)
        utils.setup_logging(folder / "train.log" if processes.is_first else None)
        if not processes.is_first:
            logger.setLevel(logging.WARNING)
        args.checkpoint = find_checkpoint(args, folder)
        checkpoint = checkpoint_file.load_checkpoint(args.checkpoint) if args.checkpoint else None
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        trainer = Trainer(args, processes, folder, checkpoint)
        if processes.is_first:
            tidy(folder, keep_run=args.continue_train)
        handler = signal.signal(signal.SIGTERM, lambda *_: trainer.request_stop())
        try:
            trainer.run()
        finally:
            signal.signal(signal.SIGTERM, handler)
    finally:
        processes.close()


if __name__ == "__main__":
    utils.run_main(main)
