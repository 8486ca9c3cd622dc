"""Optimisers and schedules."""

import copy

import pytest
import torch
import torch.nn as nn
from conftest import SHALLOW

import models
from layers.ss2d import is_fixed
from training.optim import (
    Muon,
    first_cooldown_step,
    fix_A,
    lr_factor,
    make_optimizers,
    orthogonalise,
    split_parameters,
    warmup_factor,
)
from utils import UsageError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return models.build_model("mambavc", **SHALLOW)


def test_every_parameter_has_one_optimizer(model):
    groups = split_parameters(model)
    ids = [id(p) for group in groups.values() for p in group]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in groups["matrices"]}
    assert {"g_a.0.weight", "g_s.0.weight", "g_a.1.op.in_proj.weight"} <= matrices
    assert {"g_a.1.op.x_proj_weight", "g_a.1.op.dt_projs_weight"} <= matrices
    assert {"cc_mean_transforms.0.0.weight"} <= matrices
    rest = {names[id(p)] for p in groups["rest"]}
    assert {"g_a.1.op.conv2d.weight", "g_a.1.op.A_logs", "g_a.1.norm.weight"} <= rest
    assert all(not name.startswith("entropy_bottleneck") for name in matrices)
    assert all("relative_position_params" not in name for name in matrices)
    assert [names[id(p)] for p in groups["aux"]] == ["entropy_bottleneck.quantiles"]


def test_a_fixed_A_is_left_to_no_optimizer(model):
    model = copy.deepcopy(model)
    fix_A(model)
    ids = {id(p) for group in split_parameters(model).values() for p in group}
    left_out = {name for name, p in model.named_parameters() if id(p) not in ids}
    assert left_out == {name for name, _ in model.named_parameters() if name.endswith("A_logs")}


@torch.no_grad()
def test_an_A_that_was_trained_is_fixed_on_request_only(model, caplog):
    model = copy.deepcopy(model)
    model.g_s[1].op.A_logs[0, 0] += 1e-4
    with pytest.raises(UsageError, match=r"--fixed-A .* g_s\.1\.op\.A_logs has other values"):
        fix_A(model)
    fix_A(model, reset=True)
    assert "A of 1 scans was set back" in caplog.text
    assert is_fixed(model.g_s[1].op.A_logs)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 12, 75), (4, 64, 4), (1, 1, 9)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    singular = torch.linalg.svdvals(result)
    # The quintic's fixed band: five steps end within it for all but tiny singular values.
    assert singular.max() < 1.25
    assert singular.median() > 0.65
    for one, expected in zip(matrices, result, strict=True):
        torch.testing.assert_close(orthogonalise(one[None])[0], expected, rtol=1e-4, atol=1e-5)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = nn.functional.cosine_similarity((left @ right).flatten(), result.flatten(), dim=0)
    assert cosine > 0.95
    assert not orthogonalise(torch.zeros(shape)).any()


def run_steps(optimizer, params, grads):
    for step_grads in grads:
        for p, grad in zip(params, step_grads, strict=True):
            p.grad = grad.clone(memory_format=torch.preserve_format)
        optimizer.step()


def test_muon_is_pytorchs_on_matrices():
    torch.manual_seed(0)
    shapes = [(24, 40), (24, 40), (40, 24), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    run_steps(Muon(ours, lr=0.1), ours, grads)
    reference = torch.optim.Muon(
        theirs, lr=0.1, momentum=0.95, weight_decay=0, adjust_lr_fn="match_rms_adamw"
    )
    run_steps(reference, theirs, grads)
    for p, q, start in zip(ours, theirs, before, strict=True):
        # PyTorch iterates in bfloat16, with 8 bits of mantissa.
        assert (p - q).norm() < 0.03 * (q - start).norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_kernels_and_stacks_as_matrices(memory_format):
    torch.manual_seed(0)
    kernel, stack = torch.randn(12, 8, 3, 3), torch.randn(4, 6, 10)
    grads = [(torch.randn_like(kernel), torch.randn_like(stack)) for _ in range(3)]
    params = [
        nn.Parameter(kernel.clone(memory_format=memory_format)),
        nn.Parameter(stack.clone()),
    ]
    run_steps(
        Muon(params, lr=0.1), params, [(g.to(memory_format=memory_format), h) for g, h in grads]
    )
    matrices = [nn.Parameter(kernel.flatten(1).clone()), *map(nn.Parameter, stack.clone())]
    run_steps(Muon(matrices, lr=0.1), matrices, [(g.flatten(1), *h) for g, h in grads])
    # The order of a kernel's columns changes the order of float32 sums.
    torch.testing.assert_close(params[0].flatten(1), matrices[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(params[1], torch.stack(matrices[1:]), rtol=1e-4, atol=1e-5)


def test_resumed_muon_goes_on_alike():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(8, 4, 3, 3))]
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]
    optimizer = Muon(params, lr=0.1)
    run_steps(optimizer, params, grads[:2])
    resumed_params = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = Muon(resumed_params, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run_steps(optimizer, params, grads[2:])
    run_steps(resumed, resumed_params, grads[2:])
    assert all(torch.equal(p, q) for p, q in zip(params, resumed_params, strict=True))


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_optimizers_move_every_parameter(model, name):
    model = copy.deepcopy(model)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    net, aux = make_optimizers(model, name, lr=1e-3, aux_lr=1e-2)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).reshape(p.shape)
    for optimizer in (*net.values(), aux):
        optimizer.step()
    sizes = {
        key: (p - before[key]).square().mean().sqrt().item() for key, p in model.named_parameters()
    }
    assert sizes.pop("entropy_bottleneck.quantiles") == pytest.approx(1e-2, rel=1e-3)
    # Adam's first step is the learning rate; Muon's updates are of about a fifth of that size.
    assert all(1e-4 < size < 1.1e-3 for size in sizes.values()), sizes


def test_schedules():
    multistep = [lr_factor(step, "multistep", 100, [50, 80]) for step in (0, 49, 50, 79, 80, 200)]
    assert multistep == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = [lr_factor(step, "cosine", 100) for step in range(101)]
    assert cosine[0] == 1
    assert cosine[50] == pytest.approx(0.5)
    assert cosine[100] == pytest.approx(0)
    assert sorted(cosine, reverse=True) == cosine
    assert [warmup_factor(s, 4) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_cooldown_falls_to_zero_from_any_point():
    def rates(start, shape, total_steps=10):
        return [lr_factor(s, "wsd", total_steps, (), start, shape) for s in range(total_steps + 1)]

    assert rates(6, "linear") == pytest.approx([1] * 7 + [0.75, 0.5, 0.25, 0])
    assert rates(6, "1-sqrt") == pytest.approx([1] * 7 + [0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0])
    assert rates(10, "linear")[:10] == [1] * 10  # no cool-down at all
    assert first_cooldown_step(100, 0.2) == first_cooldown_step(100, 20) == 80
    assert first_cooldown_step(100, 0) == 100
    assert first_cooldown_step(100, 500) == 0
