"""CompressAI's `python -m compressai.utils.eval_model` with our networks among its architectures.

::

    python -m tools.eval_model checkpoint PICTURES -a mambavc -p runs/0.013/checkpoint_best.pth.tar

It takes what train.py and the published code save. Its rates are of the strings alone, without the
header and the list of guarded symbols of a file, and it pads pictures with black.
"""

import sys
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from torch import Tensor

import models
import utils
from models import MambaVC, SliceHyperprior


class Architecture(NamedTuple):
    """What CompressAI's tables have in place of a class; `name` is that of a registered network."""

    name: str

    def from_state_dict(self, state_dict: Mapping[str, Tensor]) -> SliceHyperprior:
        """The network of these weights, from which its sizes are read."""
        model = models.build_model(self.name, **MambaVC.sizes_from_state_dict(state_dict))
        if model.qualities:
            raise utils.UsageError(
                "CompressAI's program gives no quality to a network of every rate; use eval.py "
                "--qualities, or make one of a single rate with tools.export --quality"
            )
        model.load_state_dict(state_dict)
        return model

    def __call__(self, **kwargs) -> NoReturn:
        raise utils.UsageError(f"{self.name} has no pretrained weights by quality; use: checkpoint")


def main(argv: list[str] | None = None) -> None:
    # Imports torchvision and more, which takes seconds.
    from compressai.utils.eval_model import __main__ as eval_model

    for name in models.list_models():
        for table in (eval_model.architectures, eval_model.pretrained_models):
            table[name] = Architecture(name)
    try:
        eval_model.main(sys.argv[1:] if argv is None else argv)
    except FileNotFoundError as error:
        raise utils.UsageError(f"{error.filename} does not exist; give a file") from None


if __name__ == "__main__":
    utils.run_main(main)
