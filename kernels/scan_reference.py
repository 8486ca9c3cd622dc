"""The four-direction selective scan, step by step in PyTorch: what every backend must match."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ScanInputs(NamedTuple):
    """What every backend scans, all on one device.

    `kernels.selective_scan_2d` makes them contiguous, and the parameters float32, or float64 for
    float64 maps. Gradients come as another `ScanInputs`, each in the shape and dtype of its input,
    but for that by A_logs where A is fixed, which is empty.
    """

    x: Tensor  # (batch, height, width, dim); float32, float64, bfloat16 or float16
    x_dbl: Tensor  # (batch, height, width, 4, dt_rank + 2 * dstate): [r | B | C] by direction
    dt_projs_weight: Tensor  # (4, dim, dt_rank)
    dt_projs_bias: Tensor  # (4, dim)
    A_logs: Tensor  # (4 * dim, dstate), with A = -exp(A_logs)
    Ds: Tensor  # (4 * dim,)

    @property
    def dt_rank(self) -> int:
        return self.dt_projs_weight.shape[2]

    @property
    def dstate(self) -> int:
        return self.A_logs.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of states, delta and sums."""
        return torch.promote_types(self.x.dtype, torch.float32)


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


def scan_2d(inputs: ScanInputs) -> Tensor:
    """Scan `x` along four orders of its pixels and sum the four results in image order.

    With r_t, B_t and C_t the three parts of `x_dbl` for direction k at the pixel of step t
    (selective scan: Gu and Dao, arXiv 2312.00752; four directions: Liu et al., arXiv 2401.10166):

        delta_t = softplus(dt_projs_weight[k] r_t + dt_projs_bias[k])
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,    h_{-1} = 0,  A = -exp(A_logs)
        y_t = C_t . h_t + D x_t

    Returns:
        (batch, height, width, dim) in the dtype of `x`, differentiable any number of times. Memory
        with gradients is about three float tensors of 4 * x.numel() * dstate: for tests and small
        maps.
    """
    with torch.autocast(inputs.x.device.type, enabled=False):
        return _scan_2d(inputs)


def _scan_2d(inputs: ScanInputs) -> Tensor:
    batch, height, width, dim = inputs.x.shape
    dstate = inputs.dstate
    x, x_dbl, W, bias, A_logs, D = (t.to(inputs.dtype) for t in inputs)
    A = -A_logs.exp().view(4, dim, dstate)
    D = D.view(4, dim)

    order, inverse = scan_orders(height, width, x.device)
    x_k = x.flatten(1, 2)[:, order]  # (batch, 4, length, dim)
    x_dbl = x_dbl.flatten(1, 2)
    x_dbl = torch.stack([x_dbl[:, order[k], k] for k in range(4)], dim=1)  # (batch, 4, length, .)
    r, B, C = x_dbl.split([inputs.dt_rank, dstate, dstate], dim=-1)
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
    return y.view(batch, height, width, dim).to(inputs.x.dtype)
