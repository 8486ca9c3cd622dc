"""The scan as a PyTorch operator: registration, gradients, compilation, operation counts."""

import functools
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import scan_operator as ops
from kernels import selective_scan_2d
from kernels.scan_reference import ScanInputs

pytest.importorskip("numba", reason="needs Numba")

SIZES = [(2, 3, 5, 12), (2, 3, 5, 4, 9), (4, 12, 3), (4, 12), (48, 3), (48,)]


def make_inputs(dtype=torch.float32, requires_grad=False):
    """x, x_dbl and the parameters of a map with 12 channels, 3 states and rank 3."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        torch.randn(size).to(dtype if i < 2 else parameter).requires_grad_(requires_grad)
        for i, size in enumerate(SIZES)
    ]


def public_inputs(requires_grad=False, height=3, width=5):
    """Arguments of `selective_scan_2d` for the same map."""
    sizes = [(2, height, width, 12), (4, 9, 12), *SIZES[2:]]
    return [torch.randn(size).requires_grad_(requires_grad) for size in sizes]


def fix_A(inputs):
    """Inputs of the operator with its first A."""
    A_logs = torch.arange(1, 4).log().expand(48, 3).contiguous()
    return [*inputs[:4], A_logs, inputs[5]]


@pytest.mark.parametrize("fixed_A", [False, True], ids=["general", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_operators_are_registered_in_full(dtype, fixed_A):
    inputs = fix_A(make_inputs(dtype)) if fixed_A else make_inputs(dtype)
    dy = torch.randn(SIZES[0]).to(dtype)
    # The backward operator has no gradient of its own.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.scan_2d_backward, [dy, *inputs, fixed_A], test_utils=tests)
    for i, value in enumerate(inputs):
        value.requires_grad_(i != ScanInputs._fields.index("A_logs") or not fixed_A)
    torch.library.opcheck(ops.scan_2d, [*inputs, fixed_A])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_operators_that_keep_states_are_registered_in_full():
    inputs = [value.cuda() for value in fix_A(make_inputs())]
    inputs[:2] = torch.randn(2, 2, 16, 12).cuda(), torch.randn(2, 2, 16, 4, 9).cuda()
    y, states = ops.scan_2d_and_states(*inputs)
    assert states.dim() == 5
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = [torch.randn_like(y), *inputs, states]
    torch.library.opcheck(
        torch.ops.mambavc.scan_2d_and_states_backward, arguments, test_utils=tests
    )
    for i, value in enumerate(inputs):
        value.requires_grad_(i != ScanInputs._fields.index("A_logs"))
    torch.library.opcheck(ops.scan_2d_and_states, inputs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_fixed_A_has_no_gradient(backend):
    inputs = public_inputs(requires_grad=True)
    A_logs = torch.arange(1, 4).log().expand(48, 3).clone().requires_grad_()
    y = selective_scan_2d(*inputs[:4], A_logs, inputs[5], fixed_A=True, backend=backend)
    y.sum().backward()
    assert A_logs.grad is None
    assert all(inputs[i].grad.abs().sum() > 0 for i in (0, 1, 2, 3, 5))


def test_results_are_contiguous_whatever_the_inputs():
    contiguous = make_inputs()
    strided = [value.transpose(0, -1).contiguous().transpose(0, -1) for value in contiguous]
    assert not strided[0].is_contiguous()
    dy = torch.randn(SIZES[0])
    torch.library.opcheck(ops.scan_2d, [*strided, False])
    expected = (ops.scan_2d(*contiguous, False), *ops.scan_2d_backward(dy, *contiguous, False))
    results = (ops.scan_2d(*strided, False), *ops.scan_2d_backward(dy, *strided, False))
    assert all(result.is_contiguous() for result in results)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_gradients_pass_gradcheck():
    inputs = make_inputs(torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.scan_2d, [*inputs, False], fast_mode=True)


def test_a_second_derivative_is_refused():
    inputs = make_inputs(requires_grad=True)
    (dx,) = torch.autograd.grad(ops.scan_2d(*inputs, False).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="scan_2d_backward"):
        dx.sum().backward()


def test_only_inputs_are_kept_for_the_backward_pass():
    inputs = make_inputs(requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.scan_2d(*inputs, False)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs}


def value_and_gradients(function, inputs):
    y = function(*inputs)
    inputs = [value for value in inputs if value.requires_grad]
    return y.detach(), *torch.autograd.grad(y.square().sum(), inputs)


def test_compiles_in_one_graph_for_any_picture_size():
    graphs = []

    def count_graphs(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(selective_scan_2d, fullgraph=True, dynamic=True, backend=count_graphs)
    # No side of the first is also another size: the compiler would take them for the same.
    for height, width in ((5, 7), (10, 6), (4, 9)):
        inputs = public_inputs(height=height, width=width)
        assert torch.equal(compiled(*inputs), selective_scan_2d(*inputs))
    assert len(graphs) == 1


@pytest.mark.parametrize("fixed_A", [False, True], ids=["general", "fixed"])
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
        ),
    ],
)
def test_compiled_gradients_are_those_of_eager_mode(backend, fixed_A):
    torch._dynamo.reset()
    inputs = public_inputs(requires_grad=not fixed_A)
    if fixed_A:
        inputs = fix_A(inputs)
        inputs[0].requires_grad_()
    scan = functools.partial(selective_scan_2d, fixed_A=fixed_A)
    compiled = torch.compile(scan, fullgraph=True, backend=backend)
    expected = value_and_gradients(scan, inputs)
    torch.testing.assert_close(value_and_gradients(compiled, inputs), expected)


def test_operation_counts():
    # One pixel, channel, state and rank. Multiply-accumulates of each of 4 directions: delta,
    # h, C h and D x. Others: bias, softplus, delta x, delta A, exponential, times B.
    assert ops.scan_macs(1, 1, 1, 1, 1, 1) == 4 * 4
    assert ops.scan_flops(1, 1, 1, 1, 1, 1) == 4 * (2 * 4 + 6)
    # Everything but the constant part of a state and a rank is proportional.
    assert ops.scan_macs(2, 3, 5, 7, 16, 4) == 2 * 3 * 5 * 7 * 4 * (4 + 2 * 16 + 1)


def test_flop_counter_counts_the_scan():
    inputs = make_inputs(requires_grad=True)
    flops = ops.scan_flops(2, 3, 5, 12, 3, 3)
    with FlopCounterMode(display=False) as counter:
        y = ops.scan_2d(*inputs, False)
    assert counter.get_total_flops() == flops
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * flops
