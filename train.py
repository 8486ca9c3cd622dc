"""Train a codec on the pictures of a folder, on one or on many processes.

One process:         python train.py --cuda -d ROOT --lambda 0.0130 --save_path runs
One for each GPU:    torchrun --nproc_per_node=G train.py --cuda -d ROOT ...
"""

import argparse
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

import models
import utils
from kernels.graphs import GraphedPasses, GraphedUpdate
from models.checkpoint import check_backend, load_checkpoint
from training import data, state
from training.criterion import RateDistortionLoss, draw_qualities, rate_weight
from training.crops import CropSampler, patch_schedule, scheduled_size
from training.data import as_input
from training.distributed import Processes
from training.gradients import FlatGradients
from training.log import Measured, RunLog
from training.optim import (
    first_cooldown_step,
    fix_A,
    lr_factor,
    make_optimizers,
    warmup_factor,
)
from training.precision import LowPrecision
from training.validation import Validation, validate
from utils import DataError, number, positive_int

logger = logging.getLogger("mambavc")

MAX_BAD_STEPS = 10  # non-finite steps in a row that end a run


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
    add("--qualities", type=number(int, 2), metavar="K",
        help="one network for all rates, with gains learnt at K qualities; each crop is trained at "
        "a random one. With --checkpoint of a single rate it starts from those weights")
    add("--drop-path", type=number(float, 0, below=1), metavar="RATE",
        help="stochastic depth: the probability of leaving out the last block of a path in a step, "
        "and less for those before it (default: the model's)")
    add("--checkpoint", type=Path, metavar="FILE",
        help="start from the weights in FILE at step 0 (fine-tuning); with --continue_train go "
        "on from all of its state")

    group = parser.add_argument_group("data")
    add, add_size = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("-d", "--dataset", type=Path, required=True, metavar="ROOT",
        help="folder with pictures in train/ and test/")
    add("--batch-size", type=positive_int, default=8, help="of one process (default: 8)")
    add("--test-batch-size", type=positive_int, default=1,
        help="test pictures are taken whole, as many of one size together (default: 1)")
    add_size("--patch-size", type=positive_int, nargs=2, default=[256, 256], metavar=("H", "W"),
        help="of the random crops (default: 256 256)")
    add_size("--patch-schedule", type=patch_schedule, metavar="SIDE:UNTIL,...,SIDE",
        help="square crops that grow: 128:0.8,256 is 128x128 for 0.8 of the run, then 256x256; "
        "UNTIL above 1 is a step")
    add("--rotate", action="store_true",
        help="turn crops by a random number of quarters; flips there are always")
    add("-n", "--num-workers", type=number(int, 0), default=4,
        help="processes that read pictures, at most the CPUs there are (default: 4)")
    add("--cache", action="store_true",
        help="decode all pictures once and keep them, on the GPU if they fit in a quarter of its "
        "memory, where crops are then cut without workers")

    add = parser.add_argument_group("optimisation").add_argument
    add("--lambda", dest="lmbda", type=positive_float,
        help="weight of the distortion against the rate (default: 0.05); not with --qualities, "
        "which have theirs")
    add("--type", choices=["mse", "ms-ssim"], default="mse", help="distortion (default: mse)")
    add("-e", "--epochs", type=positive_int, default=500, help="default: 500")
    add("--max-steps", type=positive_int, help="length of the run in steps, in place of --epochs")
    add("--max-minutes", type=positive_float, metavar="T",
        help="save and stop T minutes after the start, to go on with --continue_train")
    add("--optimizer", choices=["adam", "muon"], default="adam",
        help="muon: orthogonalised momentum for matrices and kernels, Adam for the rest")
    add("-lr", "--learning-rate", type=positive_float,
        help="default: 1e-4 for adam, 2e-3 for muon")
    add("--fixed-A", action="store_true",
        help="leave the scans' A at its first values, to which that of --checkpoint is set back: "
        "they have a faster kernel, which --compile does not take")
    add("--aux-learning-rate", type=positive_float, default=1e-3,
        help="of the entropy bottleneck's quantiles (default: 1e-3)")
    add("--schedule", choices=["multistep", "cosine", "wsd"], default="multistep",
        help="multistep: a tenth from each epoch of --lr_epoch on; cosine: down to zero at the "
        "end; wsd: constant, then a cool-down to zero. A wsd run that is made longer goes on from "
        "before its cool-down")
    add("--cooldown-steps", type=number(float, 0), metavar="N",
        help="of wsd, at the end; below 1: a fraction of the run (default: 0.2)")
    add("--cooldown-shape", choices=["1-sqrt", "linear"],
        help="of wsd (default: 1-sqrt, which falls fast at first)")
    add("--lr_epoch", type=positive_int, nargs="+", default=[450, 490], help="default: 450 490")
    add("--warmup-steps", type=number(int, 0), default=0,
        help="the learning rate rises linearly over these, at first and where optimisers start "
        "anew (default: 0)")
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
        help="the run's folder is DIR/<lambda>, or DIR/variable with --qualities (default: runs)")
    add("--save", action=argparse.BooleanOptionalAction, default=True, help="write checkpoints")
    add("--continue_train", action="store_true",
        help="go on from the run's latest checkpoint, from --checkpoint if it has none yet")
    add("--val-every", type=positive_int, metavar="STEPS", help="default: every epoch")
    add("--save-every", type=positive_int, metavar="STEPS", help="default: every epoch")
    add("--log-every", type=positive_int, default=50, metavar="STEPS", help="default: 50")
    # fmt: on
    args = parser.parse_args(argv)
    if args.patch_schedule is None:
        args.patch_schedule = [(tuple(args.patch_size), math.inf)]
    smallest = min((size for size, _ in args.patch_schedule), key=min)
    if args.type == "ms-ssim" and min(smallest) < utils.MS_SSIM_MIN_SIDE:
        parser.error(
            f"--type ms-ssim needs a --patch-size of at least {utils.MS_SSIM_MIN_SIDE}, "
            f"got {smallest[0]} {smallest[1]}"
        )
    if args.qualities and (args.lmbda or args.type == "ms-ssim"):
        parser.error("--qualities has lambdas of its own, for --type mse: leave out --lambda")
    if args.lmbda is None and not args.qualities:
        args.lmbda = 0.05
    if args.schedule != "wsd" and (args.cooldown_steps, args.cooldown_shape) != (None, None):
        parser.error("--cooldown-steps and --cooldown-shape are of --schedule wsd: give it, too")
    if args.cooldown_steps is None:
        args.cooldown_steps = 0.2
    args.cooldown_shape = args.cooldown_shape or "1-sqrt"
    others = args.accumulate > 1 or args.grad_checkpoint or args.type == "ms-ssim"
    if args.cuda_graph and (others or not args.cuda):
        parser.error(
            "--cuda-graph needs --cuda and --type mse, no --accumulate or --grad-checkpoint"
        )
    if args.learning_rate is None:
        args.learning_rate = 2e-3 if args.optimizer == "muon" else 1e-4
    return args


