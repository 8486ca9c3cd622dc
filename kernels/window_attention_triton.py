"""Triton kernels of attention inside square windows of a map, and of its gradients.

A program owns a head of a window, whose pixels it finds in the map wherever shifted windows lie:
nothing is rolled or copied. The backward kernel forms the probabilities again.

Prefixes: `i_` program or loop index, `o_` offsets, `m_` mask, `p_` pointer, `b_` block value. A
token is a pixel of a window, and its logit with another one gets a bias for the way from there to
here. The gradient of these biases is kept per program and added in a fixed order, so that it does
not depend on the order in which programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends import product_precision

GRAD_PROGRAMS = 264  # about two for each of an H100's multiprocessors
WARPS = 4
SUM_ROWS = 16


@triton.jit
def _window(i_window, height, width, SIDE: tl.constexpr, SHIFT: tl.constexpr):
    """Pixels of a window's tokens in a batch of maps, and which pairs may not see each other."""
    columns = width // SIDE
    rows = height // SIDE
    i_column = i_window % columns
    i_row = i_window // columns % rows
    o_t = tl.arange(0, SIDE * SIDE)
    o_row = i_row * SIDE + o_t // SIDE + SHIFT
    o_column = i_column * SIDE + o_t % SIDE + SHIFT
    o_row = tl.where(o_row >= height, o_row - height, o_row)
    o_column = tl.where(o_column >= width, o_column - width, o_column)
    o_pixel = (i_window // columns // rows * height + o_row).to(tl.int64) * width + o_column
    # The last windows of a shifted grid wrap around the map's end.
    o_region = tl.where((i_row == rows - 1) & (o_t // SIDE >= SIDE - SHIFT), 2, 0)
    o_region += tl.where((i_column == columns - 1) & (o_t % SIDE >= SIDE - SHIFT), 1, 0)
    return o_pixel, o_region[:, None] != o_region[None, :]


@triton.jit
def _ways(SIDE: tl.constexpr):
    """For each pair of tokens, the entry of a head's (2 SIDE - 1, 2 SIDE - 1) biases."""
    o_t = tl.arange(0, SIDE * SIDE)
    o_row = (o_t // SIDE)[:, None] - (o_t // SIDE)[None, :] + (SIDE - 1)
    o_column = (o_t % SIDE)[:, None] - (o_t % SIDE)[None, :] + (SIDE - 1)
    return o_row * (2 * SIDE - 1) + o_column


@triton.jit
def _load_qkv(qkv, o_pixel, i_head, heads, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """q, k and v of a head, (tokens, BLOCK_D) each; offsets and mask of q."""
    o_d = tl.arange(0, BLOCK_D)
    o_q = o_pixel[:, None] * (3 * heads * DIM) + i_head * DIM + o_d[None, :]
    m_q = (o_pixel >= 0)[:, None] & (o_d < DIM)[None, :]
    b_q = tl.load(qkv + o_q, mask=m_q, other=0.0)
    b_k = tl.load(qkv + o_q + heads * DIM, mask=m_q, other=0.0)
    b_v = tl.load(qkv + o_q + 2 * heads * DIM, mask=m_q, other=0.0)
    return b_q, b_k, b_v, o_q, m_q


@triton.jit
def _probabilities(b_q, b_k, b_bias, m_hidden, SCALE: tl.constexpr, PRODUCTS: tl.constexpr):
    b_logit = tl.dot(b_q, tl.trans(b_k), input_precision=PRODUCTS, out_dtype=b_bias.dtype)
    b_logit = b_logit * SCALE + b_bias
    b_logit = tl.where(m_hidden, float("-inf"), b_logit)
    b_p = tl.exp(b_logit - tl.max(b_logit, 1)[:, None])
    return b_p / tl.sum(b_p, 1)[:, None]


@triton.jit(do_not_specialize=["height", "width"])
def _window_attention_kernel(
    qkv,  # (batch, height, width, 3, heads, DIM)
    position,  # (heads, ways)
    out,  # (batch, height, width, heads, DIM)
    height,
    width,
    heads,
    SIDE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    PRODUCTS: tl.constexpr,  # see `product_precision`
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    WAYS: tl.constexpr = (2 * SIDE - 1) * (2 * SIDE - 1)
    i_head = tl.program_id(1)
    ACC: tl.constexpr = tl.float64 if qkv.dtype.element_ty == tl.float64 else tl.float32
    o_way = _ways(SIDE)
    b_bias = tl.load(position + i_head * WAYS + o_way).to(ACC)
    o_pixel, m_hidden = _window(tl.program_id(0), height, width, SIDE, SHIFT)
    b_q, b_k, b_v, _, m_q = _load_qkv(qkv, o_pixel, i_head, heads, DIM, BLOCK_D)
    b_p = _probabilities(b_q, b_k, b_bias, m_hidden, SCALE, PRODUCTS)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRODUCTS, out_dtype=ACC)
    o_out = o_pixel[:, None] * (heads * DIM) + i_head * DIM + tl.arange(0, BLOCK_D)[None, :]
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=["windows", "height", "width"])
def _window_attention_grad_kernel(
    dout,  # (batch, height, width, heads, DIM)
    qkv,  # (batch, height, width, 3, heads, DIM)
    position,  # (heads, ways)
    dqkv,  # like qkv, out
    partial,  # (programs, heads, ways, tokens), out: gradients by logits of those tokens
    windows,
    height,
    width,
    heads,
    SIDE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    PRODUCTS: tl.constexpr,  # see `product_precision`
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    TOKENS: tl.constexpr = SIDE * SIDE
    WAYS: tl.constexpr = (2 * SIDE - 1) * (2 * SIDE - 1)
    i_head = tl.program_id(1)
    o_way = _ways(SIDE)
    b_bias = tl.load(position + i_head * WAYS + o_way).to(tl.float32)
    b_dbias = tl.zeros([TOKENS, TOKENS], tl.float32)
    for i_window in range(tl.program_id(0), windows, tl.num_programs(0)):
        o_pixel, m_hidden = _window(i_window, height, width, SIDE, SHIFT)
        b_q, b_k, b_v, o_q, m_q = _load_qkv(qkv, o_pixel, i_head, heads, DIM, BLOCK_D)
        o_out = o_pixel[:, None] * (heads * DIM) + i_head * DIM + tl.arange(0, BLOCK_D)[None, :]
        b_dout = tl.load(dout + o_out, mask=m_q, other=0.0)
        b_p = _probabilities(b_q, b_k, b_bias, m_hidden, SCALE, PRODUCTS)
        b_dv = tl.dot(tl.trans(b_p.to(b_v.dtype)), b_dout, input_precision=PRODUCTS)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRODUCTS)
        b_dlogit = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
        b_dbias += b_dlogit
        b_dlogit = (b_dlogit * SCALE).to(b_q.dtype)
        b_dq = tl.dot(b_dlogit, b_k, input_precision=PRODUCTS)
        b_dk = tl.dot(tl.trans(b_dlogit), b_q, input_precision=PRODUCTS)
        tl.store(dqkv + o_q, b_dq.to(dqkv.dtype.element_ty), mask=m_q)
        tl.store(dqkv + o_q + heads * DIM, b_dk.to(dqkv.dtype.element_ty), mask=m_q)
        tl.store(dqkv + o_q + 2 * heads * DIM, b_dv.to(dqkv.dtype.element_ty), mask=m_q)
    i_part = tl.program_id(0).to(tl.int64) * heads + i_head
    # One way is that of as many pairs as tokens at most, of one pair for each query.
    o_slot = o_way * TOKENS + tl.arange(0, TOKENS)[:, None]
    tl.store(partial + i_part * (WAYS * TOKENS) + o_slot, b_dbias)


@triton.jit(do_not_specialize=["programs"])
def _position_grad_kernel(
    partial,  # (programs, heads, ways, tokens)
    dposition,  # (heads, ways), out
    programs,
    SIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The sum over the pairs of one way, of which only those that exist have been written."""
    i_way = tl.program_id(0)
    i_sum = tl.program_id(1) * tl.num_programs(0) + i_way
    stride = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * (SIDE * SIDE)
    o_t = tl.arange(0, SIDE * SIDE)
    o_row = o_t // SIDE - (i_way // (2 * SIDE - 1) - (SIDE - 1))
    o_column = o_t % SIDE - (i_way % (2 * SIDE - 1) - (SIDE - 1))
    m_t = (o_row >= 0) & (o_row < SIDE) & (o_column >= 0) & (o_column < SIDE)
    o_r = tl.arange(0, BLOCK_R)
    p_parts = partial + i_sum * (SIDE * SIDE) + o_r[:, None] * stride + o_t[None, :]
    b_sum = tl.zeros([BLOCK_R, SIDE * SIDE], tl.float32)
    for i in range(0, programs, BLOCK_R):
        m_parts = (i + o_r < programs)[:, None] & m_t[None, :]
        b_sum += tl.load(p_parts + i * stride, mask=m_parts, other=0.0)
    b_dposition = tl.sum(tl.sum(b_sum, 1), 0)
    tl.store(dposition + i_sum, b_dposition.to(dposition.dtype.element_ty))


def _launch_arguments(qkv: Tensor, position: Tensor, shift: int):
    batch, height, width, channels = qkv.shape
    heads, ways, _ = position.shape
    side = (ways + 1) // 2
    dim = channels // (3 * heads)
    windows = batch * (height // side) * (width // side)
    constants = {
        "SIDE": side,
        "SHIFT": shift,
        "SCALE": dim**-0.5,
        "PRODUCTS": product_precision(qkv.dtype),
        "DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "num_warps": WARPS,
    }
    return windows, heads, constants


def window_attention_forward(qkv: Tensor, position: Tensor, shift: int) -> Tensor:
    """See `kernels.window_attention`; all inputs contiguous."""
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    windows, heads, constants = _launch_arguments(qkv, position, shift)
    with torch.cuda.device_of(qkv):
        _window_attention_kernel[(windows, heads)](
            qkv, position, out, height, width, heads, **constants
        )
    return out


def window_attention_backward(
    dout: Tensor, qkv: Tensor, position: Tensor, shift: int
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and position; all inputs contiguous."""
    _, height, width, _ = qkv.shape
    windows, heads, constants = _launch_arguments(qkv, position, shift)
    programs = min(windows, max(1, GRAD_PROGRAMS // heads))
    dqkv, dposition = torch.empty_like(qkv), torch.empty_like(position)
    ways = dposition[0].numel()
    tokens = constants["SIDE"] ** 2
    partial = torch.empty(programs, heads, ways, tokens, dtype=torch.float32, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _window_attention_grad_kernel[(programs, heads)](
            dout, qkv, position, dqkv, partial, windows, height, width, heads, **constants
        )
        _position_grad_kernel[(ways, heads)](
            partial, dposition, programs, SIDE=constants["SIDE"], BLOCK_R=SUM_ROWS, num_warps=WARPS
        )
    return dqkv, dposition
