"""Triton kernels of convolutions with kernels of 1x1 or 3x3, channels last, and their gradients.

Maps of a few pixels give a GPU so little work that each launch costs more than what it does. So
bias, activation, sum with another map and, backward, the activation's gradient are part of the
products, and in half precision the gradients of a weight and of its bias are one kernel.

Prefixes: `i_` program or loop index, `o_` offsets, `m_` mask, `p_` pointer, `b_` block value. A tap
is one of the pixels that a kernel covers. No sum depends on the order in which programs run.
"""

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends import product_precision
from kernels.sum_triton import sum_parts

PROGRAMS = 128  # blocks are made small enough for as many, about one for each multiprocessor
# Pixels, output channels and, at a time, input channels of a program, and how many of the latter
# are on their way at once, by the bytes of a number: a multiprocessor has shared memory for several
# programs. The first of which there are enough programs, or the last.
BLOCKS = {
    2: [(64, 128, 64, 3), (64, 64, 64, 4), (32, 32, 64, 4)],
    4: [(64, 128, 32, 4), (64, 64, 32, 4), (32, 32, 32, 4)],
    8: [(32, 32, 32, 4)],
}
# Output channels, input channels and, at a time, pixels of a program of the gradient by a weight.
GRAD_BLOCK = 32, 32, 64
GRAD_PROGRAMS = 264  # wanted
GRAD_PIXELS = 256  # fewest pixels of such a program,
GRAD_UNIT = 64  # and what their number is a multiple of
GRAD_STAGES = 4
WARPS = 4


@triton.jit
def _gelu(b_x):
    return 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))


@triton.jit
def _gelu_slope(b_x):
    b_density = tl.exp(-0.5 * b_x * b_x) * 0.3989422804014327
    return 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476)) + b_x * b_density


@triton.jit
def _taps_pixels(o_p, m_p, tap, height, width, SIDE: tl.constexpr):
    """The pixels that a tap reads for pixels o_p of a batch, and which of them exist."""
    row = tap // SIDE - SIDE // 2
    column = tap % SIDE - SIDE // 2
    o_row = o_p // width % height + row
    o_column = o_p % width + column
    m_row = (o_row >= 0) & (o_row < height)
    m_tap = m_p & m_row & (o_column >= 0) & (o_column < width)
    return o_p + row * width + column, m_tap


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def _chain_kernel(
    x,  # (pixels, in_channels)
    weight,  # with strides of output channel, input channel and tap
    bias,  # (channels,) or None
    residual,  # (pixels, channels) or None: added before the activation
    gate,  # (pixels, channels): GELU's argument, written unless None; of gradients read
    out,  # (pixels, channels)
    sums,  # (blocks of pixels, channels), out, of `out` over a block; or None
    pixels,
    height,
    width,
    in_channels,
    channels,
    stride_out,
    stride_in,
    stride_tap,
    stride_sums,
    SIDE: tl.constexpr,
    MIRRORED: tl.constexpr,  # as the gradient by a map needs it
    ACTIVATION: tl.constexpr,
    PRODUCTS: tl.constexpr,  # see `product_precision`
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    n_c = tl.cdiv(channels, BLOCK_C)
    o_p = tl.program_id(0) // n_c * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_p = o_p < pixels
    m_c = o_c < channels
    n_in = tl.cdiv(in_channels, BLOCK_IN)
    ACC: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    b_out = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i in range(SIDE * SIDE * n_in):
        tap = i // n_in
        o_in = i % n_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
        m_in = o_in < in_channels
        o_from, m_from = _taps_pixels(o_p, m_p, tap, height, width, SIDE)
        p_x = x + o_from.to(tl.int64)[:, None] * in_channels + o_in[None, :]
        b_x = tl.load(p_x, mask=m_from[:, None] & m_in[None, :], other=0.0)
        if MIRRORED:
            tap = SIDE * SIDE - 1 - tap
        p_w = weight + tap * stride_tap + o_in[:, None] * stride_in + o_c[None, :] * stride_out
        b_w = tl.load(p_w, mask=m_in[:, None] & m_c[None, :], other=0.0)
        b_out = tl.dot(b_x, b_w, b_out, input_precision=PRODUCTS, out_dtype=ACC)
    o_out = o_p.to(tl.int64)[:, None] * channels + o_c[None, :]
    m_out = m_p[:, None] & m_c[None, :]
    if bias is not None:
        b_out += tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    if residual is not None:
        b_out += tl.load(residual + o_out, mask=m_out, other=0.0).to(ACC)
    if ACTIVATION == "relu":
        b_out = tl.where(b_out < 0.0, 0.0, b_out)  # what is not a number stays so
    elif ACTIVATION == "gelu":
        if gate is not None:
            tl.store(gate + o_out, b_out.to(gate.dtype.element_ty), mask=m_out)
        b_out = _gelu(b_out)
    elif ACTIVATION == "relu gradient":
        b_out = tl.where(tl.load(gate + o_out, mask=m_out, other=0.0) > 0.0, b_out, 0.0)
    elif ACTIVATION == "gelu gradient":
        b_out *= _gelu_slope(tl.load(gate + o_out, mask=m_out, other=0.0).to(ACC))
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_out)
    if sums is not None:
        p_sums = sums + tl.program_id(0) // n_c * stride_sums + o_c
        tl.store(p_sums, tl.sum(tl.where(m_p[:, None], b_out, 0.0), 0), mask=m_c)


