"""Layers against direct formulas."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from stage_checks import CUDA, DEVICE, error, needs_kernels

import kernels
from kernels import backends
from layers import SS2D, DropPath, SwinAttentionBlock, SwinBlock, VSSBlock, WindowAttention
from layers.winograd import WinogradConv2d


def naive_window_attention(layer: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Every pixel attends to the pixels of its own window, found by coordinates."""
    height, width = x.shape[1:3]
    p, shift, heads = layer.window_size, layer.shift, layer.num_heads
    padded = F.pad(x, (0, 0, 0, -width % p, 0, -height % p))
    rows, columns = padded.shape[1:3]
    q, k, v = layer.embedding_layer(padded).reshape(*padded.shape[:3], 3, heads, -1).unbind(3)
    out = torch.zeros_like(padded)
    positions = [(i, j) for i in range(rows) for j in range(columns)]

    def window(i, j):
        # A window that wraps around the map's end is cut there.
        return tuple(((a - shift) // p, a >= shift) if shift else a // p for a in (i, j))

    for i, j in positions:
        members = [m for m in positions if window(*m) == window(i, j)]
        mi, mj = (torch.tensor(side) for side in zip(*members, strict=True))
        bias = layer.relative_position_params[:, i - mi + p - 1, j - mj + p - 1]  # (heads, members)
        logits = torch.einsum("bhc,bmhc->bhm", q[:, i, j], k[:, mi, mj]) * layer.scale + bias
        out[:, i, j] = torch.einsum("bhm,bmhc->bhc", logits.softmax(-1), v[:, mi, mj]).flatten(1)
    return layer.linear(out)[:, :height, :width]


@pytest.mark.parametrize("size", [(1, 1), (2, 4), (7, 8), (6, 3)], ids=str)
@torch.no_grad()
def test_winograd_is_the_convolution(size):
    convolution = torch.nn.Conv2d(5, 3, 3, padding=1).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    # Far within the 1e-12 by which the coder lets devices differ.
    expected = convolution(x)
    torch.testing.assert_close(WinogradConv2d(convolution)(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 1}, {"kernel_size": 3}, {"kernel_size": 3, "padding": 1, "stride": 2}],
    ids=str,
)
def test_winograd_refuses_other_convolutions(options):
    with pytest.raises(
        ValueError, match="expected a kernel of 3x3, padding and stride of 1, got Conv"
    ):
        WinogradConv2d(torch.nn.Conv2d(2, 2, **options))


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (5, 9), (12, 3)], ids=str)
def test_window_attention_matches_a_direct_sum(size, shift):
    layer = WindowAttention(8, head_dim=4, window_size=4, shift=shift).double()
    torch.nn.init.normal_(layer.relative_position_params)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive_window_attention(layer, x))


def test_window_attention_refuses_a_width_its_heads_do_not_divide():
    with pytest.raises(ValueError, match="dim 10 is not a multiple of head_dim 4"):
        WindowAttention(10, head_dim=4, window_size=4)


def test_swin_blocks_keep_shape():
    x = torch.randn(1, 16, 5, 9)
    assert SwinBlock(16, head_dim=8).eval()(x).shape == x.shape
    x = torch.randn(2, 20, 3, 11)
    assert SwinAttentionBlock(20, 16, head_dim=8, window_size=8).eval()(x).shape == x.shape


@needs_kernels
def test_attention_block_trains_in_float32_as_pytorch_would(monkeypatch, tf32):
    """Chains, products, norms and window attention together; on a CPU there is no TF32."""
    block = SwinAttentionBlock(20, 16, head_dim=8, window_size=4).to(DEVICE)
    x = torch.randn(1, 20, 4, 8, device=DEVICE, requires_grad=True)
    inputs = [x, *block.parameters()]
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: True)
    fused = block(x)
    dout = torch.randn_like(fused)
    gradients = torch.autograd.grad(fused, inputs, dout)
    with torch.no_grad():
        assert torch.equal(block(x), fused)
    torch.set_float32_matmul_precision("highest")
    precise = block(x)
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: False)
    expected = block(x)
    assert torch.equal(precise, expected)
    # Rounding, and on a GPU ReLUs that other roundings pass on the other side.
    tolerance = 1e-2 if CUDA else 1e-5
    assert 0 < error(fused, expected) < tolerance
    wanted = torch.autograd.grad(expected, inputs, dout)
    for gradient, each in zip(gradients, wanted, strict=True):
        assert error(gradient, each) < 10 * tolerance


def test_ss2d_is_the_paper_formula():
    layer = SS2D(16).double()
    u = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    x, z = layer.in_proj(u).chunk(2, dim=-1)
    x = F.silu(layer.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    y = kernels.selective_scan_2d(x.contiguous(), *layer.scan_parameters(), backend="reference")
    expected = layer.out_proj(layer.out_norm(y) * F.silu(z))
    torch.testing.assert_close(layer(u), expected)


def test_ss2d_starts_with_mambas_step_sizes():
    delta = F.softplus(SS2D(32).dt_projs_bias.double())
    # exp, log and softplus in float32 may move the ends of the range by 1e-4 of their value.
    assert delta.min() >= 1e-3 * (1 - 1e-4)
    assert delta.max() <= 1e-1 * (1 + 1e-4)
    assert delta.log().std() > 1


def test_drop_path_draws_the_numbers_that_checkpoints_were_trained_with():
    """Of timm's layer: a number for each sample, in the dtype of the map, from its generator."""
    x = torch.randn(64, 2, 3)
    layer = DropPath(0.25)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    kept = torch.empty(64, 1, 1).bernoulli_(0.75)
    assert torch.equal(y, x * (kept / 0.75))
    assert 0 < kept.sum() < 64
    torch.manual_seed(7)
    assert torch.equal(layer(x, residual=2 * x), torch.addcmul(2 * x, x, kept / 0.75))
    assert layer.eval()(x) is x
    assert torch.equal(layer(x, residual=2 * x), 3 * x)
    assert DropPath(0.0).train()(x) is x
    with pytest.raises(ValueError, match="below 1, got 1"):
        DropPath(1)


def test_importing_the_layers_does_not_load_timm():
    program = "import sys, layers; sys.exit('timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_vss_block_is_a_residual_and_drops_it_in_training():
    block = VSSBlock(8, drop_path=0.999)
    x = torch.randn(1, 8, 4, 4)
    assert not torch.equal(block.eval()(x), x)
    assert torch.equal(block.train()(x), x)
