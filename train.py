"""Train a codec on the pictures of a folder, on one or on many processes.

One process:         python train.py --cuda -d ROOT --lambda 0.0130 --save_path runs
One for each GPU:    torchrun --nproc_per_node=G train.py --cuda -d ROOT ...
"""

import argparse
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

import models
import utils
from kernels.graphs import GraphedGradients, GraphedUpdate
from models.checkpoint import load_checkpoint
from training import data, state
from training.distributed import Processes
from training.log import Measured, RunLog
from training.optim import fix_A, lr_factor, make_optimizers
from training.precision import LowPrecision
from utils import DataError, number, positive_int

logger = logging.getLogger("mambavc")

MAX_BAD_STEPS = 10  # non-finite steps in a row that end a run
SHOWN_PICTURES = 3  # reconstructions that a validation keeps to be looked at


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
    add("--fixed-A", action="store_true",
        help="leave the scans' A at its first values, which takes a faster kernel (not with "
        "--compile)")
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
        help="replay steps from CUDA graphs: much faster where a GPU waits for its host; needs "
        "--cuda and --type mse, no --accumulate or --grad-checkpoint")
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
    others = args.accumulate > 1 or args.grad_checkpoint or args.type == "ms-ssim"
    if args.cuda_graph and (others or not args.cuda):
        parser.error(
            "--cuda-graph needs --cuda and --type mse, no --accumulate or --grad-checkpoint"
        )
    if args.learning_rate is None:
        args.learning_rate = 2e-3 if args.optimizer == "muon" else 1e-4
    return args


def as_input(pixels: Tensor) -> Tensor:
    """uint8 (batch, height, width, 3) as float32 (batch, 3, height, width) in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)  # this order is called channels last


@dataclass
class Step:
    """One step of the optimisers: forward and backward passes, clipping, update.

    Args:
        model: the network, in training mode, on its device.
        criterion: CompressAI's `RateDistortionLoss`.
        net_optimizers, aux_optimizer: see `make_optimizers`.
        processes: that average their gradients.
        amp: run the network in bfloat16 where autocast does.
        clip: largest norm of the network's gradient.
        graphs: replay passes and updates from CUDA graphs; a step is then one batch.
    """

    model: models.SliceHyperprior
    criterion: nn.Module
    net_optimizers: dict[str, Optimizer]
    aux_optimizer: Optimizer
    processes: Processes
    amp: bool = False
    clip: float = math.inf
    graphs: bool = False

    def __post_init__(self) -> None:
        self.optimizers = [*self.net_optimizers.values(), self.aux_optimizer]
        groups = [group for each in self.net_optimizers.values() for group in each.param_groups]
        self.net_parameters = [p for group in groups for p in group["params"]]
        self.captured_shape: torch.Size | None = None
        self.net = self.processes.wrap(self.model, average=not self.graphs)
        self.forward = LowPrecision(self.net) if self.amp else self.net

    def __call__(self, batches: Sequence[Tensor], stop: threading.Event | None = None) -> Measured:
        """Take a step on the mean loss of batches, unless it is not finite.

        Args:
            batches: crops, uint8 (batch, height, width, 3), of equal shapes.
            stop: set where this process wants to stop; the result tells all processes so.
        """
        if self.graphs:
            measured = self._replay(*batches)
        else:
            parts = len(batches)
            measured = sum(self._backward(x, parts, i == parts) for i, x in enumerate(batches, 1))
        norm = nn.utils.clip_grad_norm_(self.net_parameters, self.clip)

        # The only point at which the host waits for the device. A value that is not finite on
        # one process is so in the sum, and all decide alike.
        wants_stop = norm.new_tensor(stop is not None and stop.is_set())
        sums = self.processes.sum(torch.stack([*measured, norm, wants_stop]))
        loss, bpp, mse, norm = (value / self.processes.world_size for value in sums[:4])
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if is_finite and self.graphs:
            self.graphed_update()
        for optimizer in self.optimizers:
            if is_finite and not self.graphs:
                optimizer.step()
            optimizer.zero_grad()
        suspect = not is_finite and (math.isfinite(loss) or not measured[0].isfinite().item())
        return Measured(loss, bpp, mse, norm, is_finite, suspect, stop=sums[4] > 0)

    def _backward(self, pixels: Tensor, parts: int = 1, last: bool = True) -> Tensor:
        """Add the gradients of one of a step's parts; its shares of loss, bpp and MSE: (3,)."""
        x = as_input(pixels.to(self.processes.device, non_blocking=True))
        amp = torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp)
        # Processes average their gradients in the backward pass of the last part.
        alone = nullcontext() if last or self.net is self.model else self.net.no_sync()
        with alone:
            with amp, self.processes.global_draws():
                output = self.forward(x)
            output["x_hat"] = output["x_hat"].float()
            terms = self.criterion(output, x)
            loss = terms["loss"] / parts
            if last:
                # It reaches the quantiles only and the loss reaches everything else: after one
                # backward pass both are averaged together.
                loss = loss + self.model.aux_loss()
            loss.backward()
        mse = terms["mse_loss"] if "mse_loss" in terms else F.mse_loss(output["x_hat"], x)
        return torch.stack([terms["loss"], terms["bpp_loss"], mse]).detach() / parts

    def _replay(self, pixels: Tensor) -> Tensor:
        """`_backward` of a step's only batch from a CUDA graph, which is captured at first."""
        pixels = pixels.to(self.processes.device, non_blocking=True)
        if pixels.shape != self.captured_shape:
            parameters = list(self.model.parameters())
            self.graphed_backward = GraphedGradients(self._backward, parameters, pixels)
            self.graphed_update = GraphedUpdate(self.optimizers)  # of gradients in a new place
            self.captured_shape = pixels.shape
        measured = self.graphed_backward(pixels)
        # A replay runs no hooks, by which other backward passes average them.
        self.processes.average([p.grad for p in self.model.parameters() if p.grad is not None])
        return measured


