"""Test pictures through the network that is being trained: loss, rate and quality."""

import math
import statistics
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import models
import utils
from training.criterion import RateDistortionLoss, rate_weight, watched_qualities
from training.data import as_input
from training.distributed import Processes
from utils import DataError

SHOWN_PICTURES = 3  # reconstructions that are kept to be looked at


class Validation(NamedTuple):
    """What a validation found.

    ``means`` of loss, bpp, psnr and, of large pictures, ms-ssim; empty if unfinished. With a
    variable rate they are means over several rates, whose losses `rate_weight` weights, and each
    rate has its own as well, with its plain loss: ``lambda_0.013/loss`` and so on.
    """

    means: dict[str, float]
    pictures: list[tuple[Tensor, Tensor]]  # some x and x_hat, (3, height, width)
    stopped: bool  # by a signal to some process
    failures: list[str]  # such as too little memory for a picture


@torch.no_grad()
def validate(
    model: models.SliceHyperprior,
    batches: Iterable[Tensor],
    criterion: RateDistortionLoss,
    processes: Processes,
    stop: threading.Event,
) -> Validation:
    """Measure the test pictures, which the processes share, in float32."""
    rows: list[dict[str, float | None]] = []  # one for each picture and rate
    shown: list[tuple[Tensor, Tensor]] = []
    failures: list[str] = []
    rates = watched_qualities(model) if model.qualities else {criterion.lmbda: None}
    try:
        for pixels, lmbda, quality in ((p, *rate) for p in batches for rate in rates.items()):
            if stop.is_set():
                break
            count, height, width = pixels.shape[:3]
            with utils.data_errors(f"validation on {count} picture(s) of {width}x{height}"):
                x = as_input(pixels.to(processes.device, non_blocking=True))
                output = model(x, quality)
                terms = criterion(output, x, lmbda)
                of_batch = {"loss": terms["loss"].item(), "bpp": terms["bpp_loss"].item()}
                for original, x_hat in zip(x, output["x_hat"], strict=True):
                    row = {"lmbda": lmbda, **of_batch, "psnr": math.nan, "ms-ssim": None}
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
    if rows and not failures and not stopped:
        if model.qualities:
            for lmbda in rates:
                of_rate = column_means([row for row in rows if row["lmbda"] == lmbda])
                means |= {f"lambda_{lmbda:g}/{key}": value for key, value in of_rate.items()}
            rows = [{**row, "loss": row["loss"] * rate_weight(row["lmbda"])} for row in rows]
        means = column_means(rows) | means
    return Validation(means, shown, stopped, failures)


def column_means(rows: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """Mean of each measurement over the rows that have it."""
    means = {}
    for key in ("loss", "bpp", "psnr", "ms-ssim"):
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            means[key] = statistics.fmean(values)
    return means
