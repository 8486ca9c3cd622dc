"""The four-direction selective scan. Needs PyTorch only; a backend is imported at its first use."""

from kernels.fused import depthwise_conv_silu, norm_gate
from kernels.project import project
from kernels.scan import available_backends, selective_scan_2d

__all__ = ["available_backends", "depthwise_conv_silu", "norm_gate", "project", "selective_scan_2d"]
