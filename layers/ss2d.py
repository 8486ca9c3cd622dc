"""SS2D: two-dimensional selective scan as a layer (VMamba, Liu et al., arXiv:2401.10166)."""

import math

import torch
import torch.nn as nn
from torch import Tensor

from kernels import (
    depthwise_conv_silu,
    norm_gate,
    project,
    project_halves,
    selective_scan_2d,
)

DIRECTIONS = 4  # row-major, column-major, and both reversed
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # Mamba's range of initial step sizes


def is_fixed(A_logs: Tensor) -> bool:
    """Whether (channels, dstate) logarithms are those of 1..dstate in every channel, as at first.

    To two units in the last place of float32, because libraries' logarithms differ by one. It makes
    the host wait for the tensor's device.
    """
    first = torch.arange(1, A_logs.shape[1] + 1, dtype=torch.float64).log()
    return bool(torch.isclose(A_logs.detach().cpu().double(), first, rtol=2**-22, atol=0).all())


class _FixedA:
    """Whether a layer's A_logs `is_fixed`, remembered until it changes.

    What changes its values counts in its version, or gives it other memory; only writes through
    ``.data``, NumPy or the like go unseen, after which `torch.autograd.graph.increment_version`
    has to be called.
    """

    def __init__(self):
        self.known = None

    def __reduce__(self):
        return type(self), ()  # the versions of a copied parameter start anew

    def forget(self) -> None:
        self.known = None

    def __call__(self, A_logs: Tensor) -> bool:
        """The answer; False, which is never wrong, where the values cannot be read or kept."""
        if torch.compiler.is_compiling():  # the code would keep the answer for other values
            return False
        # Tensors of other types, as `torch.func` has, need not have a memory and a version.
        if type(A_logs) is not nn.Parameter or A_logs.is_meta or A_logs.is_inference():
            return False
        if self.known is not None:
            parameter, values, version, answer = self.known
            if (
                parameter is A_logs
                and values.data_ptr() == A_logs.data_ptr()
                and version == A_logs._version
            ):
                return answer
        if A_logs.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if type(A_logs.detach()) is not Tensor:  # a mode in which only shapes are computed
            return False
        # Held here, the memory is not given to other values meanwhile.
        self.known = A_logs, A_logs.detach(), A_logs._version, is_fixed(A_logs)
        return self.known[-1]


class SS2D(nn.Module):
    """Gated four-direction selective scan on channels-last maps.

    ``x, z = in_proj(u)``; ``x = SiLU(conv2d(x))``; ``y = scan(x)``;
    ``out = out_proj(out_norm(y) * SiLU(z))``. The scan is `kernels.selective_scan_2d`. The layers'
    weights are used without calling them, so forward hooks on them do not run.

    Where no gradient by A_logs is wanted and it holds its first values, the scan takes a faster
    kernel. A CUDA graph keeps the kernel with which it was captured.

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
        self._is_fixed = _FixedA()
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
        self.reset_A()
        nn.init.ones_(self.Ds)

    @torch.no_grad()
    def reset_A(self) -> None:
        """Set A of every channel to -(1..dstate), for which `is_fixed` holds."""
        self.A_logs.copy_(torch.arange(1, self.A_logs.shape[1] + 1).log().expand_as(self.A_logs))

    def scan_parameters(self) -> tuple[Tensor, ...]:
        """What `kernels.selective_scan_2d` takes after the map, in its order."""
        return (
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
        )

    def _has_fixed_A(self) -> bool:
        if torch.is_grad_enabled() and self.A_logs.requires_grad:
            # An update may follow, and fused optimisers count no change in a tensor's version.
            self._is_fixed.forget()
            return False
        return self._is_fixed(self.A_logs)

    def forward(self, u: Tensor) -> Tensor:
        """Map (batch, height, width, dim) to the same shape."""
        # Two products instead of one that is split: both maps come out dense.
        if torch.is_grad_enabled():
            x, z = project_halves(u, self.in_proj.weight)
        else:  # z is as large as x, and made when that is no longer needed
            x_weight, z_weight = self.in_proj.weight.chunk(2)
            x, z = project(u, x_weight), None
        x = depthwise_conv_silu(x, self.conv2d.weight, self.conv2d.bias)
        y = selective_scan_2d(x, *self.scan_parameters(), fixed_A=self._has_fixed_A())
        del x
        z = project(u, z_weight) if z is None else z
        norm = self.out_norm
        gated = norm_gate(y, z, norm.weight, norm.bias, norm.eps)
        return project(gated, self.out_proj.weight)
