"""The loss: CompressAI's at one lambda, and what of it each sample has at its own."""

import compressai.losses
import pytest
import torch
from conftest import SHALLOW

import models
from training.criterion import RateDistortionLoss, rate_weight, watched_qualities


def batch(size=64):
    x = torch.rand(3, 3, size, size).to(memory_format=torch.channels_last)
    likelihoods = {"y": torch.rand(3, 20, 4, 4) + 1e-3, "z": torch.rand(3, 12, 1, 1) + 1e-3}
    x_hat = (x + 0.1 * torch.randn_like(x)).requires_grad_()
    return {"x_hat": x_hat, "likelihoods": likelihoods}, x


@pytest.mark.parametrize(("metric", "size"), [("mse", 64), ("ms-ssim", 161)])
def test_loss_is_compressais(metric, size):
    output, x = batch(size)
    ours = RateDistortionLoss(0.013, metric)(output, x)
    theirs = compressai.losses.RateDistortionLoss(0.013, metric)(output, x)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():  # sums in another order
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=0)


def test_loss_of_a_batch_is_the_mean_of_its_samples():
    output, x = batch()
    lmbda, weight = torch.tensor([0.0035, 0.013, 0.05]), torch.tensor([2.0, 1.0, 0.5])
    whole = RateDistortionLoss()(output, x, lmbda, weight)
    alone = []
    for i in range(3):
        part = {k: v[i : i + 1] for k, v in output["likelihoods"].items()}
        sample = {"x_hat": output["x_hat"][i : i + 1], "likelihoods": part}
        loss = RateDistortionLoss(lmbda[i].item())(sample, x[i : i + 1])["loss"]
        alone.append(weight[i] * loss)
    torch.testing.assert_close(whole["loss"], sum(alone) / 3, rtol=1e-5, atol=0)
    whole["loss"].backward()
    assert output["x_hat"].grad.isfinite().all()


def test_rates_pull_alike_where_the_error_follows_lambda():
    """Its gradient at the reconstruction, of an error that falls with lambda^(-1/2)."""
    x = torch.zeros(2, 3, 8, 8)
    lmbda = torch.tensor([0.004, 0.04])
    x_hat = (lmbda**-0.5).view(2, 1, 1, 1).expand_as(x).clone().requires_grad_()
    likelihoods = {"y": torch.ones(2, 1, 1, 1)}
    output = {"x_hat": x_hat, "likelihoods": likelihoods}
    RateDistortionLoss()(output, x, lmbda, rate_weight(lmbda))["loss"].backward()
    torch.testing.assert_close(x_hat.grad[0], x_hat.grad[1])
    assert rate_weight(0.013) == 1


def test_watched_qualities_have_the_published_lambdas():
    model = models.build_model("mambavc", **SHALLOW, qualities=3)
    for lmbda, quality in watched_qualities(model).items():
        assert model.lmbda(quality).item() == pytest.approx(lmbda, rel=1e-4)
    assert list(watched_qualities(model)) == [0.0035, 0.013, 0.05]
    narrow = models.build_model("mambavc", **SHALLOW, qualities=3, lmbda_range=(0.02, 0.04))
    ((lmbda, quality),) = watched_qualities(narrow).items()
    assert (lmbda, quality) == pytest.approx((0.02 * 2**0.5, 50))
