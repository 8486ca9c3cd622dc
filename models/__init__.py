"""The networks. Importing this package registers every model name."""

from ._registry import build_model, list_models, register_model
from .base import SliceHyperprior
from .entropy import BitstreamError
from .mambavc import MambaVC

__all__ = [
    "BitstreamError",
    "MambaVC",
    "SliceHyperprior",
    "build_model",
    "list_models",
    "register_model",
]
