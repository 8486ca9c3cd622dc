"""graphs.py: what a replay computes is what the functions compute. Needs a GPU."""

import gc

import pytest
import torch
from conftest import SHALLOW, gained_model

import models
from kernels.graphs import GraphedPasses, GraphedUpdate, Replay, side_by_side
from layers.swin import SwinBlock
from training.gradients import FlatGradients
from training.optim import make_optimizers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def tiny() -> models.SliceHyperprior:
    torch.manual_seed(0)
    return models.build_model("mambavc", drop_path_rate=0.0, **SHALLOW).cuda()


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_graphed_steps_are_the_eager_steps(optimizer):
    """Of two sizes: three are warm-up, the rest replays; the learning rate changes at each."""
    sizes = [64] * 5 + [128] * 4
    batches = [torch.rand(2, 3, size, size, device="cuda") for size in sizes]

    def train(graphed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = tiny().eval()  # no noise: both runs see the same loss
        net, aux = make_optimizers(model, optimizer, 1e-3, 1e-3)
        optimizers = [*net.values(), aux]
        flat = FlatGradients([p for p in model.parameters() if p.requires_grad])

        def gradients(x):
            flat.clear()
            output = model(x)
            bits = sum(p.log2().sum() for p in output["likelihoods"].values())
            loss = (output["x_hat"] - x).square().mean() * 500 - bits / x.numel()
            (loss + model.aux_loss()).backward()
            if graphed:
                flat.take()
            return loss.detach()

        def update():
            for each in optimizers:
                each.step()

        if graphed:
            update = GraphedUpdate(optimizers)
        take, shape = gradients, None
        losses = []
        for step, x in enumerate(batches):
            for each in optimizers:
                for group in each.param_groups:
                    group["lr"] = 1e-3 / (1 + step)
            if graphed and x.shape != shape:
                take, shape = GraphedPasses(gradients, x), x.shape
            losses.append(take(x).clone())
            update()
        assert all(isinstance(g["lr"], float) for each in optimizers for g in each.param_groups)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), torch.stack(losses)

    before = torch.cat([p.detach().flatten() for p in tiny().parameters()])
    (eager, eager_losses), (graphed, graphed_losses) = train(False), train(True)
    moved = (eager - before).norm()
    # Learning rates reach the graph in float32, and library products may take other algorithms.
    assert moved > 0
    assert (graphed - eager).norm() < 1e-2 * moved
    torch.testing.assert_close(graphed_losses, eager_losses, rtol=1e-3, atol=0)


