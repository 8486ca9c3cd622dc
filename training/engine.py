"""One training run: steps, validation, checkpoints."""

import argparse
import copy
import functools
import importlib.metadata
import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from compressai.losses import RateDistortionLoss
from compressai.models import CompressionModel
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import models
import utils
from kernels.graphs import GraphedGradients, GraphedUpdate
from models import checkpoint as checkpoint_file
from training.data import (
    Crops,
    CropSampler,
    Pictures,
    TestPictures,
    available_cpus,
    end_workers,
    training_batches,
)
from training.distributed import Processes
from training.log import Events, Meter
from training.optim import lr_factor, make_optimizers
from utils import DataError, UsageError

logger = logging.getLogger("mambavc")

MAX_BAD_STEPS = 10  # non-finite steps in a row that end a run
SHOWN_PICTURES = 3  # reconstructions among the TensorBoard events
TRANSFORMS = ("g_a", "g_s", "h_a", "h_mean_s", "h_scale_s")


def build_model(args: argparse.Namespace, checkpoint: dict | None) -> tuple[str, nn.Module]:
    """The network that the flags name, with the checkpoint's weights if there is one.

    Returns:
        Its registered name and the network, on the CPU.

    Raises:
        UsageError: the flags make no network, or another one than the checkpoint's.
    """
    wanted = {key: getattr(args, key) for key in ("model", "N", "M")}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    if checkpoint is None:
        name = wanted.pop("model", "mambavc")
        try:
            return name, models.build_model(name, **wanted)
        except ValueError as error:
            raise UsageError(str(error)) from None
    model = checkpoint_file.build_from_checkpoint(checkpoint, args.checkpoint)
    found = {**model.config, "model": checkpoint.get("model", "mambavc")}
    for key, value in wanted.items():
        if value != found[key]:
            raise UsageError(
                f"--{key} {value} does not fit the checkpoint, whose {key} is {found[key]}; "
                f"leave out --{key}"
            )
    return found["model"], model


def recompute_blocks(model: nn.Module, processes: Processes) -> None:
    """Have the blocks between the transforms' convolutions recomputed in the backward pass."""
    options = {"use_reentrant": False}
    if processes.world_size > 1:  # what is drawn again is to be what was drawn
        options["context_fn"] = lambda: (nullcontext(), processes.global_draws())
    for name in TRANSFORMS:
        for block in getattr(model, name):
            if not isinstance(block, nn.Conv2d | nn.ConvTranspose2d):
                block.forward = functools.partial(recompute, block.forward, **options)


def state_dict_with_tables(model: nn.Module) -> dict[str, Tensor]:
    """State dict with CDF tables, built on copies so that training is not disturbed."""
    coder = CompressionModel()
    coder.entropy_bottleneck = copy.deepcopy(model.entropy_bottleneck)
    coder.gaussian_conditional = copy.deepcopy(model.gaussian_conditional)
    coder.update(force=True, update_quantiles=True)
    return {**model.state_dict(), **coder.state_dict()}


