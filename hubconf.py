"""The networks for `torch.hub`, with the weights that come with the project where there are some.

::

    model = torch.hub.load(REPO_OR_DIR, "mambavc_light", pretrained=True, source="local")
    coded = model.compress(x, quality=50)  # x: (batch, 3, height, width), RGB in [0, 1], any size
    x_hat = model.decompress(**coded)["x_hat"]

A program that loads a network may well have a `models`, `utils` or `layers` of its own, now or
later. Unless these names are this project's for the program, too, all of it is therefore imported
under one name that is nobody else's: its `models` are then `mambavc_hub.models`.
"""

import ast
import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

dependencies = ["PIL", "compressai", "einops", "numba", "numpy", "safetensors", "torch", "tqdm"]

_FOLDER = Path(__file__).resolve().parent
_NAMES = ("kernels", "layers", "models", "utils")  # of this project's that a network imports
_PACKAGE = "mambavc_hub"


class _Loader(SourceFileLoader):
    """Lets a module of this project import the others as parts of `_PACKAGE`."""

    def source_to_code(self, data, path, *, _optimization=-1):
        tree = ast.parse(data, path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                node.module = _renamed(node.module)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    name = _renamed(alias.name)
                    if name != alias.name:
                        alias.name, alias.asname = name, alias.asname or alias.name
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimization)

    def path_stats(self, path):
        # Without them nothing is read from or written to __pycache__, where the plain modules are.
        raise OSError


class _Finder:
    """Finds what is in `_PACKAGE`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target=None) -> ModuleSpec | None:
        if not name.startswith(f"{_PACKAGE}."):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


def _renamed(module: str) -> str:
    return f"{_PACKAGE}.{module}" if module.partition(".")[0] in _NAMES else module


def _is_ours(name: str) -> bool:
    """Whether the program that loads a network gets this project's module by a name."""
    module = sys.modules.get(name)
    if module is None:
        # The first is this folder, which torch.hub takes out again.
        spec = PathFinder.find_spec(name, sys.path[1:])
        file = spec and spec.origin
    else:
        file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(_FOLDER)


def _models() -> ModuleType:
    """This project's `models`."""
    if _PACKAGE not in sys.modules:
        if all(_is_ours(name) for name in _NAMES):
            return importlib.import_module("models")
        package = ModuleType(_PACKAGE, __doc__)
        package.__path__ = [str(_FOLDER)]
        sys.modules[_PACKAGE] = package
        sys.meta_path.insert(0, _Finder)
    return importlib.import_module(f"{_PACKAGE}.models")


def _load(name: str, pretrained: bool | str, sizes: dict):
    models = _models()
    if not pretrained:
        model = models.build_model(name, **sizes).eval()
        model.update()
        return model
    checkpoint = importlib.import_module(".checkpoint", models.__name__)
    weights = checkpoint.list_checkpoints()
    own = [known for known in weights if _network(known, models.list_models()) == name]
    wanted = own[0] if pretrained is True and own else pretrained  # sorted: the shortest name
    if wanted not in own:
        raise ValueError(
            f"{name} has no weights{'' if wanted is True else f' called {wanted}'}; "
            f"there are {', '.join(own or weights)}"
        )
    if sizes:
        raise ValueError(f"weights have their own sizes, got {', '.join(sizes)}; leave them out")
    return checkpoint.load_model(checkpoint.find_checkpoint(wanted))


def _network(checkpoint: str, networks: Sequence[str]) -> str:
    """Of which network a checkpoint is: mambavc-light-0.0130 of mambavc-light, not of mambavc."""
    return max((n for n in networks if f"{checkpoint}-".startswith(f"{n}-")), key=len, default="")


def mambavc(pretrained: bool | str = False, **sizes):
    """MambaVC in eval mode, on the CPU, ready to code.

    Args:
        pretrained: load the weights that come with the project, those of every rate if there are
            some; a name, without ending, chooses others in checkpoints/. Else weights are random.
        sizes: of `models.MambaVC`, for random weights.

    Raises:
        ValueError: there are no such weights; the message says which there are.
        utils.UsageError: they are damaged, or not all parts of them are there.
    """
    return _load("mambavc", pretrained, sizes)


def mambavc_light(pretrained: bool | str = False, **sizes):
    """MambaVC at half the width; arguments are those of `mambavc`."""
    return _load("mambavc-light", pretrained, sizes)


def convvc(pretrained: bool | str = False, **sizes):
    """The variant with residual blocks of convolutions; arguments are those of `mambavc`."""
    return _load("convvc", pretrained, sizes)


def swinvc(pretrained: bool | str = False, **sizes):
    """The variant with Swin blocks; arguments are those of `mambavc`."""
    return _load("swinvc", pretrained, sizes)
