"""SS2D: two-dimensional selective scan as a layer (VMamba, Liu et al., arXiv:2401.10166)."""

import math

import torch
import torch.nn as nn
from torch import Tensor

from kernels import depthwise_conv_silu, norm_gate, project, selective_scan_2d

DIRECTIONS = 4  # row-major, column-major, and both reversed
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # Mamba's range of initial step sizes


class SS2D(nn.Module):
    """Gated four-direction selective scan on channels-last maps.

    ``x, z = in_proj(u)``; ``x = SiLU(conv2d(x))``; ``y = scan(x)``;
    ``out = out_proj(out_norm(y) * SiLU(z))``. The scan is `kernels.selective_scan_2d`. The layers'
    weights are used without calling them, so forward hooks on them do not run.

    Args:
        dim: channels of input and output.
        dstate: size of the state kept per channel.
        expand: the scan works on ``expand * dim`` channels.
    """

    def __init__(self, dim: int, dstate: int = 16, expand: int = 2):
        super().__init__()
        inner = expand * dim
        rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, rank + 2 * dstate, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * inner, dstate))
        self.Ds = nn.Parameter(torch.empty(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Initialise the scan as Mamba does (Gu and Dao, arXiv:2312.00752, section 3.6)."""
        inner = self.x_proj_weight.shape[-1]
        rank = self.dt_projs_weight.shape[-1]
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)  # as nn.Linear
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        delta = torch.empty_like(self.dt_projs_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX))
        delta = delta.exp().clamp_(min=DT_FLOOR)
        self.dt_projs_bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse softplus
        self.A_logs.copy_(torch.arange(1, self.A_logs.shape[1] + 1).log().expand_as(self.A_logs))
        nn.init.ones_(self.Ds)

    def scan_parameters(self) -> tuple[Tensor, ...]:
        """What `kernels.selective_scan_2d` takes after the map, in its order."""
        return (
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
        )

    def forward(self, u: Tensor) -> Tensor:
        """Map (batch, height, width, dim) to the same shape."""
        # Two products instead of one that is split: both maps come out dense.
        x_weight, z_weight = self.in_proj.weight.chunk(2)
        x = depthwise_conv_silu(project(u, x_weight), self.conv2d.weight, self.conv2d.bias)
        y = selective_scan_2d(x, *self.scan_parameters())
        del x  # the gate follows with maps of the same size
        z = project(u, z_weight)
        norm = self.out_norm
        gated = norm_gate(y, z, norm.weight, norm.bias, norm.eps)
        return project(gated, self.out_proj.weight)