@triton.jit(do_not_specialize=["pixels", "height", "width", "share"])
def _chain_grad_kernel(
    dout,  # (pixels, channels)
    x,  # (pixels, in_channels)
    dweight,  # (splits, row), out: from here on (channels, taps, in_channels)
    dbias,  # (splits, row), out: from here on (channels,)
    row,
    pixels,
    height,
    width,
    in_channels,
    channels,
    share,  # pixels of a split
    SIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n_in = tl.cdiv(in_channels, BLOCK_IN)
    i_tile = tl.program_id(0)
    i_in = i_tile % n_in
    tap = i_tile // n_in % (SIDE * SIDE)
    o_c = i_tile // n_in // (SIDE * SIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_in = i_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    m_c = o_c < channels
    m_in = o_in < in_channels
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, pixels)
    b_dweight = tl.zeros([BLOCK_C, BLOCK_IN], tl.float32)
    b_dbias = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = o_p < last
        p_dout = dout + o_p.to(tl.int64)[:, None] * channels + o_c[None, :]
        b_dout = tl.load(p_dout, mask=m_p[:, None] & m_c[None, :], other=0.0)
        o_from, m_from = _taps_pixels(o_p, m_p, tap, height, width, SIDE)
        p_x = x + o_from.to(tl.int64)[:, None] * in_channels + o_in[None, :]
        b_x = tl.load(p_x, mask=m_from[:, None] & m_in[None, :], other=0.0)
        b_dweight = tl.dot(tl.trans(b_dout), b_x, b_dweight)
        b_dbias += b_dout.to(tl.float32)
    o_split = tl.program_id(1).to(tl.int64) * row
    p_dweight = dweight + o_split + (o_c[:, None] * (SIDE * SIDE) + tap) * in_channels
    tl.store(
        p_dweight + o_in[None, :],
        b_dweight.to(dweight.dtype.element_ty),
        mask=m_c[:, None] & m_in[None, :],
    )
    if (tap == 0) & (i_in == 0):
        tl.store(dbias + o_split + o_c, tl.sum(b_dbias, 0).to(dbias.dtype.element_ty), mask=m_c)


