"""The Triton scan and its gradients against the reference in float64.

Without a GPU the kernels run in Triton's interpreter, where a step of the scan takes
milliseconds: the maps here are small and the chunks are made short, so that states still cross
several chunks, subchunks and tiles.
"""

import os

import pytest
import torch

from kernels import scan_reference as reference
from kernels.scan_reference import ScanInputs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA device or TRITON_INTERPRET=1",
)

# What the operator promises, forward and for every gradient.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-2), torch.float16: (2e-2, 2e-2)}
# A float64 scan of a hundred steps loses a few digits of 1e-16.
TOLERANCE[torch.float64] = (1e-13, 1e-13)

# batch, height, width, dim, dstate
SHAPES = [
    pytest.param((1, 1, 1, 32, 16), id="one-pixel"),
    pytest.param((1, 1, 9, 32, 4), id="one-row-one-past-a-chunk"),
    pytest.param((2, 7, 1, 32, 1), id="one-column-one-state-one-short-of-a-chunk"),
    pytest.param((1, 2, 2, 64, 16), id="one-whole-chunk-two-channels-per-thread"),
    pytest.param((3, 1, 2, 40, 8), id="batch-of-three-and-part-of-a-channel-block"),
    pytest.param((1, 3, 5, 33, 3), id="several-subchunks-and-padded-states-and-rank"),
]


@pytest.fixture
def scan(monkeypatch):
    from kernels import scan_triton as triton_scan

    # Chunks of 4 forward; backward two chunks or less, of subchunks of two tiles of 2.
    small = {"SHORTEST_CHUNK": 4, "FORWARD_GROUP": 2, "BACKWARD_PROGRAMS": 2, "ADJOINT_GROUP": 2}
    small |= {"ONE_PASS_GROUP": 2, "SUBCHUNK": 4, "TILE": 2, "CARRY_AHEAD": 2}
    small |= {"STRIP_PROGRAMS": 8, "STRIP_UNIT": 4}
    for name, value in small.items():
        monkeypatch.setattr(triton_scan, name, value)
    return triton_scan