class Trainer:
    """A run: its network, optimisers and data, and where it stands.

    Args:
        args: the flags.
        processes: that share the work.
        folder: of the run.
        checkpoint: to start or go on from.

    Raises:
        UsageError: the flags, the data and the checkpoint do not go together.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        processes: Processes,
        folder: Path,
        checkpoint: dict | None,
    ):
        self.args = args
        self.processes = processes
        self.folder = folder
        self.device = processes.device
        self.step = 0
        self.best_loss = math.inf
        self.history: list[dict[str, float]] = []  # of validations
        self.bad_steps = 0  # in a row
        self.stop_requested = False  # of this process, by a signal
        self.stopped = False  # all processes know and agree
        self.known_problems: set[str] = set()
        self.captured = False
        self.backward, self.update = self._backward, self._update  # or CUDA graphs of them

        train_pictures, test_pictures = self._open_data()
        self.global_batch = args.batch_size * args.accumulate * processes.world_size
        self.epoch_steps = len(train_pictures) / self.global_batch
        self.total_steps = args.max_steps or math.ceil(args.epochs * self.epoch_steps)
        self.val_every = args.val_every or math.ceil(self.epoch_steps)
        self.save_every = args.save_every or math.ceil(self.epoch_steps)

        utils.seed_everything(args.seed)
        self.model_name, model = build_model(args, checkpoint)
        self.model = model.to(self.device).train()
        self.criterion = RateDistortionLoss(args.lmbda, metric=args.type)
        self.net_optimizers, self.aux_optimizer = make_optimizers(
            model, args.optimizer, args.learning_rate, args.aux_learning_rate
        )
        self.optimizers = (*self.net_optimizers.values(), self.aux_optimizer)
        self.net_parameters = [
            p
            for optimizer in self.net_optimizers.values()
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        self.schedulers = [
            LambdaLR(optimizer, self._lr_factor) for optimizer in self.net_optimizers.values()
        ]
        self.ema = ModelEmaV3(model, args.ema, use_warmup=True) if args.ema is not None else None
        if checkpoint is not None and args.continue_train:
            if "optimizers" in checkpoint:
                self._restore(checkpoint)
            else:
                logger.info("%s holds weights only: starting at step 0", args.checkpoint)

        if args.grad_checkpoint:
            recompute_blocks(model, processes)
        if args.compile:
            for name in TRANSFORMS:
                getattr(model, name).compile(dynamic=False)  # crops are all of one size
        if args.cuda_graph:  # gradients are averaged after each replay, which runs no hooks
            self.net = model
            # As DistributedDataParallel does. It also keeps the first process from giving an
            # earlier run's checkpoint a new name before all have read it.
            processes.share([p.detach() for p in model.parameters()])
        else:
            self.net = processes.wrap(model)
        self.crops = Crops(train_pictures, tuple(args.patch_size), args.seed)
        self.test_pictures = TestPictures(
            test_pictures,
            args.test_batch_size,
            args.num_workers,
            rank=processes.rank,
            world_size=processes.world_size,
            min_side=utils.MS_SSIM_MIN_SIDE if args.type == "ms-ssim" else 1,
        )
        self.events = Events(folder if processes.is_first else None, self.step)

    def _open_data(self) -> tuple[Pictures, Pictures]:
        args, processes = self.args, self.processes
        cpus = max(available_cpus() // processes.local_world_size, 1)
        if args.num_workers > cpus:
            logger.info("%d workers in place of %d: CPUs per process", cpus, args.num_workers)
            args.num_workers = cpus
        train, test = (
            Pictures(utils.list_images(args.dataset / part), cpus if args.cache else 0)
            for part in ("train", "test")
        )
        self._report_problems([*train.problems, *test.problems])
        if len(train) < processes.world_size:
            raise UsageError(
                f"{len(train)} training pictures leave some of {processes.world_size} processes "
                f"empty; add pictures or use --nproc_per_node={len(train)}"
            )
        logger.info("%d training and %d test pictures", len(train), len(test))
        return train, test

    def _lr_factor(self, step: int) -> float:
        return lr_factor(
            step,
            self.args.schedule,
            self.total_steps,
            [epoch * self.epoch_steps for epoch in self.args.lr_epoch],
            self.args.warmup_steps,
        )

    def _report_problems(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem not in self.known_problems:
                self.known_problems.add(problem)
                logger.warning("skipped: %s", problem)

    def _checkpoint(self) -> dict:
        """Everything that a killed run needs to go on as if nothing had happened.

        Its values are those that `torch.load` reads with ``weights_only=True``.
        """
        used = self.ema.module if self.ema else self.model
        args = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        rng = {"cpu": torch.get_rng_state()}
        if self.args.cuda:
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model_name,
            "model_args": self.model.config,
            "state_dict": state_dict_with_tables(used),
            "net": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizers": {k: v.state_dict() for k, v in self.net_optimizers.items()},
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "step": self.step,
            "epoch": self.step / self.epoch_steps,
            "global_batch": self.global_batch,
            "best_loss": self.best_loss,
            "history": self.history,
            "rng": rng,
            "args": args,
            "versions": {
                "python": sys.version.split()[0],
                "torch": str(torch.__version__),
                "compressai": importlib.metadata.version("compressai"),
            },
        }

    def _restore(self, checkpoint: dict) -> None:
        """Go on where the run that wrote the checkpoint stood."""
        args = self.args
        for key, now in (("optimizer", args.optimizer), ("global_batch", self.global_batch)):
            before = checkpoint.get(key) or checkpoint["args"][key]
            if now != before:
                raise UsageError(
                    f"the run cannot go on with another {key}: it was {before} and is now {now} "
                    "(global_batch: processes x --batch-size x --accumulate); leave out "
                    "--continue_train to start a new run from its weights"
                )
        self.model.load_state_dict(checkpoint["net"])
        if self.ema and checkpoint["ema"]:
            self.ema.module.load_state_dict(checkpoint["ema"])
        saved = [checkpoint["optimizers"][key] for key in self.net_optimizers]
        saved.append(checkpoint["aux_optimizer"])
        for optimizer, state in zip(self.optimizers, saved, strict=True):
            for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
                # Which device it ran on: a run may go on with another.
                group |= {key: own[key] for key in ("fused", "foreach") if key in own}
            optimizer.load_state_dict(state)
        self.step = checkpoint["step"]
        # Rates follow the flags of this command, which are those of before unless changed.
        for scheduler, state in zip(self.schedulers, checkpoint["schedulers"], strict=True):
            scheduler.load_state_dict({**state, "base_lrs": scheduler.base_lrs})
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = lr * self._lr_factor(self.step)
        for group in self.aux_optimizer.param_groups:
            group["lr"] = args.aux_learning_rate
        # Losses of another definition are not to be compared with.
        if all(checkpoint["args"][key] == getattr(args, key) for key in ("lmbda", "type")):
            self.best_loss = checkpoint["best_loss"]
            self.history = checkpoint["history"]
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if args.cuda and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.device)
        logger.info("going on at step %d", self.step)

    def _save(self, loss: float, must: bool) -> None:
        """Write the latest checkpoint, and the best one if this validation loss is the lowest.

        A disk that is full is worth a line as long as the run goes on and can try again. Earlier
        checkpoints are left as they were.

        Raises:
            DataError: nothing could be written and it ``must``.
        """
        before = self.best_loss
        if loss < before:  # never of a NaN
            self.best_loss = loss
        if not (self.args.save and self.processes.is_first):
            return
        # The best first: killed in between, the run repeats the steps that found it.
        names = ("best", "latest") if loss < before else ("latest",)
        state = self._checkpoint()
        try:
            for name in names:
                path = checkpoint_path(self.folder, name)
                with utils.atomic_write(path) as temporary, open(temporary, "wb") as file:
                    torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            if name == "best":
                self.best_loss = before
            reason = str(error).partition("\n")[0]
            message = (
                f"cannot write {path} at step {self.step} (is the disk full?): {reason}; "
                "the last one is kept"
            )
            if must:
                raise DataError(message) from None
            logger.error("%s; trying again at the next save", message)

    def _to_device(self, pixels: Tensor) -> Tensor:
        """uint8 (batch, height, width, 3) as float32 (batch, 3, height, width) in [0, 1]."""
        # The permutation is what PyTorch calls channels last.
        pixels = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return pixels.float().div_(255)

    def _backward(self, x: Tensor, last: bool) -> Tensor:
        """Add a batch's gradients; return its loss, bpp and MSE: float32 (3,)."""
        wait = nullcontext if last or self.processes.world_size == 1 else self.net.no_sync
        amp = torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.args.amp))
        with wait():
            with amp, self.processes.global_draws():
                output = self.net(x)
            output["x_hat"] = output["x_hat"].float()
            terms = self.criterion(output, x)
            loss = terms["loss"] / self.args.accumulate
            if last:
                # It reaches the quantiles only and the loss reaches everything else: after one
                # backward pass both are averaged together.
                loss = loss + self.model.aux_loss()
            loss.backward()
        mse = terms["mse_loss"] if "mse_loss" in terms else F.mse_loss(output["x_hat"], x)
        return torch.stack([terms["loss"], terms["bpp_loss"], mse]).detach()

    def _gradients(self, x: Tensor, last: bool) -> Tensor:
        """`_backward`, and the norm that the gradients have before they are clipped: (4,).

        They are whole, and clipped, after the ``last`` batch of a step; before it the norm is 0.
        """
        measured = self.backward(x, last)
        norm = measured.new_zeros(())
        if last:
            if self.captured:
                grads = [p.grad for p in self.model.parameters() if p.grad is not None]
                self.processes.average(grads)
            limit = self.args.clip_max_norm or math.inf
            norm = nn.utils.clip_grad_norm_(self.net_parameters, limit)
        return torch.cat([measured / self.args.accumulate, norm[None]])

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def _capture(self, x: Tensor) -> None:
        """Have backward passes and updates replayed from CUDA graphs from now on."""
        whole_step = functools.partial(self._backward, last=True)  # nothing is accumulated
        backward = GraphedGradients(whole_step, list(self.model.parameters()), x)
        self.backward = lambda x, last: backward(x)
        self.update = GraphedUpdate(self.optimizers)
        self.captured = True

    def _train_step(self) -> dict[str, float]:
        """One optimiser step on the next global batch; what it measured, over all processes.

        Raises:
            DataError: too many steps in a row were not finite.
        """
        args, world_size = self.args, self.processes.world_size
        start = time.perf_counter()
        waited = 0.0
        names: list[str] = []
        measured = torch.zeros(4, device=self.device)
        for i in range(args.accumulate):
            asked = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - asked
            names += batch.names
            self._report_problems(batch.problems)
            x = self._to_device(batch.pixels)
            if args.cuda_graph and not self.captured:
                self._capture(x)
            measured += self._gradients(x, last=i == args.accumulate - 1)

        stop = measured.new_tensor([self.stop_requested])
        # The only point at which the host waits for the device. A value that is not finite on
        # one process is so in the sum, and all decide alike.
        sums = self.processes.sum(torch.cat([measured, stop]))
        loss, bpp, mse, norm = (value / world_size for value in sums[:4])
        self.stopped = sums[4] > 0
        if math.isfinite(loss) and math.isfinite(norm):
            self.update()
            self.bad_steps = 0
        else:
            self._skip(names if not measured[0].isfinite() or math.isfinite(loss) else [])
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()
        self.step += 1
        if self.ema and not self.bad_steps:
            self.ema.update(self.model, self.step)
        seconds = time.perf_counter() - start
        values = {
            "loss": loss,
            "bpp": bpp,
            "psnr": -10 * math.log10(mse) if mse else math.inf,
            "grad_norm": norm,
        }
        speed = {"step_seconds": seconds, "data_wait": waited / seconds}
        return speed if self.bad_steps else {**values, **speed}

    def _skip(self, names: list[str]) -> None:
        self.bad_steps += 1
        names = self.processes.gather(names)
        logger.warning(
            "step %d is not finite and is skipped (%d in a row): %s",
            self.step,
            self.bad_steps,
            ", ".join(names),
        )
        if self.bad_steps == MAX_BAD_STEPS:
            raise DataError(
                f"{MAX_BAD_STEPS} steps in a row were not finite, the last at step {self.step}; "
                "go on from the last checkpoint with a lower learning rate, and look at the "
                "pictures that the log names"
            )

    @torch.no_grad()
    def _validate(self) -> float:
        """Measure the test pictures in float32; return their loss, infinite if SIGTERM came."""
        model = (self.ema.module if self.ema else self.model).eval()
        keys = ("loss", "bpp", "psnr", "ms-ssim", "pictures", "ms-ssim pictures", "stopped")
        sums = dict.fromkeys(keys, 0.0)
        shown: list[tuple[Tensor, Tensor]] = []
        # Nothing is worth tuning or compiling for sizes that vary from picture to picture.
        eager = torch.compiler.set_stance("force_eager") if self.args.compile else nullcontext()
        with eager, torch.backends.cudnn.flags(benchmark=False):
            for pixels in self.test_pictures:
                if self.stop_requested:
                    break
                x = self._to_device(pixels)
                output = model(x)
                terms = self.criterion(output, x)
                sums["loss"] += terms["loss"].item() * len(x)
                sums["bpp"] += terms["bpp_loss"].item() * len(x)
                for original, x_hat in zip(x, output["x_hat"], strict=True):
                    sums["pictures"] += 1
                    sums["psnr"] += utils.psnr(x_hat, original)
                    ms_ssim = utils.ms_ssim(x_hat[None], original[None])
                    if ms_ssim is not None:
                        sums["ms-ssim"] += ms_ssim
                        sums["ms-ssim pictures"] += 1
                    if len(shown) < SHOWN_PICTURES:
                        shown.append((center(original), center(x_hat)))
        self.model.train()
        self._report_problems(self.test_pictures.problems)
        sums["stopped"] = float(self.stop_requested)
        values = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
        totals = self.processes.sum(values)
        sums = dict(zip(keys, totals, strict=True))
        self.stopped = sums["stopped"] > 0
        if self.stopped or not sums["pictures"]:
            return math.inf
        means = {key: sums[key] / sums["pictures"] for key in ("loss", "bpp", "psnr")}
        if sums["ms-ssim pictures"]:
            means["ms-ssim"] = sums["ms-ssim"] / sums["ms-ssim pictures"]
        self.history.append({"step": self.step, **means})
        self.events.scalars("validation", means, self.step)
        self.events.pictures(shown, self.step)
        self.events.rate_distortion(self.history, self.step)
        logger.info(
            "validation at step %d: %s%s",
            self.step,
            " ".join(f"{key} {value:.4f}" for key, value in means.items()),
            " (best)" if means["loss"] < self.best_loss else "",
        )
        return means["loss"]

    def _report(self, means: dict[str, float]) -> None:
        """Log what the steps since the last report measured."""
        images = self.global_batch / means["step_seconds"]
        means |= {"images_per_second": images, "lr": self.schedulers[0].get_last_lr()[0]}
        memory = ""
        if self.args.cuda:
            means["gpu_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            memory = f" memory {means['gpu_gib']:.1f} GiB"
        self.events.scalars("train", means, self.step)
        quality = " ".join(f"{k} {means[k]:.4f}" for k in ("loss", "bpp", "psnr") if k in means)
        logger.info(
            "step %d/%d epoch %.2f %s lr %.2e %.3f s/step %.1f images/s data wait %.0f%%%s",
            self.step,
            self.total_steps,
            self.step / self.epoch_steps,
            quality,
            means["lr"],
            means["step_seconds"],
            images,
            100 * means["data_wait"],
            memory,
        )

    def request_stop(self) -> None:
        """Ask for the run to be saved and ended after the current step."""
        self.stop_requested = True

    def run(self) -> None:
        """Train to the end, or until `request_stop`; either way the last state is saved."""
        logger.info(
            "%s, %.2f M parameters, steps %d to %d of %d crops: "
            "%d process(es) x batch %d x %d, on %s",
            self.model_name,
            sum(p.numel() for p in self.model.parameters()) / 1e6,
            self.step,
            self.total_steps,
            self.global_batch,
            self.processes.world_size,
            self.args.batch_size,
            self.args.accumulate,
            torch.cuda.get_device_name(self.device) if self.args.cuda else "the CPU",
        )
        self.batches = training_batches(
            self.crops,
            CropSampler(
                len(self.crops.pictures),
                self.args.batch_size,
                self.args.seed,
                start=self.step * self.args.accumulate,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
            ),
            self.args.num_workers,
            pin_memory=self.args.cuda,
        )
        try:
            self._loop()
        finally:
            end_workers(self.batches)
            self.events.close()
        logger.info("%s at step %d", "stopped by SIGTERM" if self.stopped else "done", self.step)

    def _loop(self) -> None:
        meter = Meter()
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=None if self.processes.is_first else True,
        )
        with bar, logging_redirect_tqdm([logger]):
            judged = self.history[-1]["step"] if self.history else 0
            if judged < self.step and self._validation_is_due():
                self._end_step()  # which a signal kept it from
            while self.step < self.total_steps and not self.stopped:
                measured = self._train_step()
                meter.add(measured)
                bar.update()
                bar.set_postfix({k: measured[k] for k in ("loss", "bpp", "psnr") if k in measured})
                ends = self.step == self.total_steps
                if ends or self.stopped or self.step % self.args.log_every == 0:
                    self._report(meter.pop())
                self._end_step()

    def _validation_is_due(self) -> bool:
        return self.step == self.total_steps or self.step % self.val_every == 0

    def _end_step(self) -> None:
        """Validate and save where that is due."""
        loss = math.inf
        if not self.stopped and self._validation_is_due():
            loss = self._validate()
        must = self.stopped or self.step == self.total_steps
        if must or loss < self.best_loss or self.step % self.save_every == 0:
            self._save(loss, must)


def center(x: Tensor, side: int = 256) -> Tensor:
    """The middle of a picture (3, height, width), at most this large."""
    top, left = (max(size - side, 0) // 2 for size in x.shape[-2:])
    return x[:, top : top + side, left : left + side]


def checkpoint_path(folder: Path, name: str) -> Path:
    return folder / f"checkpoint_{name}.pth.tar"
