"""What a training run is: its network and where it stands, saved, restored, and its folder."""

import contextlib
import copy
import fcntl
import importlib.metadata
import logging
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import Optimizer

import models
import utils
from models.checkpoint import build_from_checkpoint, load_checkpoint
from training.distributed import Processes
from utils import DataError, UsageError

logger = logging.getLogger("mambavc")

# What a run keeps: its lowest validation loss, where it stands, and where its cool-down began.
CHECKPOINTS = ("best", "latest", "stable")
TRANSFORMS = ("g_a", "g_s", "h_a", "h_mean_s", "h_scale_s")


def checkpoint_path(folder: Path, name: str) -> Path:
    """Where a run keeps one of its `CHECKPOINTS`."""
    return folder / f"checkpoint_{name}.pth.tar"


@contextlib.contextmanager
def own_folder(folder: Path, processes: Processes) -> Iterator[None]:
    """Make a run's folder, keep other runs out of it, and send the log of the first process there.

    The system takes the lock back when this process ends, in whatever way, and workers forked
    from it do not hold it: a run that was killed can go on at once.

    Raises:
        UsageError: another run is training there, or the folder cannot be written to. All of a
            run's processes raise it, so that none is left waiting for the first.
    """
    utils.make_folder(folder)
    problems = []
    with open(folder / ".lock", "a") as file:
        try:
            if processes.is_first:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            problems.append(f"another run is training in {folder}")
        except OSError as error:
            logger.warning("cannot lock %s (%s); start no second run there", folder, error.strerror)
        for problem in processes.gather(problems):
            raise UsageError(f"{problem}; wait for its end or give another --save_path")
        if processes.is_first:
            for name in CHECKPOINTS:  # what a killed run left half written
                for leftover in folder.glob(f".{checkpoint_path(folder, name).name}.*"):
                    leftover.unlink()
            utils.setup_logging(folder / "train.log")
        else:
            utils.setup_logging()
            logger.setLevel(logging.WARNING)
        yield


@contextlib.contextmanager
def stop_event(minutes: float | None, since: float) -> Iterator[threading.Event]:
    """An event that SIGTERM sets inside this context, where it ends nothing by itself.

    Args:
        minutes: after which the event is set anyway; None: never.
        since: when they began, by `time.monotonic`.
    """
    event = threading.Event()

    def time_is_over() -> None:
        logger.info("--max-minutes %g are over", minutes)
        event.set()

    left = 0 if minutes is None else 60 * minutes - (time.monotonic() - since)
    timer = threading.Timer(max(left, 0), time_is_over)
    timer.daemon = True
    handler = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        if minutes is not None:
            timer.start()
        yield event
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, handler)


def find_checkpoint(folder: Path, checkpoint: Path | None, continue_train: bool) -> Path | None:
    """The file that --checkpoint and --continue_train ask to start or to go on from.

    A command that is given again after its run was killed goes on with that run, also where
    --checkpoint says how it began; a checkpoint of the run itself is taken as asked.
    """
    if not continue_train:
        return checkpoint
    latest = checkpoint_path(folder, "latest")
    if not latest.exists():  # killed just after it went back to before its cool-down
        latest = checkpoint_path(folder, "stable")
    if latest.exists():
        if checkpoint is None:
            return latest
        if checkpoint.resolve().parent != folder.resolve():
            logger.info("going on from %s, not from %s", latest, checkpoint)
            return latest
    elif checkpoint is None:
        logger.info("nothing to go on from in %s: starting at step 0", folder)
    return checkpoint


def check_not_behind(checkpoint: dict, source: Path, given: Path) -> None:
    """Check that a run does not go back behind what --checkpoint gives it to go on from.

    Args:
        checkpoint: of the run, read from the file ``source``.
        given: as --checkpoint has it. It may be gone, and the run may have started from its weights
            and count steps of its own: then there is nothing to compare.

    Raises:
        UsageError: the file is of a later step.
    """
    started_from = checkpoint.get("args", {}).get("checkpoint")
    if started_from == str(given) and not checkpoint.get("fresh_from"):
        return
    try:
        step = load_checkpoint(given).get("step", 0)
    except UsageError:
        return
    reached = checkpoint.get("step", 0)
    if step > reached:
        raise UsageError(
            f"{given} is of step {step}, later than step {reached} of the run in {source.parent}; "
            "give another --save_path, or leave out --checkpoint"
        )


