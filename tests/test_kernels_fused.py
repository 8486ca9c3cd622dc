"""Fused convolution + SiLU and LayerNorm x gate: kernels, operators and public functions.

Without a GPU the Triton kernels run in Triton's interpreter, which is exact but slow: the maps
here are small. The reference is PyTorch's own layers in float64.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import fused

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    not (fused._HAS_TRITON and (CUDA or INTERPRET)),
    reason="needs Triton with a CUDA device or TRITON_INTERPRET=1",
)

# Rounding of one operation, times about ten for the sums.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}

CONV_SHAPES = [
    pytest.param((1, 1, 1, 32), id="one-pixel"),
    pytest.param((1, 1, 19, 32), id="one-row-past-a-column-block"),
    pytest.param((1, 7, 1, 64), id="one-column"),
    pytest.param((2, 5, 3, 48), id="batch-and-part-of-a-channel-block"),
    pytest.param((1, 2, 2, 33), id="unaligned-channels"),
    pytest.param((1, 2, 3, 768), id="many-channel-blocks"),
]
NORM_SHAPES = [
    pytest.param((1, 1, 1, 32), id="one-row-of-a-tile"),
    pytest.param((3, 7, 48), id="dim-not-a-power-of-two"),
    pytest.param((5, 512), id="one-row-per-tile"),
    pytest.param((3, 768), id="two-warps"),
    pytest.param((37, 33), id="unaligned-and-several-tiles"),
]


def error(result, expected):
    expected = expected.double()
    return (result.double() - expected).norm() / expected.norm().clamp_min(1e-30)


def conv_reference(x, weight, bias):
    pre = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1])
    return F.silu(pre).permute(0, 2, 3, 1)


def norm_reference(y, z, weight, bias, eps=1e-5):
    return F.layer_norm(y, weight.shape, weight, bias, eps) * F.silu(z)


def with_gradients(function, inputs, dout):
    """Output and all gradients in float64."""
    inputs = [value.double().detach().requires_grad_() for value in inputs]
    out = function(*inputs)
    return out.detach(), torch.autograd.grad(out, inputs, dout.double())


def conv_inputs(shape, dtype, device=DEVICE):
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], 1, 3, 3, dtype=parameter, device=device)
    return x, weight, torch.randn(shape[-1], dtype=parameter, device=device)


def norm_inputs(shape, dtype, device=DEVICE):
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    y = 3 + torch.randn(shape, dtype=dtype, device=device)  # a mean that must be taken away
    z = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=parameter, device=device)
    return y, z, weight, torch.randn(shape[-1], dtype=parameter, device=device)


def check(results, expected, inputs):
    """Compare an output and its gradients, each at the precision of its dtype."""
    out, gradients = results[0], results[1:]
    assert out.dtype == inputs[0].dtype
    assert error(out, expected[0]) < TOLERANCE[out.dtype]
    for gradient, reference, value in zip(gradients, expected[1], inputs, strict=True):
        assert gradient.shape == value.shape and gradient.dtype == value.dtype
        assert error(gradient, reference) < TOLERANCE[value.dtype]


def check_conv_kernels(shape, dtype):
    from kernels import conv_silu_triton as triton_conv_silu

    inputs = conv_inputs(shape, dtype)
    dout = torch.randn_like(inputs[0])
    out = triton_conv_silu.depthwise_conv_silu_forward(*inputs)
    gradients = triton_conv_silu.depthwise_conv_silu_backward(dout, *inputs)
    check((out, *gradients), with_gradients(conv_reference, inputs, dout), inputs)


def check_norm_kernels(shape, dtype):
    from kernels import norm_gate_triton as triton_norm_gate

    inputs = norm_inputs(shape, dtype)
    dout = torch.randn_like(inputs[0])
    out = triton_norm_gate.norm_gate_forward(*inputs, 1e-5)
    gradients = triton_norm_gate.norm_gate_backward(dout, *inputs, 1e-5)
    check((out, *gradients), with_gradients(norm_reference, inputs, dout), inputs)


@needs_kernels
@pytest.mark.parametrize("shape", CONV_SHAPES)
def test_conv_kernels_match_pytorch(shape):
    check_conv_kernels(shape, torch.float32)


@needs_kernels
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norm_kernels_match_pytorch(shape):
    check_norm_kernels(shape, torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_kernels_in_other_dtypes(dtype):
    check_conv_kernels((1, 3, 2, 32), dtype)
    check_norm_kernels((3, 64), dtype)


@needs_kernels
def test_conv_kernels_walk_long_strips(monkeypatch):
    from kernels import conv_silu_triton as triton_conv_silu

    # Few programs make each walk many rows; 37 rows are one full strip and a short one.
    monkeypatch.setattr(triton_conv_silu, "PROGRAMS", 1)
    check_conv_kernels((1, 37, 2, 32), torch.float32)


@needs_kernels
def test_norm_kernels_loop_over_tiles(monkeypatch):
    from kernels import norm_gate_triton as triton_norm_gate

    monkeypatch.setattr(triton_norm_gate, "PROGRAMS", 2)
    monkeypatch.setattr(triton_norm_gate, "GRAD_PROGRAMS", 2)
    check_norm_kernels((7, 512), torch.float32)


@needs_kernels
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, interpreted
def test_saturated_gates_stay_finite():
    from kernels import norm_gate_triton as triton_norm_gate

    y, z, weight, bias = norm_inputs((4, 32), torch.float32)
    z = 200 * torch.sign(z)  # exp(-z) overflows float32
    dout = torch.randn_like(y)
    out = triton_norm_gate.norm_gate_forward(y, z, weight, bias, 1e-5)
    gradients = triton_norm_gate.norm_gate_backward(dout, y, z, weight, bias, 1e-5)
    expected = with_gradients(norm_reference, (y, z, weight, bias), dout)
    check((out, *gradients), expected, (y, z, weight, bias))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: only there do programs run in parallel")
def test_kernels_repeat_bit_for_bit():
    conv = [value.requires_grad_() for value in conv_inputs((2, 61, 67, 96), torch.float32)]
    norm = [value.requires_grad_() for value in norm_inputs((4099, 384), torch.float32)]
    for function, inputs in ((fused.depthwise_conv_silu, conv), (fused.norm_gate, norm)):
        dout = torch.randn_like(inputs[0])
        runs = []
        for _ in range(3):
            out = function(*inputs)
            runs.append((out, *torch.autograd.grad(out, inputs, dout)))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv_silu_matches_pytorch(dtype):
    inputs = [value.requires_grad_() for value in conv_inputs((2, 5, 7, 48), dtype)]
    out = fused.depthwise_conv_silu(*inputs)
    dout = torch.randn_like(out)
    assert out.is_contiguous()
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)
    check(results, with_gradients(conv_reference, inputs, dout), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_gate_matches_pytorch(dtype):
    inputs = [value.requires_grad_() for value in norm_inputs((2, 5, 7, 48), dtype)]
    out = fused.norm_gate(*inputs)
    dout = torch.randn_like(out)
    assert out.is_contiguous()
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)
    check(results, with_gradients(norm_reference, inputs, dout), inputs)


def test_non_contiguous_maps_and_gradients():
    x, weight, bias = conv_inputs((1, 4, 6, 32), torch.float32)
    view = x.transpose(1, 2).detach().requires_grad_()
    out = fused.depthwise_conv_silu(view, weight, bias)
    out.sum().backward()  # an expanded gradient, all strides zero
    _, gradients = with_gradients(conv_reference, (view, weight, bias), torch.ones_like(out))
    assert error(view.grad, gradients[0]) < 1e-6

    y, z, weight, bias = norm_inputs((4, 6, 32), torch.float32)
    view = y.transpose(0, 1).detach().requires_grad_()
    out = fused.norm_gate(view, z.transpose(0, 1), weight, bias)
    out.sum().backward()
    inputs = view, z.transpose(0, 1), weight, bias
    _, gradients = with_gradients(norm_reference, inputs, torch.ones_like(out))
    # One gradient for a whole row nearly cancels in the projections of LayerNorm.
    assert error(view.grad, gradients[0]) < 1e-5


def test_empty_maps():
    weight, bias = torch.randn(32, 1, 3, 3, device=DEVICE), torch.randn(32, device=DEVICE)
    empty = torch.empty(0, 3, 3, 32, device=DEVICE)
    assert fused.depthwise_conv_silu(empty, weight, bias).shape == empty.shape
    assert fused.norm_gate(empty, empty, bias, bias).shape == empty.shape


def test_operators_pass_opcheck():
    conv = [value.requires_grad_() for value in conv_inputs((2, 3, 4, 32), torch.float32)]
    norm = [value.requires_grad_() for value in norm_inputs((2, 3, 32), torch.float32)]
    torch.library.opcheck(torch.ops.mambavc.depthwise_conv_silu.default, conv)
    torch.library.opcheck(torch.ops.mambavc.norm_gate.default, (*norm, 1e-5))
    conv = [value.detach() for value in (conv[0], *conv)]
    norm = [value.detach() for value in (norm[0], *norm)]
    torch.library.opcheck(torch.ops.mambavc.depthwise_conv_silu_backward.default, conv)
    torch.library.opcheck(torch.ops.mambavc.norm_gate_backward.default, (*norm, 1e-5))


@pytest.mark.skipif(CUDA, reason="finite differences are for the formulas used without a GPU")
def test_operator_gradients_against_finite_differences():
    conv = [value.requires_grad_() for value in conv_inputs((1, 2, 3, 2), torch.float64)]
    norm = [value.requires_grad_() for value in norm_inputs((3, 5), torch.float64)]
    assert torch.autograd.gradcheck(torch.ops.mambavc.depthwise_conv_silu, conv)
    assert torch.autograd.gradcheck(torch.ops.mambavc.norm_gate, (*norm, 1e-5))


def block(x, z, conv_weight, conv_bias, norm_weight, norm_bias):
    x = fused.depthwise_conv_silu(x, conv_weight, conv_bias)
    return fused.norm_gate(x, z, norm_weight, norm_bias)


def block_inputs(dtype):
    x, conv_weight, conv_bias = conv_inputs((1, 3, 4, 32), dtype)
    _, z, norm_weight, norm_bias = norm_inputs((1, 3, 4, 32), dtype)
    inputs = x, z, conv_weight, conv_bias, norm_weight, norm_bias
    return [value.requires_grad_() for value in inputs]


def choose_operators(monkeypatch):
    """Choose as on a CUDA device; the operators run their formulas where there is none."""
    has_kernels = fused._has_kernels
    monkeypatch.delenv("MAMBAVC_SCAN_BACKEND", raising=False)
    monkeypatch.setattr(fused, "_HAS_TRITON", True)
    monkeypatch.setattr(fused, "_has_kernels", lambda device_type: has_kernels("cuda"))


@pytest.mark.parametrize("through_operators", [False, True], ids=["public", "operators"])
def test_compiles_into_one_graph(through_operators, monkeypatch):
    if through_operators:
        choose_operators(monkeypatch)
    inputs = block_inputs(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected, result = block(*inputs), compiled(*inputs)
    assert error(result, expected) < 1e-6
    dout = torch.randn_like(expected)
    expected = torch.autograd.grad(expected, inputs, dout)
    for a, b in zip(torch.autograd.grad(result, inputs, dout), expected, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("through_operators", [False, True], ids=["public", "operators"])
def test_autocast_keeps_map_dtype_and_float32_sums(through_operators, monkeypatch):
    if through_operators:
        choose_operators(monkeypatch)
    inputs = block_inputs(torch.bfloat16)
    plain = block(*inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = block(*inputs)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain)
    gradients = torch.autograd.grad(cast.float().sum(), inputs)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2 + [torch.float32] * 4


def test_flops_are_those_of_the_convolution():
    def count(function):
        inputs = [value.requires_grad_() for value in conv_inputs((2, 3, 5, 32), torch.float32)]
        with FlopCounterMode(display=False) as forward:
            out = function(*inputs)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    counts = count(torch.ops.mambavc.depthwise_conv_silu)
    assert counts == count(conv_reference)
    assert counts[0] == 2 * 9 * 2 * 3 * 5 * 32


def test_environment_variable_turns_kernels_off(monkeypatch):
    monkeypatch.setattr(fused, "_HAS_TRITON", True)
    monkeypatch.delenv("MAMBAVC_SCAN_BACKEND", raising=False)
    assert fused._has_kernels("cuda") and not fused._has_kernels("cpu")
    monkeypatch.setenv("MAMBAVC_SCAN_BACKEND", "reference")
    assert not fused._has_kernels("cuda")


def test_errors_name_what_came():
    x, weight, bias = conv_inputs((1, 2, 2, 32), torch.float32)
    with pytest.raises(ValueError, match=r"expected x .* got \(1, 2, 2, 32\), \(32, 9\)"):
        fused.depthwise_conv_silu(x, weight.reshape(32, 9), bias)
    with pytest.raises(ValueError, match=r"float32.* got torch\.int64"):
        fused.depthwise_conv_silu(x.long(), weight, bias)
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 32\), \(1, 2, 1, 32\)"):
        fused.norm_gate(x, x[:, :, :1], bias, bias)
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float32 and torch\.bfloat16"):
        fused.norm_gate(x, x.bfloat16(), bias, bias)
