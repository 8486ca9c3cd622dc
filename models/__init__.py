"""The networks. Importing this package registers every model name."""

import warnings

with warnings.catch_warnings():
    # What CompressAI imports calls torch.jit.script, which newer PyTorch deprecates.
    warnings.simplefilter("ignore", FutureWarning)
    import compressai.models  # noqa: F401

from ._registry import build_model, list_models, register_model
from .base import SliceHyperprior
from .entropy import BitstreamError
from .mambavc import MambaVC
from .variants import ConvVC, SwinVC

__all__ = [
    "BitstreamError",
    "ConvVC",
    "MambaVC",
    "SliceHyperprior",
    "SwinVC",
    "build_model",
    "list_models",
    "register_model",
]