def before_cooldown(checkpoint: dict, source: Path, cooldown_start: float) -> tuple[dict, Path]:
    """The checkpoint to go on from where the cool-down begins at another step than it did.

    Args:
        checkpoint: read from the file ``source``.
        cooldown_start: step at which the cool-down begins now.

    Returns:
        The state that was kept when the cool-down of this checkpoint began, if the one to come
        begins later; else the checkpoint itself, which begins it anew if its cool-down began
        where only weights came from. The file is the second value.

    Raises:
        UsageError: that state is gone.
    """
    began = checkpoint.get("cooldown_from")
    if began is None or cooldown_start <= began:
        return checkpoint, source
    if "optimizers" not in checkpoint or began < checkpoint.get("fresh_from", 0):
        return {**checkpoint, "cooldown_from": None}, source
    stable = checkpoint_path(source.parent, "stable")
    kept = load_checkpoint(stable)
    if kept.get("step") != began:
        raise UsageError(
            f"the cool-down of {source} began at step {began}, and {stable} is of step "
            f"{kept.get('step')}, of another run; give the *checkpoint_stable of step {began} as "
            "--checkpoint"
        )
    logger.info("going back to before the cool-down that began at step %d", began)
    return kept, stable


def build_model(
    wanted: dict[str, str | int | None],
    checkpoint: dict | None,
    source: Path | None,
    device: torch.device,
) -> tuple[str, models.SliceHyperprior]:
    """The network of a checkpoint, or the one that the flags name, with fresh weights.

    Args:
        wanted: the flags ``model``, ``N``, ``M``, ``qualities`` and ``drop_path_rate``; None leaves
            a choice open.
        checkpoint: read from the file ``source``.

    Returns:
        Its registered name, and the network in training mode on the device. Where qualities are
        wanted of a single-rate network, one with new gains starts from its weights.

    Raises:
        UsageError: the flags make no network, or another one than the checkpoint's.
    """
    wanted = {key: value for key, value in wanted.items() if value is not None}
    if checkpoint is None:
        name = wanted.pop("model", "mambavc")
        try:
            return name, models.build_model(name, **wanted).to(device).train()
        except ValueError as error:
            raise UsageError(str(error)) from None
    model = build_from_checkpoint(checkpoint, source)
    found = {**model.config, "model": checkpoint.get("model", "mambavc")}
    if model.qualities and "qualities" not in wanted:
        raise UsageError(
            f"{source} holds a network of all rates; add --qualities {model.qualities}"
        )
    free = ["drop_path_rate"] if model.qualities else ["drop_path_rate", "qualities"]
    changes = {key: wanted.pop(key) for key in free if key in wanted}
    if changes:
        changed = models.build_model(found["model"], **{**model.config, **changes})
        load = changed.load_single_rate if "qualities" in changes else changed.load_state_dict
        load(model.state_dict())
        model = changed
    for key, value in wanted.items():
        if value != found[key]:
            # A network of every rate is trained as one only where it is asked for.
            advice = f"give {found[key]}" if key == "qualities" else f"leave out --{key}"
            raise UsageError(
                f"--{key} {value} does not fit the checkpoint, whose {key} is {found[key]}; "
                f"{advice}"
            )
    return found["model"], model.to(device).train()


def prepare_transforms(
    model: nn.Module, processes: Processes, recompute: bool, compiled: bool
) -> None:
    """Change how the transforms are computed in training; the state dict keeps its keys.

    Args:
        recompute: run the blocks between the convolutions again in the backward pass.
        compiled: by torch.compile.
    """
    options = {}
    if processes.world_size > 1:  # what is drawn again is to be what was drawn at first
        options["context_fn"] = lambda: (nullcontext(), processes.global_draws())
    for name in TRANSFORMS:
        transform = getattr(model, name)
        for i, block in enumerate(transform):
            if recompute and not isinstance(block, nn.Conv2d | nn.ConvTranspose2d):
                transform[i] = checkpoint_wrapper(block, **options)
        if compiled:
            transform.compile(dynamic=False)  # crops are all of one size


def state_dict_with_tables(model: nn.Module) -> dict[str, Tensor]:
    """State dict with CDF tables, built on copies so that training is not disturbed."""
    from layers.compressai import CompressionModel

    coder = CompressionModel()
    coder.entropy_bottleneck = copy.deepcopy(model.entropy_bottleneck)
    coder.gaussian_conditional = copy.deepcopy(model.gaussian_conditional)
    coder.update(force=True, update_quantiles=True)
    return {**model.state_dict(), **coder.state_dict()}