def test_branches_keep_their_memory():
    """A branch's backward pass is slow, and much memory is taken and given back meanwhile."""
    weight = torch.eye(64, device="cuda", requires_grad=True)
    x = torch.randn(2048, 64, device="cuda")

    flat = FlatGradients([weight])

    def gradients(x):
        flat.clear()
        shared = (x + 1).requires_grad_()

        def slow():
            y = shared
            for _ in range(50):
                y = (y @ weight).sin()
            return y

        quick, other = side_by_side([lambda: shared * 2, slow], [shared])
        for _ in range(50):
            quick = quick.cos() * 1.01
        loss = (quick * other.detach()).mean() + other.square().mean()
        loss.backward()
        flat.take()
        return loss.detach()

    expected = gradients(x), weight.grad.clone()
    graphed = GraphedPasses(gradients, x)
    for _ in range(20):
        # Library products may take other algorithms in a capture.
        torch.testing.assert_close(graphed(x), expected[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(weight.grad, expected[1], rtol=1e-3, atol=1e-6)


def test_nothing_is_collected_during_a_capture():
    """What ends a graph that is no longer used, in a cycle of references, would end a capture."""
    seen = []

    def gradients(x):
        seen.append(gc.isenabled())
        return x * 2

    GraphedPasses(gradients, torch.ones(3, device="cuda"))
    assert seen[0] and not seen[-1] and gc.isenabled()


def test_replayed_updates_count_as_changes():
    """Else a layer would go on with what it read of its weights before, such as a fixed A."""
    model = tiny()
    net, aux = make_optimizers(model, "muon", 1e-3, 1e-3)
    update = GraphedUpdate([*net.values(), aux])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for step in range(6):
        versions = [p._version for p in model.parameters()]
        update()
        now = [p._version for p in model.parameters()]
        # PyTorch itself counts no step of a fused Adam: none of the first three is asked for.
        assert step < 4 or all(a > b for a, b in zip(now, versions, strict=True))


@pytest.mark.parametrize("exact", [True, False])
def test_replayed_streams_are_the_eager_streams(exact):
    model = tiny().eval()
    model.update()
    pictures = [torch.rand(1, 3, *size, device="cuda") for size in ((64, 128), (50, 100)) * 4]
    streams = [model.compress(x, exact=exact) for x in pictures]
    decoded = [model.decompress(**stream, exact=exact)["x_hat"] for stream in streams]
    coder = models.Coder(model, exact=exact, graphs=True)
    for x, stream, x_hat in zip(pictures, streams, decoded, strict=True):
        assert coder.compress(x) == stream
        assert torch.equal(coder.decompress(**stream)["x_hat"], x_hat)


def test_graphs_serve_every_quality():
    torch.manual_seed(0)
    model = gained_model().cuda()
    x = torch.rand(1, 3, 64, 128, device="cuda")
    coder = models.Coder(model, graphs=True)
    for quality in (50, 50, 0, 33.3, 100):
        stream = coder.compress(x, quality)
        assert stream == model.compress(x, quality=quality)
        expected = model.decompress(**stream)["x_hat"]
        assert torch.equal(coder.decompress(**stream)["x_hat"], expected)


def test_the_host_does_not_wait_for_gains():
    model = gained_model().cuda().train()
    x = torch.rand(2, 3, 64, 64, device="cuda")
    quality = 100 * torch.rand(2, device="cuda")
    model(x, quality)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.lmbda(quality)
        model(x, quality)
        model(x, 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replay_goes_on_after_it_forgot():
    replay = Replay()
    for size in (2, 3, 4) * 3:
        x = torch.rand(size, size, device="cuda")
        if size == 4:
            replay.forget()
        torch.testing.assert_close(replay(torch.mm, x, x), x @ x)


def test_replay_goes_on_after_an_error():
    """Such as of memory, in any stretch of a function."""
    fails: list[bool] = []

    def stretches(x):
        yield x + 1
        if fails.pop():
            raise RuntimeError("no room")
        yield x + 2

    replay = Replay()
    x = torch.zeros(3, device="cuda")
    for call in range(4):
        fails.append(call == 1)  # where it is to be recorded
        if call == 1:
            with pytest.raises(RuntimeError, match="no room"):
                list(replay.stretches(stretches, x))
        else:
            run = replay.stretches(stretches, x)
            assert [next(run).sum().item() for _ in range(2)] == [3, 6]


def test_objects_share_no_graph():
    """Not even those that are equal, nor one that lies where another was."""

    class Scale:
        def __init__(self, factor):
            self.factor = torch.full((), float(factor), device="cuda")

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

        def apply(self, x):
            return self.factor * x

    replay = Replay()
    x = torch.rand(3, device="cuda")
    scales = [Scale(2), Scale(3)]
    for _ in range(3):
        for scale in scales:
            torch.testing.assert_close(replay(scale.apply, x), scale.factor * x)
    assert len(replay.recordings) == 2
    scales[0].factor.fill_(5)  # a new value in the same memory
    torch.testing.assert_close(replay(scales[0].apply, x), 5 * x)
    for factor in range(10):
        for _ in range(2):
            torch.testing.assert_close(replay(Scale(factor).apply, x), factor * x)


@torch.no_grad()
def test_graph_outlives_other_sizes():
    """Whatever the block makes for other sizes does not use the memory of a graph."""
    block = SwinBlock(16, 8, window_size=4, shift=2).cuda()
    x = torch.rand(1, 16, 32, 32, device="cuda")
    expected = block(x)
    replay = Replay()
    for _ in range(2):
        replay(block, x)
    for size in range(1, 40):
        block(torch.rand(1, 16, 4 * size, 4, device="cuda"))
    torch.cuda.empty_cache()
    filled = [torch.ones(2**n, dtype=torch.bool, device="cuda") for n in range(6, 20)]
    torch.testing.assert_close(replay(block, x), expected)
    del filled