@dataclass
class Step:
    """One step of the optimisers: forward and backward passes, clipping, update.

    Args:
        model: the network, in training mode, on its device.
        criterion: `RateDistortionLoss`.
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
        if self.graphs:
            aux_parameters = [p for g in self.aux_optimizer.param_groups for p in g["params"]]
            self.net_gradients = FlatGradients(self.net_parameters)
            self.aux_gradients = FlatGradients(aux_parameters)
            self.graphed_update = GraphedUpdate(self.optimizers)

    def __call__(self, batches: Sequence[Tensor], stop: threading.Event | None = None) -> Measured:
        """Take a step on the mean loss of batches, unless it is not finite.

        Args:
            batches: crops, uint8 (batch, height, width, 3), of equal shapes.
            stop: set where this process wants to stop; the result tells all processes so.
        """
        if self.graphs:
            measured = self._replay(*batches)
            norm = self.net_gradients.clip(self.clip)
        else:
            parts = len(batches)
            measured = sum(self._backward(x, parts, i == parts) for i, x in enumerate(batches, 1))
            norm = nn.utils.clip_grad_norm_(self.net_parameters, self.clip)

        # The only point at which the host waits for the device. A value that is not finite on
        # one process is so in the sum, and all decide alike.
        wants_stop = norm.new_full((), stop is not None and stop.is_set())  # a copy would wait
        sums = self.processes.sum(torch.stack([*measured, norm, wants_stop]))
        loss, bpp, mse, norm = (value / self.processes.world_size for value in sums[:4])
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if self.graphs:
            if is_finite:
                self.graphed_update()
        else:
            for optimizer in self.optimizers:
                if is_finite:
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
            quality, of_rate = None, ()
            with amp, self.processes.global_draws():
                if self.model.qualities:
                    quality = draw_qualities(len(x), x.device)
                    lmbda = self.model.lmbda(quality)
                    of_rate = lmbda, rate_weight(lmbda)
                output = self.forward(x, quality)
            output["x_hat"] = output["x_hat"].float()
            terms = self.criterion(output, x, *of_rate)
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
            self.graphed_passes = None  # its memory is free before the next one takes its own
            self.graphed_passes = GraphedPasses(self._flat_backward, pixels)
            self.captured_shape = pixels.shape
        measured = self.graphed_passes(pixels)
        # A replay runs no hooks, by which other backward passes average them.
        for gradients in (self.net_gradients, self.aux_gradients):
            self.processes.average(gradients.vector)
        return measured

    def _flat_backward(self, pixels: Tensor) -> Tensor:
        """`_backward`, with the gradients in their vectors."""
        for gradients in (self.net_gradients, self.aux_gradients):
            gradients.clear()
        measured = self._backward(pixels)
        for gradients in (self.net_gradients, self.aux_gradients):
            gradients.take()
        return measured


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
    cooldown_start: float,
    log: RunLog,
    stop: threading.Event,
) -> bool:
    """Train until ``total_steps`` or ``stop``, and save the last state; True if it was stopped.

    Args:
        run: goes on from where it stands.
        batches: of which a step takes ``accumulate``.
        learning_rate: of a step, from 0.
        judge: validates a network.
        cooldown_start: step at which the learning rate leaves its constant, infinite if it has
            none; the state there is kept.

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
        if run.step >= cooldown_start and run.cooldown_from is None:
            run.start_cooldown()

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
                run.update_ema()
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
    start_time = time.monotonic()

    with ExitStack() as stack:
        processes = stack.enter_context(Processes(args.cuda))
        folder = args.save_path / ("variable" if args.qualities else f"{args.lmbda:g}")
        stack.enter_context(state.own_folder(folder, processes))
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True

        source = state.find_checkpoint(folder, args.checkpoint, args.continue_train)
        checkpoint = load_checkpoint(source) if source else None
        if args.checkpoint is not None and source != args.checkpoint:
            state.check_not_behind(checkpoint, source, args.checkpoint)
        workers = 0 if args.cache else data.capped_workers(args.num_workers, processes)
        pictures, test_pictures = data.open_dataset(args.dataset, args.cache, processes)
        global_batch = args.batch_size * args.accumulate * processes.world_size
        epoch_steps = len(pictures) / global_batch
        total_steps = args.max_steps or math.ceil(args.epochs * epoch_steps)
        cooldown_start = math.inf
        if args.schedule == "wsd":
            cooldown_start = first_cooldown_step(total_steps, args.cooldown_steps)
            if checkpoint is not None and args.continue_train:
                checkpoint, source = state.before_cooldown(checkpoint, source, cooldown_start)

        utils.seed_everything(args.seed)
        wanted = {
            "model": args.model,
            "N": args.N,
            "M": args.M,
            "qualities": args.qualities,
            "drop_path_rate": args.drop_path,
        }
        name, model = state.build_model(wanted, checkpoint, source, processes.device)
        if args.fixed_A:
            fix_A(model, reset=checkpoint is not None and not args.continue_train)
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

        def patch_size(batch: int) -> tuple[int, int]:
            step = batch // args.accumulate
            return scheduled_size(args.patch_schedule, step, total_steps)

        crops = data.Crops(pictures, args.seed, args.rotate)
        start = run.step * args.accumulate
        sampler = CropSampler(
            len(pictures), args.batch_size, patch_size, args.seed, start, *processes.place
        )
        batches = stack.enter_context(data.training_batches(crops, sampler, workers, args.cuda))
        min_side = utils.MS_SSIM_MIN_SIDE if args.type == "ms-ssim" else 1
        test_batches = data.WholePictures(
            test_pictures, args.test_batch_size, workers, *processes.place, min_side
        )

        stop = stack.enter_context(state.stop_event(args.max_minutes, start_time))
        log = stack.enter_context(RunLog(folder, run, total_steps, args.log_every, processes))
        check_backend(processes.device)

        def judge(network: nn.Module) -> Validation:
            # Nothing is worth compiling or tuning for sizes that vary from picture to picture.
            eager = torch.compiler.set_stance("force_eager") if args.compile else nullcontext()
            with eager, torch.backends.cudnn.flags(benchmark=False):
                found = validate(network, test_batches, criterion, processes, stop)
            log.skipped(test_batches.problems)
            return found

        def learning_rate(step: int) -> float:
            milestones = [epoch * epoch_steps for epoch in args.lr_epoch]
            warm_up = warmup_factor(step - run.fresh_from, args.warmup_steps)
            cooldown = max(cooldown_start, run.cooldown_from or 0), args.cooldown_shape
            factor = lr_factor(step, args.schedule, total_steps, milestones, *cooldown)
            return args.learning_rate * warm_up * factor

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
            cooldown_start,
            log,
            stop,
        )
    logger.info("%s at step %d", "stopped" if stopped else "done", run.step)


if __name__ == "__main__":
    utils.run_main(main)