@dataclass
class Run:
    """A run: what its checkpoints hold, and where they go.

    Args:
        model_name: registered name of the network.
        model: the network, on the device it is trained on.
        net_optimizers, aux_optimizer: see `optim.make_optimizers`.
        flags: of the command, as plain values.
        global_batch: crops of a step, over all processes.
        epoch_steps: steps in which each training picture is seen once.
        ema_decay: keep a running mean of the weights with this decay; None keeps none.
        folder: for checkpoints; None writes none.

    Attributes:
        step: steps taken.
        best_loss: lowest validation loss.
        history: step and measurements of each validation whose loss compares with this run's.
        fresh_from: step at which the optimisers had no state: 0, or later where a run goes on from
            weights alone.
        cooldown_from: step at which the cool-down began; None before.
    """

    model_name: str
    model: models.SliceHyperprior
    net_optimizers: dict[str, Optimizer]
    aux_optimizer: Optimizer
    flags: dict
    global_batch: int
    epoch_steps: float
    ema_decay: float | None
    folder: Path | None
    step: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    fresh_from: int = 0
    cooldown_from: int | None = None

    def __post_init__(self) -> None:
        self.ema = None
        if self.ema_decay is not None:
            from timm.utils import ModelEmaV3  # takes seconds to import

            self.ema = ModelEmaV3(self.model, self.ema_decay, use_warmup=True)
            self._averaged = list(self.ema.module.parameters()), list(self.model.parameters())
        self._superseded: set[Path] = set()

    @property
    def used_model(self) -> models.SliceHyperprior:
        """The network that is validated and saved for use."""
        return self.ema.module if self.ema else self.model

    def update_ema(self) -> None:
        """Take the weights after the step that is being taken into their running mean.

        As `ModelEmaV3.update` does, which looks for all weights and buffers anew each time: that
        would take the host as long as several steps' launches.
        """
        means, weights = self._averaged
        with torch.no_grad():
            torch._foreach_lerp_(means, weights, weight=1 - self.ema.get_decay(self.step + 1))

    def restore(self, checkpoint: dict, source: Path) -> None:
        """Go on where the run stood that wrote the file ``source``; learning rates are this run's.

        Raises:
            UsageError: a run cannot go on with this one's flags, or the file is damaged.
        """
        if "optimizers" not in checkpoint:
            self._go_on_from_weights(checkpoint, source)
            return
        try:
            self._restore(checkpoint, source)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"the run cannot go on from {source}, whose state does not fit or is damaged "
                f"({type(error).__name__}: {reason}); give a checkpoint that "
                "train.py saved, or leave out --continue_train to start anew from its weights"
            ) from None
        logger.info("going on at step %d", self.step)

    def _go_on_from_weights(self, checkpoint: dict, source: Path) -> None:
        self.step = self.fresh_from = checkpoint.get("step", 0)
        self.cooldown_from = checkpoint.get("cooldown_from")
        if not self.step:
            logger.info("%s holds weights only: starting at step 0", source)
            return
        torch.manual_seed(self.flags["seed"] + self.step)  # not the draws of step 0 once more
        logger.info(
            "%s holds weights only: going on at step %d, with optimisers that start anew and take "
            "some hundred steps to find their momentum",
            source,
            self.step,
        )

    def _restore(self, checkpoint: dict, source: Path) -> None:
        unknown = {"qualities": None, "fixed_A": False}  # of runs before there were these flags
        before = {**unknown, **checkpoint["args"], "global_batch": checkpoint["global_batch"]}
        now = {**self.flags, "global_batch": self.global_batch}
        for key in ("optimizer", "fixed_A", "global_batch", "qualities"):
            if now[key] != before[key]:
                product = " (processes x --batch-size x --accumulate)"
                raise UsageError(
                    f"the run cannot go on with another {key}: it was {before[key]} and is now "
                    f"{now[key]}{product if key == 'global_batch' else ''}; leave out "
                    "--continue_train to start a new run from its weights"
                )
        self.model.load_state_dict(checkpoint["net"])
        if self.ema:  # it starts from the weights of a run that kept none
            self.ema.module.load_state_dict(checkpoint["ema"] or checkpoint["net"])
        saved = {**checkpoint["optimizers"], "aux": checkpoint["aux_optimizer"]}
        for name, optimizer in {**self.net_optimizers, "aux": self.aux_optimizer}.items():
            for group, own in zip(saved[name]["param_groups"], optimizer.param_groups, strict=True):
                # How a device steps is its own matter: a run may go on with another one.
                group |= {key: own[key] for key in ("lr", "fused", "foreach") if key in own}
            optimizer.load_state_dict(saved[name])
        self.step = checkpoint["step"]
        self.fresh_from = checkpoint.get("fresh_from", 0)
        self.cooldown_from = checkpoint.get("cooldown_from")
        best, latest, stable = (checkpoint_path(source.parent, name) for name in CHECKPOINTS)
        if source in (latest, stable):
            self._superseded = {source, stable}
        # Losses of another definition are not to be compared with.
        if all(now[key] == before[key] for key in ("lmbda", "type")):
            self.history = checkpoint["history"]
            if source != stable:  # the best one is of the cool-down, which this run does not follow
                self.best_loss = checkpoint["best_loss"]
                self._superseded.add(best)
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if torch.cuda.is_initialized() and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])

    def keep_earlier_checkpoints(self) -> None:
        """Give checkpoints a new name that this run would overwrite but does not follow from."""
        if self.folder is None:
            return
        superseded = {path.resolve() for path in self._superseded}
        for name in CHECKPOINTS:
            path = checkpoint_path(self.folder, name)
            if path.exists() and path.resolve() not in superseded:
                # Microseconds, so that no two checkpoints ever get one name.
                date = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S-%f")
                kept = path.replace(self.folder / f"{date}-{path.name}")
                logger.info("%s of an earlier run is kept as %s", path.name, kept.name)

    def save(self, loss: float, must: bool) -> None:
        """Write the latest checkpoint, and the best one if this validation loss is the lowest.

        A disk that is full is worth a line as long as the run goes on and can try again. Earlier
        checkpoints are left as they were.

        Args:
            loss: of the validation at this step, infinite without one.
            must: the run ends here.

        Raises:
            DataError: nothing could be written and it ``must``.
        """
        before, self.best_loss = self.best_loss, min(self.best_loss, loss)
        # The best first: killed in between, the run repeats the steps that found it.
        names = ("best", "latest") if self.best_loss < before else ("latest",)
        for name, error in self._write(names).items():
            if name == "best":
                self.best_loss = before
            if must:
                raise DataError(error)
            logger.error("%s; trying again at the next save", error)

    def start_cooldown(self) -> None:
        """Note that the learning rate falls from here on, and keep the state to go back to.

        Raises:
            DataError: it could not be written.
        """
        for error in self._write(("stable",)).values():
            raise DataError(f"{error}; make room, then --continue_train")
        self.cooldown_from = self.step

    def _write(self, names: Sequence[str]) -> dict[str, str]:
        """Write checkpoints of one state; on a failure, which ends it, the name and one line."""
        if self.folder is None:
            return {}
        state = self._checkpoint()
        for name in names:
            path = checkpoint_path(self.folder, name)
            try:
                with utils.atomic_write(path) as temporary, open(temporary, "wb") as file:
                    torch.save(state, file)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
                reason = str(error).partition("\n")[0]
                return {
                    name: f"cannot write {path} at step {self.step} (is the disk full?): {reason}; "
                    "the last one is kept"
                }
        return {}

    def _checkpoint(self) -> dict:
        """Everything that a killed run needs to go on as if nothing had happened.

        Its values are those that `torch.load` reads with ``weights_only=True``.
        """
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            rng["cuda"] = torch.cuda.get_rng_state()
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        return {
            "model": self.model_name,
            "model_args": self.model.config,
            "state_dict": state_dict_with_tables(self.used_model),
            "net": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizers": {k: v.state_dict() for k, v in self.net_optimizers.items()},
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "step": self.step,
            "epoch": self.step / self.epoch_steps,
            "global_batch": self.global_batch,
            "best_loss": self.best_loss,
            "history": self.history,
            "fresh_from": self.fresh_from,
            "cooldown_from": self.cooldown_from,
            "rng": rng,
            "args": self.flags,
            "versions": {**versions, "compressai": importlib.metadata.version("compressai")},
        }
