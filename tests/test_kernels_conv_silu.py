"""SiLU of a depthwise convolution: kernels, operators and the public function.

Without a GPU the Triton kernels run in Triton's interpreter, which is exact but slow: the maps
here are small. The reference is PyTorch's own layer in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from stage_checks import CUDA, DEVICE, check, error, needs_kernels, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from kernels import backends, depthwise_conv_silu

SHAPES = [
    pytest.param((1, 1, 1, 32), id="one-pixel"),
    pytest.param((1, 1, 19, 32), id="one-row-past-a-column-block"),
    pytest.param((1, 7, 1, 64), id="one-column"),
    pytest.param((2, 5, 3, 48), id="batch-and-part-of-a-channel-block"),
    pytest.param((1, 2, 2, 33), id="unaligned-channels"),
    pytest.param((1, 2, 3, 768), id="many-channel-blocks"),
]


def reference(x, weight, bias):
    pre = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1])
    return F.silu(pre).permute(0, 2, 3, 1)


def make_inputs(shape, dtype, device=DEVICE):
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], 1, 3, 3, dtype=parameter, device=device)
    return x, weight, torch.randn(shape[-1], dtype=parameter, device=device)


def check_kernels(shape, dtype):
    from kernels import conv_silu_triton

    inputs = make_inputs(shape, dtype)
    dout = torch.randn_like(inputs[0])
    out = conv_silu_triton.conv_silu_forward(*inputs)
    gradients = conv_silu_triton.conv_silu_backward(dout, *inputs)
    check((out, *gradients), with_gradients(reference, inputs, dout), inputs)


@pytest.fixture(params=["formula", pytest.param("kernels", marks=needs_kernels)])
def way(request, monkeypatch):
    """Both ways to compute it on whatever device there is; on a CPU the kernels are interpreted."""
    runs_kernels = request.param == "kernels"
    monkeypatch.setattr(backends, "runs_stage_kernels", lambda device_type: runs_kernels)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_pytorch(shape):
    check_kernels(shape, torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_kernels_in_other_dtypes(dtype):
    check_kernels((1, 3, 2, 32), dtype)


@needs_kernels
def test_kernels_walk_long_strips(monkeypatch):
    from kernels import conv_silu_triton

    # Few programs make each walk many rows; 37 rows are one full strip and a short one.
    monkeypatch.setattr(conv_silu_triton, "PROGRAMS", 1)
    check_kernels((1, 37, 2, 32), torch.float32)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: only there do programs run in parallel")
def test_kernels_repeat_bit_for_bit():
    inputs = [value.requires_grad_() for value in make_inputs((2, 61, 67, 96), torch.float32)]
    dout = torch.randn_like(inputs[0])
    runs = []
    for _ in range(3):
        out = depthwise_conv_silu(*inputs)
        runs.append((out, *torch.autograd.grad(out, inputs, dout)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_matches_pytorch(way, dtype):
    inputs = [value.requires_grad_() for value in make_inputs((2, 3, 5, 48), dtype)]
    out = depthwise_conv_silu(*inputs)
    dout = torch.randn_like(out)
    assert out.is_contiguous()
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)
    check(results, with_gradients(reference, inputs, dout), inputs)


def test_non_contiguous_maps_and_gradients(way):
    x, weight, bias = make_inputs((1, 4, 6, 32), torch.float32)
    view = x.transpose(1, 2).detach().requires_grad_()
    out = depthwise_conv_silu(view, weight, bias)
    out.sum().backward()  # an expanded gradient, all strides zero
    _, gradients = with_gradients(reference, (view, weight, bias), torch.ones_like(out))
    assert error(view.grad, gradients[0]) < 1e-6


def test_empty_maps(way):
    weight, bias = torch.randn(32, 1, 3, 3, device=DEVICE), torch.randn(32, device=DEVICE)
    empty = torch.empty(0, 3, 3, 32, device=DEVICE)
    assert depthwise_conv_silu(empty, weight, bias).shape == empty.shape


@needs_kernels
def test_operators_pass_opcheck():
    inputs = [value.requires_grad_() for value in make_inputs((2, 3, 4, 32), torch.float32)]
    torch.library.opcheck(torch.ops.mambavc.depthwise_conv_silu.default, inputs)
    inputs = [value.detach() for value in (inputs[0], *inputs)]
    torch.library.opcheck(torch.ops.mambavc.depthwise_conv_silu_backward.default, inputs)


def test_it_compiles_into_one_graph(way):
    inputs = [value.requires_grad_() for value in make_inputs((1, 3, 4, 32), torch.float32)]
    torch._dynamo.reset()
    compiled = torch.compile(depthwise_conv_silu, fullgraph=True, backend="aot_eager")
    expected, result = depthwise_conv_silu(*inputs), compiled(*inputs)
    assert error(result, expected) < 1e-6
    dout = torch.randn_like(expected)
    expected = torch.autograd.grad(expected, inputs, dout)
    for a, b in zip(torch.autograd.grad(result, inputs, dout), expected, strict=True):
        assert error(a, b) < 1e-6


def test_autocast_keeps_the_dtype_of_maps_and_float32_sums(way):
    inputs = [value.requires_grad_() for value in make_inputs((1, 3, 4, 32), torch.bfloat16)]
    plain = depthwise_conv_silu(*inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = depthwise_conv_silu(*inputs)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain)
    gradients = torch.autograd.grad(cast.float().sum(), inputs)
    assert [g.dtype for g in gradients] == [torch.bfloat16] + [torch.float32] * 2


def test_flops_are_those_of_the_convolution(way):
    def count(function):
        inputs = [value.requires_grad_() for value in make_inputs((2, 3, 5, 32), torch.float32)]
        with FlopCounterMode(display=False) as forward:
            out = function(*inputs)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    counts = count(depthwise_conv_silu)
    assert counts == count(reference)
    assert counts[0] == 2 * 9 * 2 * 3 * 5 * 32


def test_errors_name_what_came():
    x, weight, bias = make_inputs((1, 2, 2, 32), torch.float32)
    with pytest.raises(ValueError, match=r"expected x .* got \(1, 2, 2, 32\), \(32, 9\)"):
        depthwise_conv_silu(x, weight.reshape(32, 9), bias)
    with pytest.raises(ValueError, match=r"x must be one of float32.* got torch\.int64"):
        depthwise_conv_silu(x.long(), weight, bias)
