"""The loss of a codec: distortion against rate, at one lambda or at many at once."""

import math
from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

import models

WATCHED_LMBDAS = (0.0035, 0.0130, 0.0500)  # the lowest, the middle and the highest published one
REFERENCE_LMBDA = 0.0130  # here a sample counts as much as in a network of a single rate


class RateDistortionLoss(nn.Module):
    """CompressAI's loss, lambda * distortion + bpp, where each sample may have a lambda of its own.

    The distortion is 255^2 MSE of samples in [0, 1], or 1 - MS-SSIM; bpp is the estimated rate in
    bits per pixel. The loss is the mean over the batch of ``weight * (lmbda * distortion + bpp)``.

    Args:
        lmbda: of all samples, unless a call says otherwise.
        metric: ``mse`` or ``ms-ssim``.
    """

    def __init__(self, lmbda: float | None = None, metric: str = "mse"):
        super().__init__()
        self.lmbda = lmbda
        self.metric = metric

    def forward(
        self,
        output: Mapping[str, Tensor | Mapping[str, Tensor]],
        target: Tensor,
        lmbda: Tensor | float | None = None,
        weight: Tensor | float = 1.0,
    ) -> dict[str, Tensor]:
        """Loss and its terms.

        Args:
            output: of a network: ``x_hat`` and ``likelihoods``.
            target: the pictures, (batch, 3, height, width) in [0, 1].
            lmbda, weight: numbers, or tensors (batch,).

        Returns:
            Means over the batch: ``loss``, ``bpp_loss``, and ``mse_loss`` or ``ms_ssim_loss``.
        """
        x_hat = output["x_hat"]
        height, width = target.shape[-2:]
        bits = -sum(part.log2().sum((1, 2, 3)) for part in output["likelihoods"].values())
        bpp = bits / (height * width)
        if self.metric == "ms-ssim":
            from pytorch_msssim import ms_ssim

            quality = ms_ssim(x_hat, target, data_range=1, size_average=False)
            distortion, terms = 1 - quality, {"ms_ssim_loss": quality.mean()}
        else:
            mse = (x_hat - target).square().mean((1, 2, 3))
            distortion, terms = 255**2 * mse, {"mse_loss": mse.mean()}
        lmbda = self.lmbda if lmbda is None else lmbda
        loss = weight * (lmbda * distortion + bpp)
        return {"loss": loss.mean(), "bpp_loss": bpp.mean(), **terms}


def rate_weight(lmbda: Tensor | float) -> Tensor | float:
    """Weight of samples at these lambdas in the loss of a variable-rate network.

    The gradient of lambda * MSE at the reconstruction grows with lambda times an error that falls
    with lambda^(-1/2). Weighted by lambda^(-1/2), all rates pull alike.
    """
    return (REFERENCE_LMBDA / lmbda) ** 0.5


def watched_qualities(model: models.SliceHyperprior) -> dict[float, float]:
    """Qualities at which a validation looks at a variable-rate network, by their lambdas.

    They are those of `WATCHED_LMBDAS` that the network was made for; if none was, its middle.
    """
    lowest, highest = (model.lmbda(quality).item() for quality in (0, 100))
    span = math.log(highest / lowest)  # lambda is geometric in the quality
    inside = [lmbda for lmbda in WATCHED_LMBDAS if lowest <= lmbda <= highest]
    inside = inside or [math.sqrt(lowest * highest)]
    return {lmbda: 100 * math.log(lmbda / lowest) / span for lmbda in inside}


def draw_qualities(batch: int, device: torch.device) -> Tensor:
    """Qualities (batch,) between 0 and 100, drawn on a device without waiting for it."""
    return torch.empty(batch, device=device).uniform_(0, 100)