class Validation(NamedTuple):
    """What a validation found."""

    means: dict[str, float]  # loss, bpp, psnr and, of large pictures, ms-ssim; empty if unfinished
    pictures: list[tuple[Tensor, Tensor]]  # some x and x_hat, (3, height, width)
    stopped: bool  # by a signal to some process
    failures: list[str]  # such as too little memory for a picture


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: Iterable[Tensor],
    criterion: nn.Module,
    processes: Processes,
    stop: threading.Event,
) -> Validation:
    """Measure the test pictures, which the processes share, in float32."""
    rows: list[dict[str, float | None]] = []  # one for each picture
    shown: list[tuple[Tensor, Tensor]] = []
    failures: list[str] = []
    try:
        for pixels in batches:
            if stop.is_set():
                break
            count, height, width = pixels.shape[:3]
            with utils.data_errors(f"validation on {count} picture(s) of {width}x{height}"):
                x = as_input(pixels.to(processes.device, non_blocking=True))
                output = model(x)
                terms = criterion(output, x)
                of_batch = {"loss": terms["loss"].item(), "bpp": terms["bpp_loss"].item()}
                for original, x_hat in zip(x, output["x_hat"], strict=True):
                    row = {**of_batch, "psnr": math.nan, "ms-ssim": None}
                    if x_hat.isfinite().all():
                        row["psnr"] = utils.psnr(x_hat, original)
                        row["ms-ssim"] = utils.ms_ssim(x_hat[None], original[None])
                        shown.append((original, x_hat))
                    rows.append(row)
                del shown[SHOWN_PICTURES:]
    except DataError as error:
        failures.append(str(error))
    rows, failures = processes.gather(rows), processes.gather(failures)
    stopped = any(processes.gather([stop.is_set()]))
    means = {}
    for key in rows[0] if rows and not failures and not stopped else ():
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            means[key] = statistics.fmean(values)
    return Validation(means, shown, stopped, failures)


