"""What a run reports: log lines, a progress bar, TensorBoard events."""

import contextlib
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from training.distributed import Processes
from training.state import Run

logger = logging.getLogger("mambavc")

SHOWN_SIDE = 256  # pixels of a test picture's middle among the events


class Measured(NamedTuple):
    """What a step measured: means over all its crops, on all processes."""

    loss: float
    bpp: float
    mse: float  # of values in [0, 1]
    grad_norm: float  # before clipping
    is_finite: bool  # else the step was skipped
    suspect: bool  # it was skipped, and crops of this process may be why
    stop: bool  # a process wants to stop


class RunLog:
    """Log lines, a progress bar and TensorBoard events of a run, inside this context.

    A disk that is full ends the events with one line, not the run.

    Args:
        folder: where events go; those of a killed run beyond the step of ``run`` are hidden.
        run: at its start.
        total_steps: length of the run.
        every: steps between two lines.
        processes: of which the first speaks.
    """

    def __init__(self, folder: Path, run: Run, total_steps: int, every: int, processes: Processes):
        self.run = run
        self.total_steps = total_steps
        self.every = every
        self.processes = processes
        self._values: dict[str, list[float]] = defaultdict(list)  # of steps since the last line
        self._known_problems: set[str] = set()
        self._has_originals = False
        self._writer = None
        with self._guard():
            if processes.is_first:
                from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

                self._writer = SummaryWriter(
                    str(folder), purge_step=run.step + 1 if run.step else None
                )
        quiet = None if processes.is_first else True  # None: unless it writes to a terminal
        self._bar = tqdm(total=total_steps, initial=run.step, unit="step", disable=quiet)
        self._redirection = logging_redirect_tqdm([logger])  # lines go above the bar

    def __enter__(self) -> "RunLog":
        self._redirection.__enter__()
        run, processes = self.run, self.processes
        judged = run.history[-1]["step"] if run.history else 0
        if run.step > self.total_steps or run.step == self.total_steps == judged:
            logger.info(
                f"nothing to do: the run has taken {run.step} of {self.total_steps} steps; give "
                "a larger --max-steps or --epochs to make it longer"
            )
            return self
        millions = sum(p.numel() for p in run.model.parameters()) / 1e6
        device = processes.device
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        logger.info(
            f"{run.model_name}, {millions:.2f} M parameters, steps {run.step} to "
            f"{self.total_steps} of {run.global_batch} crops: {processes.world_size} process(es) "
            f"x batch {run.flags['batch_size']} x {run.flags['accumulate']}, on {place}"
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._redirection.__exit__(*error)
        with self._guard():
            if self._writer is not None:
                self._writer.close()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeError) as error:  # it takes no folders but those named in UTF-8
            logger.error("no more TensorBoard events in this run: %s", error)
            self._writer = None

    def skipped(self, problems: Iterable[str]) -> None:
        """Name each unreadable file once."""
        for problem in problems:
            if problem not in self._known_problems:
                self._known_problems.add(problem)
                logger.warning("skipped: %s", problem)

    def not_finite(self, count: int, names: list[str]) -> None:
        """Name the files that may be why the step, ``count`` in a row, is skipped."""
        files = ", ".join(self.processes.gather(names))
        step = self.run.step
        logger.warning(f"step {step} is not finite and is skipped ({count} in a row): {files}")

    def step(self, measured: Measured, lr: float, seconds: float, waited: float) -> None:
        """Note a step at learning rate ``lr``; write a line where one is due.

        Args:
            seconds, waited: how long it took, and how much of that it waited for data.
        """
        values = {"step_seconds": seconds, "data_wait": waited / seconds}
        if measured.is_finite:
            psnr = -10 * math.log10(measured.mse) if measured.mse else math.inf
            quality = {"loss": measured.loss, "bpp": measured.bpp, "psnr": psnr}
            self._bar.set_postfix(quality, refresh=False)  # `update` draws it, when it is due
            values |= {**quality, "grad_norm": measured.grad_norm}
        for key, value in values.items():
            self._values[key].append(value)
        self._bar.update()
        step = self.run.step
        if measured.stop or step == self.total_steps or step % self.every == 0:
            means = {key: statistics.fmean(values) for key, values in self._values.items()}
            self._values.clear()
            self._line(means | {"lr": lr})

    def _line(self, means: dict[str, float]) -> None:
        run, device = self.run, self.processes.device
        means["images_per_second"] = run.global_batch / means["step_seconds"]
        memory = ""
        if device.type == "cuda":
            means["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            memory = f" memory {means['gpu_gib']:.1f} GiB"
        self._scalars("train", means)
        quality = " ".join(f"{k} {means[k]:.4f}" for k in ("loss", "bpp", "psnr") if k in means)
        logger.info(
            f"step {run.step}/{self.total_steps} epoch {run.step / run.epoch_steps:.2f} {quality} "
            f"lr {means['lr']:.2e} {means['step_seconds']:.3f} s/step "
            f"{means['images_per_second']:.1f} images/s data wait {means['data_wait']:.0%}{memory}"
        )

    def validation(
        self, means: Mapping[str, float], pictures: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Report a validation, and bpp and PSNR of all in the run's history.

        Args:
            means: see `Validation`.
            pictures: pairs (x, x_hat) of (3, height, width) in [0, 1], the same at each validation:
                x is written only once.
        """
        step = self.run.step
        best = " (best)" if means["loss"] < self.run.best_loss else ""
        lines = defaultdict(list)  # of all rates together, and of each
        for name, value in means.items():
            rate, _, key = name.rpartition("/")
            lines[rate.replace("_", " ")].append(f"{key} {value:.4f}")
        for rate, values in lines.items():
            where = f", {rate}" if rate else ""
            logger.info("validation at step %d%s: %s%s", step, where, " ".join(values), best)
            best = ""
        self._scalars("validation", means)
        with self._guard():
            if self._writer is not None:
                for i, (x, x_hat) in enumerate(pictures):
                    if not self._has_originals:
                        self._writer.add_image(f"original/{i}", _center(x), 0)
                    self._writer.add_image(f"reconstruction/{i}", _center(x_hat).clamp(0, 1), step)
                self._has_originals = True
                figure = _rate_distortion(self.run.history)
                self._writer.add_figure("rate-distortion", figure, step)
                self._writer.flush()

    def _scalars(self, group: str, values: Mapping[str, float]) -> None:
        with self._guard():
            if self._writer is not None:
                for key, value in values.items():
                    self._writer.add_scalar(f"{group}/{key}", value, self.run.step)


def _center(x: Tensor) -> Tensor:
    top, left = (max(size - SHOWN_SIDE, 0) // 2 for size in x.shape[-2:])
    return x[:, top : top + SHOWN_SIDE, left : left + SHOWN_SIDE]


def _rate_distortion(history: Sequence[Mapping[str, float]]):
    """Matplotlib figure of bpp against PSNR."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="bits per pixel (estimated)", ylabel="PSNR (dB)")
    bpp, psnr, step = ([entry[key] for entry in history] for key in ("bpp", "psnr", "step"))
    figure.colorbar(axes.scatter(bpp, psnr, c=step), label="step")
    return figure
