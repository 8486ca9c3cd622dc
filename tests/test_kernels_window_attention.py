"""Attention in windows by kernels against the layer's own PyTorch code in float64."""

import pytest
import torch
from stage_checks import DEVICE, check, needs_kernels, with_gradients
from torch.func import functional_call

from kernels import backends, fuses_window_attention, window_attention
from layers import WindowAttention

pytestmark = needs_kernels


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 8, 12)], ids=str)
def test_kernels_are_the_layers_formula(shape, shift, monkeypatch):
    heads, dim = 2, 5
    layer = WindowAttention(heads * dim, dim, window_size=4, shift=shift).double().to(DEVICE)
    with torch.no_grad():  # leaves nothing of the layer but what the kernels do
        layer.linear.weight.copy_(torch.eye(heads * dim))
        layer.linear.bias.zero_()
    qkv = torch.randn(*shape, 3 * heads * dim, device=DEVICE)
    position = torch.randn(heads, 7, 7, device=DEVICE)
    inputs = [value.requires_grad_() for value in (qkv, position)]
    out = window_attention(qkv, position, shift)
    dout = torch.randn_like(out)
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)

    def formula(qkv, position):
        monkeypatch.setattr(layer, "embedding_layer", torch.nn.Identity())
        return functional_call(layer, {"relative_position_params": position}, qkv)

    check(results, with_gradients(formula, inputs, dout), inputs)


def test_layer_runs_the_kernels_in_half_precision_on_whole_windows(monkeypatch):
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: True)
    layer = WindowAttention(16, 16, window_size=4, shift=2).half().to(DEVICE)
    x = torch.randn(1, 8, 8, 16, device=DEVICE)
    assert fuses_window_attention(x.half(), 4)
    assert not fuses_window_attention(x, 4)
    assert not fuses_window_attention(x.half()[:, :6], 4)
    fused = layer(x.half())
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: False)
    expected = layer.double()(x.double())
    # A few roundings of half precision.
    assert (fused - expected).norm() < 5e-3 * expected.norm()


def test_operators_pass_opcheck():
    qkv, position = torch.randn(1, 4, 8, 30, device=DEVICE), torch.randn(2, 7, 7, device=DEVICE)
    inputs = [value.requires_grad_() for value in (qkv, position)]
    torch.library.opcheck(torch.ops.mambavc.window_attention.default, (*inputs, 2))
    inputs = [torch.randn(1, 4, 8, 10, device=DEVICE), *(value.detach() for value in inputs)]
    torch.library.opcheck(torch.ops.mambavc.window_attention_backward.default, (*inputs, 2))
