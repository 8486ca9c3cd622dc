"""The four-direction selective scan. Needs PyTorch only; a backend is imported at its first use."""

from kernels.backends import available_backends, use_backend
from kernels.conv_chain import conv_chain, fuses_convolutions, fuses_products
from kernels.conv_silu import depthwise_conv_silu
from kernels.norm_gate import fork_layer_norm, layer_norm, norm_gate
from kernels.project import project, project_halves
from kernels.scan import selective_scan_2d
from kernels.window_attention import fuses_window_attention, window_attention

__all__ = [
    "available_backends",
    "conv_chain",
    "depthwise_conv_silu",
    "fork_layer_norm",
    "fuses_convolutions",
    "fuses_products",
    "fuses_window_attention",
    "layer_norm",
    "norm_gate",
    "project",
    "project_halves",
    "selective_scan_2d",
    "use_backend",
    "window_attention",
]