def train(
    run: state.Run,
    take_step: Step,
    batches: Iterator[data.Batch],
    accumulate: int,
    learning_rate: Callable[[int], float],
    judge: Callable[[nn.Module], Validation],
    total_steps: int,
    val_every: int,
    save_every: int,
    log: RunLog,
    stop: threading.Event,
) -> bool:
    """Train until ``total_steps`` or ``stop``, and save the last state; True if it was stopped.

    Args:
        run: goes on from where it stands.
        batches: of which a step takes ``accumulate``.
        learning_rate: of a step, from 0.
        judge: validates a network.

    Raises:
        DataError: too many steps in a row were not finite, a validation failed, or the last state
            cannot be saved.
    """
    bad_steps = 0
    stopped = unsaved = False
    judged = run.history[-1]["step"] if run.history else 0
    while True:
        # What is due after the last step comes first: a signal may have kept a run from it.
        loss, failures = math.inf, []
        is_due = run.step == total_steps or run.step % val_every == 0
        if is_due and judged < run.step and not stopped:
            run.model.eval()
            means, pictures, stopped, failures = judge(run.used_model)
            run.model.train()
            unsaved = True
            if means:
                judged, loss = run.step, means["loss"]
                run.history.append({"step": run.step, **means})
                log.validation(means, pictures)
        ends = bool(stopped or failures or run.step >= total_steps)
        if unsaved and (ends or loss < run.best_loss or run.step % save_every == 0):
            run.save(loss, must=ends)
            unsaved = False
        if failures:
            advice = "use smaller test pictures or --test-batch-size 1, then --continue_train"
            raise DataError(f"{failures[0]}; {advice} from step {run.step}")
        if ends:
            return stopped

        start = time.perf_counter()
        parts = [next(batches) for _ in range(accumulate)]
        waited = time.perf_counter() - start
        log.skipped(problem for part in parts for problem in part.problems)
        rate = learning_rate(run.step)
        for optimizer in run.net_optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        measured = take_step([part.pixels for part in parts], stop)
        stopped = measured.stop
        unsaved = True
        if measured.is_finite:
            bad_steps = 0
            if run.ema:
                run.ema.update(run.model, run.step + 1)
        else:
            bad_steps += 1
            names = [name for part in parts for name in part.names if measured.suspect]
            log.not_finite(bad_steps, names)
            if bad_steps == MAX_BAD_STEPS:
                raise DataError(
                    f"{bad_steps} steps in a row were not finite, the last at step {run.step}; "
                    "lower the learning rate, and look at the pictures that the log names"
                )
        run.step += 1
        seconds = time.perf_counter() - start
        log.step(measured, rate, seconds, waited)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from layers.compressai import RateDistortionLoss  # after --help, which need not wait for it

    with ExitStack() as stack:
        processes = stack.enter_context(Processes(args.cuda))
        folder = args.save_path / f"{args.lmbda:g}"
        stack.enter_context(state.own_folder(folder, processes))
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True

        source = state.find_checkpoint(folder, args.checkpoint, args.continue_train)
        checkpoint = load_checkpoint(source) if source else None
        workers = data.capped_workers(args.num_workers, processes)
        pictures, test_pictures = data.open_dataset(args.dataset, args.cache, processes)
        global_batch = args.batch_size * args.accumulate * processes.world_size
        epoch_steps = len(pictures) / global_batch
        total_steps = args.max_steps or math.ceil(args.epochs * epoch_steps)

        utils.seed_everything(args.seed)
        wanted = {"model": args.model, "N": args.N, "M": args.M}
        name, model = state.build_model(wanted, checkpoint, source, processes.device)
        if args.fixed_A:
            fix_A(model)
        rates = args.learning_rate, args.aux_learning_rate
        optimizers = make_optimizers(model, args.optimizer, *rates)
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        save_folder = folder if args.save and processes.is_first else None
        run = state.Run(
            name, model, *optimizers, flags, global_batch, epoch_steps, args.ema, save_folder
        )
        if checkpoint is not None and args.continue_train:
            run.restore(checkpoint, source)
        state.prepare_transforms(model, processes, args.grad_checkpoint, args.compile)
        criterion = RateDistortionLoss(args.lmbda, metric=args.type)
        amp, clip = args.amp is not None, args.clip_max_norm or math.inf
        step = Step(model, criterion, *optimizers, processes, amp, clip, args.cuda_graph)
        run.keep_earlier_checkpoints()  # under other names, now that all processes have read them

        crops = data.Crops(pictures, args.patch_size, args.seed)
        start = run.step * args.accumulate
        sampler = data.CropSampler(
            len(pictures), args.batch_size, args.seed, start, *processes.place
        )
        batches = stack.enter_context(data.training_batches(crops, sampler, workers, args.cuda))
        min_side = utils.MS_SSIM_MIN_SIDE if args.type == "ms-ssim" else 1
        test_batches = data.WholePictures(
            test_pictures, args.test_batch_size, workers, *processes.place, min_side
        )

        stop = stack.enter_context(state.sigterm())
        log = stack.enter_context(RunLog(folder, run, total_steps, args.log_every, processes))

        def judge(network: nn.Module) -> Validation:
            # Nothing is worth compiling or tuning for sizes that vary from picture to picture.
            eager = torch.compiler.set_stance("force_eager") if args.compile else nullcontext()
            with eager, torch.backends.cudnn.flags(benchmark=False):
                found = validate(network, test_batches, criterion, processes, stop)
            log.skipped(test_batches.problems)
            return found

        def learning_rate(step: int) -> float:
            milestones = [epoch * epoch_steps for epoch in args.lr_epoch]
            factor = lr_factor(step, args.schedule, total_steps, milestones, args.warmup_steps)
            return args.learning_rate * factor

        stopped = train(
            run,
            step,
            batches,
            args.accumulate,
            learning_rate,
            judge,
            total_steps,
            args.val_every or math.ceil(epoch_steps),
            args.save_every or math.ceil(epoch_steps),
            log,
            stop,
        )
    logger.info("%s at step %d", "stopped by SIGTERM" if stopped else "done", run.step)


if __name__ == "__main__":
    utils.run_main(main)
