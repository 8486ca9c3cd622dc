"""The four-direction selective scan, step by step in PyTorch: what every backend must match."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_orders(
    height: int, width: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The four directions as permutations of the pixels of a (height, width) image.

    Returns:
        order, inverse: int64, (4, height * width) each. `order[k, t]` is the pixel (counted
        row-major) that direction k visits at step t, `inverse[k, p]` the step at which it visits
        pixel p. Direction 0 is row-major, 1 column-major, 2 and 3 are these two reversed.
    """
    rows = torch.arange(height * width, device=device)
    columns = rows.view(height, width).t().flatten()
    order = torch.stack([rows, columns, rows.flip(0), columns.flip(0)])
    return order, order.argsort(dim=1)


def scan_2d(
    x: Tensor,
    x_dbl: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
) -> Tensor:
    """Scan `x` along four orders of its pixels and sum the four results in image order.

    With r_t, B_t and C_t the three parts of `x_dbl` for direction k at the pixel of step t
    (selective scan: Gu and Dao, arXiv 2312.00752; four directions: Liu et al., arXiv 2401.10166):

        delta_t = softplus(dt_projs_weight[k] r_t + dt_projs_bias[k])
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,    h_{-1} = 0,  A = -exp(A_logs)
        y_t = C_t . h_t + D x_t

    Args:
        x: (batch, height, width, dim), floating point; below float32 it is computed in float32.
        x_dbl: (batch, height, width, 4, dt_rank + 2 * dstate), [r | B | C] of each direction.
        dt_projs_weight: (4, dim, dt_rank).
        dt_projs_bias: (4, dim).
        A_logs: (4 * dim, dstate).
        Ds: (4 * dim).

    Returns:
        (batch, height, width, dim) in the dtype of `x`, differentiable any number of times. Memory
        with gradients is about three float tensors of 4 * x.numel() * dstate: for tests and small
        maps.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _scan_2d(x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds)


def _scan_2d(x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds):
    batch, height, width, dim = x.shape
    dt_rank = dt_projs_weight.shape[2]
    dstate = A_logs.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    W, bias = dt_projs_weight.to(dtype), dt_projs_bias.to(dtype)
    A = -A_logs.to(dtype).exp().view(4, dim, dstate)
    D = Ds.to(dtype).view(4, dim)

    order, inverse = scan_orders(height, width, x.device)
    x_k = x.to(dtype).flatten(1, 2)[:, order]  # (batch, 4, length, dim)
    x_dbl = x_dbl.to(dtype).flatten(1, 2)
    x_dbl = torch.stack([x_dbl[:, order[k], k] for k in range(4)], dim=1)  # (batch, 4, length, .)
    r, B, C = x_dbl.split([dt_rank, dstate, dstate], dim=-1)
    delta = F.softplus(torch.einsum("bklr,kdr->bkld", r, W) + bias[:, None])

    h = x_k.new_zeros(batch, 4, dim, dstate)
    ys = []
    # Steps are split off all at once: the gradient of an index is a whole tensor for every step.
    steps = (v.unbind(2) for v in (delta, delta * x_k, B, C))
    for delta_t, u_t, B_t, C_t in zip(*steps, strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + u_t[..., None] * B_t[:, :, None]
        ys.append(torch.einsum("bkdn,bkn->bkd", h, C_t))
    y = torch.stack(ys, dim=2) + D[:, None] * x_k  # (batch, 4, length, dim)

    y = sum(y[:, k, inverse[k]] for k in range(4))
    return y.view(batch, height, width, dim).to(x.dtype)
