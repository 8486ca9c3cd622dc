"""Building blocks of the networks: modules from tensors to tensors, no models, no scripts."""

from .conv_chain import ConvChain
from .drop_path import DropPath
from .ss2d import SS2D
from .swin import SwinAttentionBlock, SwinBlock, WindowAttention
from .vss import VSSBlock

__all__ = [
    "SS2D",
    "ConvChain",
    "DropPath",
    "SwinAttentionBlock",
    "SwinBlock",
    "VSSBlock",
    "WindowAttention",
]
