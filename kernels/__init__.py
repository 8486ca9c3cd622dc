"""The four-direction selective scan. Needs PyTorch only; a backend is imported at its first use."""

from kernels.dispatch import available_backends, selective_scan_2d
from kernels.fused import depthwise_conv_silu, norm_gate
from kernels.projection import project

__all__ = ["available_backends", "depthwise_conv_silu", "norm_gate", "project", "selective_scan_2d"]
