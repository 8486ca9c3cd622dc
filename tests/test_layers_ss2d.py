"""Which kernel SS2D takes: that of a fixed A only while A_logs holds its first values."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layers import SS2D
from layers.ss2d import is_fixed

pytest.importorskip("numba", reason="the choice is seen in the compiled scan's operator")


class ScanCalls(TorchDispatchMode):
    """Records whether each scan was promised a fixed A."""

    def __init__(self):
        super().__init__()
        self.fixed = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mambavc.scan_2d.default:
            self.fixed.append(args[-1])
        return func(*args, **(kwargs or {}))


def takes_fixed_kernel(layer, gradients=False):
    """Which kernel a forward pass of a random map takes."""
    u = torch.randn(1, 3, 4, layer.in_proj.weight.shape[1], dtype=layer.in_proj.weight.dtype)
    with ScanCalls() as calls, torch.set_grad_enabled(gradients):
        layer(u)
    (fixed,) = calls.fixed
    return fixed


@pytest.fixture
def layer():
    """One that has run with its first A, so that whatever it remembers is there."""
    layer = SS2D(16)
    assert takes_fixed_kernel(layer)
    return layer


def test_fresh_layers_take_the_fixed_kernel_unless_A_is_trained(layer):
    assert takes_fixed_kernel(layer)
    assert not takes_fixed_kernel(layer, gradients=True)
    assert takes_fixed_kernel(layer)
    layer.A_logs.requires_grad_(False)
    assert takes_fixed_kernel(layer, gradients=True)


@pytest.mark.parametrize("index", [(0, 0), (0, 1), (127, 15)], ids=str)
def test_one_other_value_in_one_channel_is_enough(index):
    A_logs = SS2D(16).A_logs.detach()
    assert is_fixed(A_logs)
    A_logs[index] += 2e-6  # about one fiftieth of what a step of Adam at 1e-4 moves it
    assert not is_fixed(A_logs)


def test_logarithms_of_other_libraries_are_known():
    first = torch.arange(1, 17).double().log().float().expand(64, 16)
    for end in (-torch.inf, torch.inf):
        other = torch.nextafter(first, torch.tensor(end))
        other[:, 0] = 0
        assert is_fixed(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_values_are_not_the_first(layer, dtype):
    # To half and back: neither counts as a change, and the memory may be that of before.
    layer.to(dtype).float()
    assert not takes_fixed_kernel(layer)


def adam(fused):
    def step(layer):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-4, fused=fused)
        layer(torch.randn(1, 3, 4, 16)).square().sum().backward()
        optimizer.step()

    return step


def in_place(layer):
    with torch.no_grad():
        layer.A_logs[5, 3] += 1e-4


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.A_logs.mul_(1.001)


def load(layer):
    state = {k: v + 0.01 if k == "A_logs" else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)


def assign(layer):
    state = {k: v + 0.01 if k == "A_logs" else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def replace(layer):
    layer.A_logs = torch.nn.Parameter(layer.A_logs.detach() + 0.01)


def replace_data(layer):
    layer.A_logs.data = layer.A_logs.data + 0.01


CHANGES = {
    "one-step-of-adam": adam(fused=False),
    "one-step-of-fused-adam": adam(fused=True),
    "in-place": in_place,
    "in-inference-mode": in_inference_mode,
    "load-state-dict": load,
    "assign-state-dict": assign,
    "replaced": replace,
    "replaced-data": replace_data,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_A_takes_the_general_kernel(layer, change):
    change(layer)
    assert not takes_fixed_kernel(layer)
    layer.reset_scan_parameters()
    assert takes_fixed_kernel(layer)
    with torch.inference_mode():
        assert takes_fixed_kernel(layer)


def pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_judge_their_own_values(layer, duplicate):
    other = duplicate(layer)
    assert takes_fixed_kernel(other)
    # A copy's version starts anew: it passes that of the original's on the way.
    for _ in range(layer.A_logs._version + 2):
        in_place(other)
        assert not takes_fixed_kernel(other)
    assert takes_fixed_kernel(layer)
    in_place(layer)
    assert not takes_fixed_kernel(duplicate(layer))


def test_a_layer_made_in_inference_mode_takes_the_general_kernel():
    with torch.inference_mode():
        assert not takes_fixed_kernel(SS2D(16))


def test_a_substituted_A_is_used(layer):
    u = torch.randn(1, 3, 4, 16)
    other = layer.A_logs.detach() + 0.5
    y = torch.func.functional_call(layer, {"A_logs": other}, u)
    replace_by = copy.deepcopy(layer)
    replace_by.A_logs = torch.nn.Parameter(other)
    torch.testing.assert_close(y, replace_by(u))


def test_both_kernels_agree(layer):
    u = torch.randn(2, 9, 7, 16)
    with torch.no_grad():
        fixed = layer(u)
    torch.testing.assert_close(layer(u), fixed)


def test_compiled_layers_see_later_values(layer):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    u = torch.randn(1, 3, 4, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(u), layer(u))
        layer.A_logs += 0.5
        torch.testing.assert_close(compiled(u), layer(u))


def test_training_a_compiled_layer_is_noticed(layer):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3, fused=True)
    compiled(torch.randn(1, 3, 4, 16)).square().sum().backward()
    optimizer.step()
    assert not takes_fixed_kernel(layer)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_layers_take_other_values(layer, strict):
    u = torch.randn(1, 3, 4, 16)
    with torch.no_grad():
        exported = torch.export.export(layer, (u,), strict=strict)
        layer.A_logs += 0.5
        exported.state_dict["A_logs"] = layer.A_logs
        torch.testing.assert_close(exported.module()(u), layer(u))
    assert takes_fixed_kernel(SS2D(16))
