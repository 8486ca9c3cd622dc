"""Names of the models the command line can build."""

import importlib
from collections.abc import Callable

import torch.nn as nn

from layers.compressai import register_model as register_with_compressai

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}
_MODULES = ("mambavc", "variants")  # that register models when they are imported


def register_model(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register a model class or preset here and with CompressAI; a name can be used only once.

    Raises:
        ValueError: the name is taken.
    """

    def decorator(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in _BUILDERS:
            raise ValueError(f"model name {name!r} is already registered; choose another name")
        _BUILDERS[name] = register_with_compressai(name)(builder)
        return builder

    return decorator


def list_models() -> list[str]:
    """Names that `build_model` accepts, sorted."""
    for module in _MODULES:
        importlib.import_module(f".{module}", __package__)
    return sorted(_BUILDERS)


def build_model(name: str, **kwargs) -> nn.Module:
    """Build a registered model; keyword arguments override those of the preset.

    Raises:
        ValueError: the name is unknown.
    """
    names = list_models()
    if name not in names:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(names)}")
    return _BUILDERS[name](**kwargs)