def make_inputs(shape, dtype=torch.float32):
    batch, height, width, dim, dstate = shape
    rank = -(-dim // 32)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size, dtype=parameter):
        return torch.randn(size, device=DEVICE, dtype=torch.float64).to(dtype)

    x = normal(batch, height, width, dim, dtype=dtype)
    x_dbl = normal(batch, height, width, 4, rank + 2 * dstate, dtype=dtype)
    bias = normal(4, dim) - 3  # delta of about 0.05, as after initialisation
    A_logs = torch.arange(1, dstate + 1, device=DEVICE).log() + 0.1 * normal(4 * dim, dstate)
    dt_projs_weight = normal(4, dim, rank) * rank**-0.5
    A_logs = A_logs.to(parameter)
    inputs = ScanInputs(x, x_dbl, dt_projs_weight, bias, A_logs, normal(4 * dim))
    return inputs, normal(batch, height, width, dim, dtype=dtype)


def expected(inputs, dy):
    inputs = ScanInputs(*(value.double().requires_grad_() for value in inputs))
    y = reference.scan_2d(inputs)
    return y.detach(), torch.autograd.grad(y, inputs, dy.double())


def error(result, truth):
    return (result.double() - truth).norm() / truth.norm().clamp_min(1e-30)


def check(scan, inputs, dy):
    y, gradients = expected(inputs, dy)
    forward_tolerance, gradient_tolerance = TOLERANCE[dy.dtype]
    result = scan.scan_2d_forward(inputs)
    assert result.dtype == dy.dtype and result.shape == dy.shape
    assert error(result, y) < forward_tolerance
    results = scan.scan_2d_backward(dy, inputs)
    for name, value, gradient, truth in zip(
        ScanInputs._fields, inputs, results, gradients, strict=True
    ):
        assert gradient.shape == value.shape and gradient.dtype == value.dtype, name
        assert error(gradient, truth) < gradient_tolerance, name


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(scan, shape):
    check(scan, *make_inputs(shape))


def with_fixed_A(inputs):
    A_logs = torch.arange(1, inputs.dstate + 1).to(inputs.A_logs).log()
    return inputs._replace(A_logs=A_logs.expand_as(inputs.A_logs))


def check_forward(scan, shape, dtype=torch.float32):
    """With A as it comes, and where it is promised to be -(1, ..., dstate)."""
    inputs, dy = make_inputs(shape, dtype)
    forward_tolerance, _ = TOLERANCE[dtype]
    y, _ = expected(inputs, dy)
    assert error(scan.scan_2d_forward(inputs), y) < forward_tolerance
    y, _ = expected(with_fixed_A(inputs), dy)
    # The promise is enough: A_logs may then hold anything.
    inputs = inputs._replace(A_logs=torch.full_like(inputs.A_logs, torch.nan))
    assert error(scan.scan_2d_forward(inputs, fixed_A=True), y) < forward_tolerance


def check_fixed_A(scan, inputs, dy, tolerance=None):
    _, gradients = expected(with_fixed_A(inputs), dy)
    inputs = inputs._replace(A_logs=torch.full_like(inputs.A_logs, torch.nan))
    results = scan.scan_2d_backward(dy, inputs, True)
    for name, result, truth in zip(ScanInputs._fields, results, gradients, strict=True):
        if name == "A_logs":
            assert result.shape == (0,)
        else:
            assert error(result, truth) < (tolerance or TOLERANCE[dy.dtype][1]), name


@pytest.mark.parametrize("shape", SHAPES)
def test_fixed_A(scan, shape):
    check_forward(scan, shape)
    check_fixed_A(scan, *make_inputs(shape))


@pytest.mark.parametrize("bias", [-12.0, -3.0, 400.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fixed_A_of_16_bit_maps(scan, monkeypatch, dtype, bias):
    """Delta has 16 bits then, too: of 6e-6, of 0.05 and of 400."""
    monkeypatch.setattr(scan, "SMALL_MAP", 0 if dtype == torch.bfloat16 else 1 << 20)
    inputs, dy = make_inputs((1, 2, 3, 32, 4), dtype)
    check_fixed_A(scan, inputs._replace(dt_projs_bias=inputs.dt_projs_bias + 3 + bias), dy)


def test_16_bits_do_not_add_up_along_a_walk(scan):
    """What is summed along a walk stays in float32: in bfloat16 its errors come to 1 to 2 %."""
    check_fixed_A(scan, *make_inputs((1, 4, 16, 32, 4), torch.bfloat16), tolerance=7e-3)


@pytest.mark.parametrize("one_pass", [False, True], ids=["chunks", "one-pass"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 3, 4, 32, 4), id="chunks-of-one-length"),
        pytest.param((1, 4, 5, 64, 3), id="a-short-chunk-last-or-first"),
        pytest.param((1, 1, 4, 32, 2), id="one-chunk"),
    ],
)
def test_the_forward_pass_keeps_states_for_the_backward_pass(scan, monkeypatch, shape, one_pass):
    monkeypatch.setattr(scan, "ONE_PASS_CHANNELS", 0 if one_pass else 1 << 30)
    inputs, dy = make_inputs(shape)
    y, gradients = expected(with_fixed_A(inputs), dy)
    kept = torch.full(scan.kept_shape(inputs), torch.nan, device=DEVICE)
    assert kept.dim() == 5
    assert error(scan.scan_2d_forward(inputs, True, kept), y) < TOLERANCE[dy.dtype][0]
    results = scan.scan_2d_backward(dy, inputs, True, kept)
    for name, result, truth in zip(ScanInputs._fields, results, gradients, strict=True):
        assert name == "A_logs" or error(result, truth) < TOLERANCE[dy.dtype][1], name
    # The kept states are those that the backward pass finds by itself.
    for result, other in zip(results, scan.scan_2d_backward(dy, inputs, True), strict=True):
        assert error(result, other) < 1e-6 or result.numel() == 0


def test_states_are_kept_only_where_they_are_few(scan, monkeypatch):
    inputs, _ = make_inputs((1, 4, 4, 32, 4))
    assert scan.kept_shape(inputs) == (4, 1, scan.kept_shape(inputs)[2], 4, 32)
    assert scan.kept_shape(ScanInputs(*(value.double() for value in inputs))) == (0,)
    # Orders that are read from behind would have chunks that begin inside of a group of pixels.
    assert scan.kept_shape(make_inputs((1, 3, 3, 32, 4))[0]) == (0,)
    monkeypatch.setattr(scan, "KEPT_BYTES", 0)
    monkeypatch.setattr(scan, "KEPT_SHARE", 1)
    assert scan.kept_shape(inputs) == (0,)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_in_one_pass(scan, monkeypatch, shape):
    """Many channels are scanned without chunks."""
    monkeypatch.setattr(scan, "ONE_PASS_CHANNELS", 0)
    check_forward(scan, shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_in_one_pass(scan, monkeypatch, dtype):
    monkeypatch.setattr(scan, "ONE_PASS_CHANNELS", 0)
    check_forward(scan, (1, 2, 3, 32, 4), dtype)


def test_directions_one_by_one(scan, monkeypatch):
    """Large maps are differentiated one direction after the other, all summed in one buffer."""
    monkeypatch.setattr(scan, "SMALL_MAP", 0)
    check(scan, *make_inputs((2, 1, 9, 32, 4)))
    check(scan, *make_inputs((1, 2, 2, 32, 4), torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(scan, dtype):
    check(scan, *make_inputs((1, 2, 3, 32, 4), dtype))


@pytest.mark.parametrize("bias", [-110.0, -18.0, 40.0])
def test_extreme_delta(scan, bias):
    """Delta of zero, of 1e-8 (its gradients need log1p's accuracy) and so large that all decays."""
    inputs, dy = make_inputs((1, 2, 3, 32, 4))
    inputs = inputs._replace(
        dt_projs_weight=0.1 * inputs.dt_projs_weight,
        dt_projs_bias=torch.full_like(inputs.dt_projs_bias, bias),
    )
    check(scan, inputs, dy)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: the interpreter has no races")
def test_same_bits_each_time():
    from kernels import scan_triton as scan

    inputs, dy = make_inputs((2, 61, 67, 512, 16))
    many, _ = make_inputs((24, 13, 17, 128, 16))  # channels enough for one pass
    assert torch.equal(scan.scan_2d_forward(many), scan.scan_2d_forward(many))
    first = scan.scan_2d_forward(inputs), *scan.scan_2d_backward(dy, inputs)
    for _ in range(5):
        again = scan.scan_2d_forward(inputs), *scan.scan_2d_backward(dy, inputs)
        assert all(map(torch.equal, first, again))


def test_chunks_cover_the_picture_without_the_device():
    from kernels.scan_triton import _chunks

    for length in (1, 31, 32, 33, 98304, 2883584):
        for programs in (1, 4, 32, 4096):
            size, number = _chunks(length, programs, 528, 32)
            assert size % 32 == 0 and (number - 1) * size < length <= number * size


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_large_picture():
    """1024 x 1024: float32 against float64."""
    from kernels import scan_triton as triton_scan

    inputs, dy = make_inputs((1, 1024, 1024, 32, 16))
    whole = triton_scan.scan_2d_forward(inputs)
    double = ScanInputs(*(value.double() for value in inputs))
    assert error(whole, triton_scan.scan_2d_forward(double)) < 1e-5
    results = triton_scan.scan_2d_backward(dy, inputs)
    truths = triton_scan.scan_2d_backward(dy.double(), double)
    for result, truth in zip(results, truths, strict=True):
        assert error(result, truth) < 1e-4
