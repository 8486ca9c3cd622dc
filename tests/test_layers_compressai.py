"""CompressAI comes without what a codec of pictures does not use, and whole to who asks for it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code, *folders):
    """Run code in a fresh interpreter that finds modules in these folders and in the project."""
    path = ":".join(map(str, (*folders, ROOT)))
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    return subprocess.run(
        command, env={"PYTHONPATH": path, "PATH": ""}, capture_output=True, text=True
    )


def test_networks_are_built_without_the_unused():
    result = run(
        "import sys, models\n"
        "models.build_model('mambavc-light')\n"
        "unused = ('torch_geometric', 'torchvision', 'pandas', 'torch._dynamo', 'scipy.stats')\n"
        "print([name for name in unused if name in sys.modules])"
    )
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr


def test_what_was_left_out_is_there_for_who_asks():
    result = run(
        "import layers.compressai, scipy\n"
        "from compressai import datasets, transforms\n"
        "import compressai.datasets, torchvision.transforms, torch_geometric.transforms\n"
        "print(compressai.datasets.ImageFolder.__name__, transforms.RGB2YCbCr.__name__,\n"
        "      torchvision.transforms.ToTensor.__name__, scipy.stats.norm.cdf(0.0))"
    )
    assert result.stdout == "ImageFolder RGB2YCbCr ToTensor 0.5\n", result.stderr


@pytest.mark.parametrize(
    ("needs", "loaded"),
    [("import unused.part", False), ("from unused.part import Thing", True)],
    ids=["nothing", "a class"],
)
def test_a_package_that_needs_more_gets_the_real_one(tmp_path, needs, loaded):
    """A later version of CompressAI may use what today's only imports."""
    for name, text in {
        "whole/__init__.py": f"import whole.child, whole.spare\n{needs}\n",
        "whole/spare.py": "",
        "whole/child.py": "import unused\n",
        "unused/__init__.py": "REAL = True\n",
        "unused/part.py": "class Thing: pass\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    result = run(
        "from layers.compressai import import_without\n"
        "import_without('whole', ('unused', 'unused.part', 'whole.spare'))\n"
        "import sys, whole\n"
        "print('unused' in sys.modules)\n"
        "import unused.part\n"
        "print(unused.REAL, unused.part.Thing.__name__)",
        tmp_path,
    )
    assert result.stdout == f"{loaded}\nTrue Thing\n", result.stderr