def _convolve(
    x: Tensor,
    weight: Tensor,
    channels: int,
    side: int,
    strides: tuple[int, int, int],
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    sums: Tensor | None = None,
    activation: str | None = None,
    mirrored: bool = False,
) -> Tensor:
    batch, height, width, in_channels = x.shape
    out = x.new_empty(batch, height, width, channels)
    pixels = batch * height * width
    for block_p, block_c, block_in, stages in BLOCKS[x.element_size()]:
        block_c = min(block_c, max(16, triton.next_power_of_2(channels)))
        block_in = min(block_in, max(16, triton.next_power_of_2(in_channels)))
        programs = triton.cdiv(pixels, block_p) * triton.cdiv(channels, block_c)
        block = {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_IN": block_in, "num_stages": stages}
        if programs >= PROGRAMS:
            break
    with torch.cuda.device_of(x):
        _chain_kernel[(programs,)](
            x, weight, bias, residual, gate, out, sums, pixels, height, width, in_channels,
            channels, *strides, 0 if sums is None else sums.stride(0), SIDE=side,
            MIRRORED=mirrored, ACTIVATION=activation, PRODUCTS=product_precision(x.dtype),
            num_warps=WARPS, **block,
        )  # fmt: skip
    return out


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """activation(convolution of x + residual), and what the activation's gradient is made from.

    Args:
        x: (batch, height, width, in_channels), contiguous.
        weight: (channels, in_channels, side, side), contiguous as channels last.
        activation: ``relu``, ``gelu`` or None.
        residual: (batch, height, width, channels) or None.
    """
    channels, in_channels, side, _ = weight.shape
    strides = side * side * in_channels, 1, in_channels
    has_gate = activation == "gelu" and x.dtype != torch.float64  # which has no gradients
    gate = x.new_empty(*x.shape[:3], channels) if has_gate else None
    out = _convolve(
        x, weight, channels, side, strides,
        bias=bias, residual=residual, gate=gate, activation=activation,
    )  # fmt: skip
    return out, out if activation == "relu" else gate


def _backward_map(
    dout: Tensor,
    weight: Tensor,
    activation: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
    sums: Tensor | None,
) -> Tensor:
    """The gradient by the map of a convolution, or by what an activation made that map from.

    Args:
        dout: gradient by what the convolution makes, before its own activation.
        activation, gate: of the map, see `conv_forward`; None for the gradient by the map.
        residual: another gradient by the map, or None.
        sums: (blocks of pixels, in_channels), where what blocks of the result add up to is put; the
            rest of it stays as it was. Or None.
    """
    channels, in_channels, side, _ = weight.shape
    strides = 1, side * side * in_channels, in_channels
    if weight.dtype == torch.float32:
        # The units that multiply TF32 read both factors along the channels that are summed over.
        weight = weight.permute(1, 2, 3, 0).contiguous()
        strides = side * side * channels, 1, channels
    return _convolve(
        dout, weight, in_channels, side, strides,
        residual=residual, gate=gate, sums=sums,
        activation=activation and f"{activation} gradient", mirrored=True,
    )  # fmt: skip


def _tiles(weight: Tensor) -> int:
    """Programs that make the gradient by a weight, for each of the shares of pixels."""
    channels, in_channels, side, _ = weight.shape
    return triton.cdiv(channels, GRAD_BLOCK[0]) * triton.cdiv(in_channels, GRAD_BLOCK[1]) * side**2


def _library_gradient(dout: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient by the weight of a convolution, of the gradient by its result and its map."""
    pixels, side = dout.flatten(0, 2), weight.shape[-1]
    if side == 1:
        dweight = (pixels.mT @ x.flatten(0, 2))[:, :, None, None]
    else:
        images = (each.permute(0, 3, 1, 2) for each in (dout, x))
        # Chains promise the same bits every time. The library's own context would set other flags.
        deterministic = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = True
        try:
            _, dweight, _ = torch.ops.aten.convolution_backward(
                *images, weight, None, [1, 1], [side // 2] * 2, [1, 1], False, [0, 0], 1,
                [False, True, False],
            )  # fmt: skip
        finally:
            torch.backends.cudnn.deterministic = deterministic
    return dweight


def chain_backward(
    dout: Tensor,
    maps: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    activations: Sequence[str | None],
    skips: Mapping[int, int],
    wants_dx: bool,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """The gradients by a chain's map, or None, and by the weight and bias of each layer.

    Args:
        dout: gradient by what the last layer makes before its activation, contiguous.
        maps, gates: of each layer, its map, and what `conv_forward` returned for the gradient of
            its activation.
        weights, activations, skips: see `kernels.conv_chain`.
        wants_dx: whether the gradient by the map is asked for.
    """
    last = len(maps) - 1
    sums, parts = None, [None] * last
    if dout.dtype == torch.float32 and last:
        # Of these the gradients by all biases but the last are made.
        channels = [len(weight) for weight in weights[:-1]]
        blocks = triton.cdiv(dout.shape[:3].numel(), min(block[0] for block in BLOCKS[4]))
        sums = dout.new_zeros(blocks, sum(channels))
        parts = sums.split(channels, dim=1)
    # By what each layer makes, before its activation; a map that is skipped to gets both.
    douts = {last: dout}
    added = {skipped: i for i, skipped in skips.items()}
    for i in reversed(range(last)):
        other = douts.get(added.get(i + 1))
        douts[i] = _backward_map(
            douts[i + 1], weights[i + 1], activations[i], gates[i], other, parts[i]
        )
    dx = None
    if wants_dx:
        dx = _backward_map(douts[0], weights[0], None, None, douts.get(added.get(0)), None)
    pairs = [(douts[i], each) for i, each in enumerate(maps)]
    if dout.dtype == torch.float32:
        return dx, _parameters_in_float32(pairs, weights, sums)
    return dx, _parameters_in_half_precision(pairs, weights)


def _parameters_in_float32(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], sums: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Gradients by weights and biases.

    Args:
        pairs: of each layer, the gradient by its result and its map.
        weights: of each.
        sums: (blocks of pixels, channels of all layers but the last), unless there is but one.
    """
    # Both factors of the products lie along what is not summed over, and would have to be turned
    # for the units that multiply TF32: libraries do that better.
    dweights = [_library_gradient(*pair, w) for pair, w in zip(pairs, weights, strict=True)]
    dbiases = [_sum_of_pixels(pairs[-1][0].flatten(0, 2))]
    if sums is not None:
        total = sums.new_empty(sums.shape[1])
        sum_parts(sums[None], total)
        dbiases = [*total.split([len(weight) for weight in weights[:-1]]), *dbiases]
    return [*zip(dweights, dbiases, strict=True)]


def _sum_of_pixels(x: Tensor) -> Tensor:
    """(pixels, channels), summed over pixels: in two steps, where one has too few programs."""
    share = 256
    if len(x) % share or len(x) == share:
        return x.sum(0)
    parts = x.new_empty(len(x) // share, x.shape[1])
    sum_parts(x.view(len(parts), share, -1), parts)
    total = x.new_empty(x.shape[1])
    sum_parts(parts[None], total)
    return total


def _parameters_in_half_precision(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The same as `_parameters_in_float32`, in the dtype of the weights."""
    batch, height, width, _ = pairs[0][0].shape
    pixels = batch * height * width
    # Where a weight makes few programs, its pixels are shared by several, which are added up.
    fewest = min(map(_tiles, weights))
    splits = max(1, min(GRAD_PROGRAMS // fewest, pixels // GRAD_PIXELS))
    share = triton.cdiv(triton.cdiv(pixels, splits), GRAD_UNIT) * GRAD_UNIT
    splits = triton.cdiv(pixels, share)
    sizes = [size for w in weights for size in (w.numel(), len(w))]
    row = sum(sizes)
    dtype = weights[0].dtype if splits == 1 else torch.float32
    sums = weights[0].new_empty(splits, row, dtype=dtype)
    parts = sums.split(sizes, dim=1)
    for i, ((dout, x), weight) in enumerate(zip(pairs, weights, strict=True)):
        with torch.cuda.device_of(x):
            _chain_grad_kernel[(_tiles(weight), splits)](
                dout, x, parts[2 * i], parts[2 * i + 1], row, pixels, height, width,
                weight.shape[1], weight.shape[0], share, SIDE=weight.shape[-1],
                BLOCK_C=GRAD_BLOCK[0], BLOCK_IN=GRAD_BLOCK[1], BLOCK_P=GRAD_BLOCK[2],
                num_warps=WARPS, num_stages=GRAD_STAGES,
            )  # fmt: skip
    total = sums[0]
    if splits > 1:
        total = weights[0].new_empty(row)
        sum_parts(sums[None], total)
    parts = total.split(sizes)
    return [
        (parts[2 * i].view(len(w), *w.shape[2:], w.shape[1]).permute(0, 3, 1, 2), parts[2 * i + 1])
        for i, w in enumerate(weights)
    ]
