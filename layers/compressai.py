"""What this project takes from CompressAI (Bégaint et al., arXiv:2011.03029), at a low price.

``import compressai`` also imports its point-cloud data sets and, with them, torch_geometric,
torchvision, pandas and PyTorch's compiler: seconds of every start, for nothing that a codec of
pictures uses. Here empty modules stand in for those while CompressAI is imported, and are gone
afterwards: who imports one of them later gets the real one. Of CompressAI only the registry of
transforms stays without torchvision's. Where CompressAI has been imported before, and where a
version of it asks an empty module for something, the import is the plain one.
"""

import importlib
import sys
import warnings
from collections.abc import Iterable
from types import ModuleType

UNUSED = (
    "compressai.datasets",
    "compressai.transforms",
    "scipy.stats",
    "torch_geometric",
    "torch_geometric.transforms",
    "torchvision",
    "torchvision.transforms",
)


def import_without(package: str, unused: Iterable[str]) -> None:
    """Import a package while empty modules stand in for others, unless it needs more of them.

    Args:
        package: name of the package; if it is imported already nothing happens.
        unused: names of modules, parents first. One that is imported already stays as it is.
    """
    if package in sys.modules:
        return
    before = set(sys.modules)
    placed = {name: ModuleType(name) for name in unused if name not in sys.modules}
    for name, module in placed.items():
        module.__path__ = []  # what makes it a package
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in placed:
            setattr(placed[parent], child, module)
    try:
        importlib.import_module(package)
    except (ImportError, AttributeError, TypeError):
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == package:
                del sys.modules[name]
    finally:
        for name, module in placed.items():
            sys.modules.pop(name, None)
            parent, _, child = name.rpartition(".")
            # Not by getattr: a package may import what it is asked for.
            attributes = vars(sys.modules[parent]) if parent in sys.modules else {}
            if attributes.get(child) is module:
                del attributes[child]
    importlib.import_module(package)


with warnings.catch_warnings():
    # Some of what it imports calls torch.jit.script, which newer PyTorch deprecates.
    warnings.simplefilter("ignore", FutureWarning)
    import_without("compressai", UNUSED)

from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from compressai.layers import conv1x1, conv3x3
from compressai.models import CompressionModel
from compressai.models.utils import conv, deconv, remap_old_keys
from compressai.registry import register_model

__all__ = [
    "CompressionModel",
    "EntropyBottleneck",
    "EntropyModel",
    "GaussianConditional",
    "conv",
    "conv1x1",
    "conv3x3",
    "deconv",
    "register_model",
    "remap_old_keys",
]
