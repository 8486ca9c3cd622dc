"""graphs.py: what a replay computes is what the functions compute. Needs a GPU."""

import pytest
import torch

import models
from graphs import GraphedGradients, GraphedUpdate, Replay
from optim import make_optimizers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

TINY = {"N": 8, "M": 20, "depths": (1, 1, 1, 1), "Z": 8, "context_width": 16, "transform_width": 16}


def tiny() -> models.SliceHyperprior:
    torch.manual_seed(0)
    return models.build_model("mambavc", drop_path_rate=0.0, **TINY).cuda()


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_graphed_steps_are_the_eager_steps(optimizer):
    """Seven steps: three are warm-up, the rest replays; the learning rate changes at each."""
    x = torch.rand(2, 3, 64, 64, device="cuda")

    def train(graphed: bool) -> torch.Tensor:
        model = tiny().eval()  # no noise: both runs see the same loss
        net, aux = make_optimizers(model, optimizer, 1e-3, 1e-3)
        optimizers = [*net.values(), aux]

        def gradients(x):
            output = model(x)
            bits = sum(p.log2().sum() for p in output["likelihoods"].values())
            loss = (output["x_hat"] - x).square().mean() * 500 - bits / x.numel()
            (loss + model.aux_loss()).backward()
            return loss.detach()

        def update():
            for each in optimizers:
                each.step()

        if graphed:
            gradients = GraphedGradients(gradients, list(model.parameters()), x)
            update = GraphedUpdate(optimizers)
        for step in range(7):
            for each in optimizers:
                for group in each.param_groups:
                    group["lr"] = 1e-3 / (1 + step)
            gradients(x)
            update()
            for each in optimizers:
                each.zero_grad()
        assert all(isinstance(g["lr"], float) for each in optimizers for g in each.param_groups)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    before = torch.cat([p.detach().flatten() for p in tiny().parameters()])
    eager, graphed = train(False), train(True)
    moved = (eager - before).norm()
    # Learning rates reach the graph in float32, and library products may take other algorithms.
    assert moved > 0
    assert (graphed - eager).norm() < 1e-2 * moved


@pytest.mark.parametrize("exact", [True, False])
def test_replayed_streams_are_the_eager_streams(exact):
    model = tiny().eval()
    model.update()
    pictures = [torch.rand(1, 3, *size, device="cuda") for size in ((64, 128), (50, 100)) * 4]
    streams = [model.compress(x, exact=exact) for x in pictures]
    decoded = [model.decompress(**stream, exact=exact)["x_hat"] for stream in streams]
    model.run_stage = Replay()
    for x, stream, x_hat in zip(pictures, streams, decoded, strict=True):
        assert model.compress(x, exact=exact) == stream
        assert torch.equal(model.decompress(**stream, exact=exact)["x_hat"], x_hat)


def test_replay_forgets_all_at_its_limit():
    replay = Replay(limit=2)
    for _ in range(3):
        for size in (2, 3, 4):
            x = torch.rand(size, device="cuda")
            assert torch.equal(replay(torch.neg, x), -x)
    assert len(replay.graphs) <= 2
