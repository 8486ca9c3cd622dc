"""What a run reports: TensorBoard events, and means of what its steps measured."""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("mambavc")


class Meter:
    """Means of the quantities that steps measure, since they were last asked for."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._values[key].append(value)

    def pop(self) -> dict[str, float]:
        """The means, of each quantity over the steps that measured it; starts over."""
        means = {key: sum(values) / len(values) for key, values in self._values.items()}
        self._values.clear()
        return means


class Events:
    """TensorBoard events of a run. A disk that is full ends them with one line, not the run.

    Args:
        folder: where they go; None writes nothing.
        step: first step of this process; events of a killed run beyond it are hidden.
    """

    def __init__(self, folder: Path | None, step: int):
        self._writer: SummaryWriter | None = None
        with self._guard():
            if folder is not None:
                self._writer = SummaryWriter(str(folder), purge_step=step or None)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("no more TensorBoard events in this run: %s", error)
            self._writer = None

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        with self._guard():
            for key, value in values.items():
                if self._writer is not None:
                    self._writer.add_scalar(f"{group}/{key}", value, step)

    def pictures(self, pictures: Sequence[tuple[Tensor, Tensor]], step: int) -> None:
        """Write pairs (x, x_hat) of (3, height, width) in [0, 1]; x only once, at the start."""
        with self._guard():
            for i, (x, x_hat) in enumerate(pictures):
                if self._writer is not None:
                    self._writer.add_image(f"original/{i}", x, 0)
                    self._writer.add_image(f"reconstruction/{i}", x_hat.clamp(0, 1), step)

    def rate_distortion(self, history: Sequence[Mapping[str, float]], step: int) -> None:
        """Draw bpp against PSNR of every validation so far."""
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.add_subplot(
            xlabel="bits per pixel (estimated)", ylabel="PSNR (dB)", title="validation"
        )
        points = axes.scatter(
            [entry["bpp"] for entry in history],
            [entry["psnr"] for entry in history],
            c=[entry["step"] for entry in history],
        )
        figure.colorbar(points, label="step")
        with self._guard():
            if self._writer is not None:
                self._writer.add_figure("rate-distortion", figure, step)
                self._writer.flush()

    def close(self) -> None:
        with self._guard():
            if self._writer is not None:
                self._writer.close()
