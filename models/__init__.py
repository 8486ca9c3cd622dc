"""The networks and what is done with them. Each name is loaded at its first use.

So a program that needs no network, to read a `.mvc` file's header for instance, need not wait for
PyTorch.
"""

import importlib

_MODULES = {
    "BitstreamError": "container",
    "Coder": "coding",
    "ConvVC": "variants",
    "MambaVC": "mambavc",
    "SliceHyperprior": "base",
    "SwinVC": "variants",
    "build_model": "_registry",
    "list_models": "_registry",
    "load_model": "checkpoint",
    "register_model": "_registry",
}

__all__ = [*_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
