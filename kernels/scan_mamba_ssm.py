"""The four-direction scan on mamba-ssm's one-dimensional CUDA scan, to compare against.

It does what the published code does around that scan: four copies of the map, in the order of
each direction, a full delta tensor, and four results to put back and add.
"""

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

from kernels.scan_reference import ScanInputs


@torch.autocast("cuda", enabled=False)  # the extension wants one dtype throughout
def scan_2d(inputs: ScanInputs) -> Tensor:
    """`kernels.scan_reference.scan_2d` for CUDA tensors of 32 or 16 bits."""
    x, x_dbl, dt_projs_weight, dt_projs_bias, A_logs, Ds = inputs
    height, width, dim = x.shape[1:]
    dstate = inputs.dstate
    u = _in_scan_order(x.permute(0, 3, 1, 2).unsqueeze(1).expand(-1, 4, -1, -1, -1))
    rbc = _in_scan_order(x_dbl.permute(0, 3, 4, 1, 2))  # (batch, 4, rank + 2 dstate, L)
    r, B, C = rbc.split([inputs.dt_rank, dstate, dstate], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", r, dt_projs_weight.to(r.dtype))
    y = selective_scan_fn(
        u.flatten(1, 2),
        delta.flatten(1, 2),
        -A_logs.float().exp(),
        B.contiguous(),
        C.contiguous(),
        Ds.float(),
        delta_bias=dt_projs_bias.flatten().float(),
        delta_softplus=True,
    )
    y = y.unflatten(1, (4, dim))
    rows, columns = y[:, 0] + y[:, 2].flip(-1), y[:, 1] + y[:, 3].flip(-1)  # (batch, dim, L)
    columns = columns.unflatten(-1, (width, height)).transpose(-1, -2)
    y = rows.unflatten(-1, (height, width)) + columns
    return y.permute(0, 2, 3, 1).contiguous()


def _in_scan_order(maps: Tensor) -> Tensor:
    """(batch, 4, channels, height, width) to (batch, 4, channels, L), each in its own order."""
    return torch.stack(
        (
            maps[:, 0].flatten(-2),
            maps[:, 1].transpose(-1, -2).flatten(-2),
            maps[:, 2].flatten(-2).flip(-1),
            maps[:, 3].transpose(-1, -2).flatten(-2).flip(-1),
        ),
        dim=1,
    )
