"""The four-direction selective scan. Needs PyTorch only; a backend is imported at its first use."""

from kernels.dispatch import available_backends, selective_scan_2d

__all__ = ["available_backends", "selective_scan_2d"]
