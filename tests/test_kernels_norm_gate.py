"""LayerNorm times a gate: kernels, operators and the public function.

Without a GPU the Triton kernels run in Triton's interpreter, which is exact but slow: the maps
here are small. The reference is PyTorch's own layer in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from stage_checks import CUDA, DEVICE, check, error, needs_kernels, with_gradients

from kernels import backends, fork_layer_norm, layer_norm, norm_gate

SHAPES = [
    pytest.param((1, 1, 1, 32), id="one-row-of-a-tile"),
    pytest.param((3, 7, 48), id="dim-not-a-power-of-two"),
    pytest.param((5, 512), id="one-row-per-tile"),
    pytest.param((3, 768), id="two-warps"),
    pytest.param((37, 33), id="unaligned-and-several-tiles"),
]


def reference(y, z, weight, bias, eps=1e-5):
    return F.layer_norm(y, weight.shape, weight, bias, eps) * F.silu(z)


def make_inputs(shape, dtype, device=DEVICE):
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    y = 3 + torch.randn(shape, dtype=dtype, device=device)  # a mean that must be taken away
    z = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=parameter, device=device)
    return y, z, weight, torch.randn(shape[-1], dtype=parameter, device=device)


def check_kernels(shape, dtype):
    from kernels import norm_gate_triton

    inputs = make_inputs(shape, dtype)
    dout = torch.randn_like(inputs[0])
    out = norm_gate_triton.norm_gate_forward(*inputs, 1e-5)
    gradients = norm_gate_triton.norm_gate_backward(dout, *inputs, 1e-5)
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
    check_kernels((3, 64), dtype)


@needs_kernels
def test_kernels_loop_over_tiles(monkeypatch):
    from kernels import norm_gate_triton

    monkeypatch.setattr(norm_gate_triton, "PROGRAMS", 2)
    monkeypatch.setattr(norm_gate_triton, "GRAD_PROGRAMS", 2)
    check_kernels((7, 512), torch.float32)


@needs_kernels
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, interpreted
def test_saturated_gates_stay_finite():
    from kernels import norm_gate_triton

    y, z, weight, bias = make_inputs((4, 32), torch.float32)
    z = 200 * torch.sign(z)  # exp(-z) overflows float32
    dout = torch.randn_like(y)
    out = norm_gate_triton.norm_gate_forward(y, z, weight, bias, 1e-5)
    gradients = norm_gate_triton.norm_gate_backward(dout, y, z, weight, bias, 1e-5)
    expected = with_gradients(reference, (y, z, weight, bias), dout)
    check((out, *gradients), expected, (y, z, weight, bias))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: only there do programs run in parallel")
def test_kernels_repeat_bit_for_bit():
    inputs = [value.requires_grad_() for value in make_inputs((4099, 384), torch.float32)]
    dout = torch.randn_like(inputs[0])
    runs = []
    for _ in range(3):
        out = norm_gate(*inputs)
        runs.append((out, *torch.autograd.grad(out, inputs, dout)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_matches_pytorch(way, dtype):
    inputs = [value.requires_grad_() for value in make_inputs((2, 5, 7, 48), dtype)]
    out = norm_gate(*inputs)
    dout = torch.randn_like(out)
    assert out.is_contiguous()
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)
    check(results, with_gradients(reference, inputs, dout), inputs)


def test_non_contiguous_maps_and_gradients(way):
    y, z, weight, bias = make_inputs((4, 6, 32), torch.float32)
    view = y.transpose(0, 1).detach().requires_grad_()
    out = norm_gate(view, z.transpose(0, 1), weight, bias)
    out.sum().backward()
    inputs = view, z.transpose(0, 1), weight, bias
    _, gradients = with_gradients(reference, inputs, torch.ones_like(out))
    # One gradient for a whole row nearly cancels in the projections of LayerNorm.
    assert error(view.grad, gradients[0]) < 1e-5


def test_empty_maps(way):
    empty, bias = torch.empty(0, 3, 3, 32, device=DEVICE), torch.randn(32, device=DEVICE)
    assert norm_gate(empty, empty, bias, bias).shape == empty.shape


def test_it_leaves_its_inputs_alone(way):
    inputs = make_inputs((3, 32), torch.float32)
    before = [value.clone() for value in inputs]
    norm_gate(*inputs)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_norm_without_a_gate(way, dtype):
    x, _, weight, bias = make_inputs((37, 33), dtype)
    inputs = [value.requires_grad_() for value in (x, weight, bias)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = layer_norm(*inputs)
    dout = torch.randn_like(out)
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)
    expected = with_gradients(lambda x, w, b: F.layer_norm(x, w.shape, w, b), inputs, dout)
    # What follows a float32 map in autocast takes it in half precision.
    check(results, expected, inputs, torch.bfloat16 if dtype == torch.float32 else dtype)
    assert layer_norm(x[:0], weight, bias).shape == (0, 33)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_fork_adds_both_gradients(way, dtype, autocast, tf32):
    x, _, weight, bias = make_inputs((37, 33), dtype)
    inputs = [value.requires_grad_() for value in (x, weight, bias)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        same, norm = fork_layer_norm(*inputs)
    assert torch.equal(same, x)
    assert norm.dtype == (torch.bfloat16 if autocast else dtype)
    out = torch.cat((same, norm))
    dout = torch.randn_like(out).to(norm.dtype).to(out.dtype)
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)

    def reference(x, weight, bias):
        return torch.cat((x, F.layer_norm(x, weight.shape, weight, bias)))

    rounded = results[0].to(norm.dtype), *results[1:]  # the norm may be of less precision than x
    check(rounded, with_gradients(reference, inputs, dout), inputs, norm.dtype)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_norm_in_float32_is_fused_where_products_may_be_tf32(way, tf32, precision):
    torch.set_float32_matmul_precision(precision)
    x, _, weight, bias = make_inputs((37, 33), torch.float32)
    with torch.profiler.profile() as profile:
        layer_norm(x, weight, bias)
    names = {event.key for event in profile.key_averages()}
    runs_kernels = backends.runs_stage_kernels(DEVICE)
    assert ("mambavc::layer_norm" in names) == (precision == "high" and runs_kernels)


@needs_kernels
def test_operators_pass_opcheck():
    inputs = [value.requires_grad_() for value in make_inputs((2, 3, 32), torch.float32)]
    torch.library.opcheck(torch.ops.mambavc.norm_gate.default, (*inputs, 1e-5))
    inputs = [value.detach() for value in (inputs[0], *inputs)]
    torch.library.opcheck(torch.ops.mambavc.norm_gate_backward.default, (*inputs, 1e-5))
    del inputs[2]  # z
    others = 1e-5, torch.float32
    torch.library.opcheck(torch.ops.mambavc.layer_norm_backward.default, (*inputs, *others))
    inputs = [value.requires_grad_() for value in inputs[1:]]
    torch.library.opcheck(torch.ops.mambavc.layer_norm.default, (*inputs, *others))


def test_it_compiles_into_one_graph(way):
    inputs = [value.requires_grad_() for value in make_inputs((1, 3, 4, 32), torch.float32)]
    torch._dynamo.reset()
    compiled = torch.compile(norm_gate, fullgraph=True, backend="aot_eager")
    expected, result = norm_gate(*inputs), compiled(*inputs)
    assert error(result, expected) < 1e-6
    dout = torch.randn_like(expected)
    expected = torch.autograd.grad(expected, inputs, dout)
    for a, b in zip(torch.autograd.grad(result, inputs, dout), expected, strict=True):
        assert error(a, b) < 1e-6


def test_autocast_keeps_the_dtype_of_maps_and_float32_sums(way):
    inputs = [value.requires_grad_() for value in make_inputs((1, 3, 4, 32), torch.bfloat16)]
    plain = norm_gate(*inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = norm_gate(*inputs)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain)
    gradients = torch.autograd.grad(cast.float().sum(), inputs)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_errors_name_what_came():
    x, _, _, bias = make_inputs((1, 2, 2, 32), torch.float32)
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 32\), \(1, 2, 1, 32\)"):
        norm_gate(x, x[:, :, :1], bias, bias)
    with pytest.raises(ValueError, match=r"y must be one of float32.* got torch\.int64"):
        norm_gate(x.long(), x.long(), bias, bias)
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float32 and torch\.bfloat16"):
        norm_gate(x, x.bfloat16(), bias, bias)
