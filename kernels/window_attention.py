"""Attention inside square, perhaps shifted, windows of a map, as one operator."""

from torch import Tensor

from kernels import backends
from kernels.operators import make_differentiable, operator


def fuses_window_attention(x: Tensor, window_size: int) -> bool:
    """Whether `window_attention` is for this map: of whole windows, in a precision that fuses.

    Args:
        x: (batch, height, width, dim).
    """
    height, width = x.shape[1:3]
    return (
        window_size in (4, 8)  # 16 and 64 pixels, sizes that a GPU's matrix products have
        and height % window_size == width % window_size == 0
        and x.numel() > 0
        and backends.fused_precision(x) is not None
    )


def window_attention(qkv: Tensor, position: Tensor, shift: int) -> Tensor:
    """Multi-head self-attention of the pixels of each window.

    Logits are divided by the root of a head's width. Softmax is float32, or float64; the factors of
    float32 products are rounded to TF32 where PyTorch's settings allow it. But for float64 it is
    differentiable once in both tensors. The same input gives the same bits every time.

    Args:
        qkv: (batch, height, width, 3 * heads * dim): queries, keys and values of all heads, of a
            map for which `fuses_window_attention` holds.
        position: (heads, 2 p - 1, 2 p - 1) for windows of p x p pixels: entry i - j + p - 1 of both
            axes is added to the logit of pixel i's query with pixel j's key.
        shift: pixels by which the windows are moved up and left, below p. Pixels that become
            neighbours only because windows wrap around the map's end do not see each other.

    Returns:
        (batch, height, width, heads * dim) in qkv's dtype.
    """
    return _operator(qkv.contiguous(), position.contiguous(), shift)


@operator("window_attention")
def _operator(qkv: Tensor, position: Tensor, shift: int) -> Tensor:
    from kernels.window_attention_triton import window_attention_forward

    return window_attention_forward(qkv, position, shift)


@operator("window_attention_backward")
def _backward_operator(
    dout: Tensor, qkv: Tensor, position: Tensor, shift: int
) -> tuple[Tensor, Tensor]:
    from kernels.window_attention_triton import window_attention_backward

    return window_attention_backward(dout, qkv, position, shift)


def _result(qkv: Tensor, position: Tensor, shift: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


make_differentiable("window_attention", result=_result)
