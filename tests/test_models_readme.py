"""The page on how to change the network: its files are written and its commands run, in a copy."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_checkpoint, tiny_model
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "models" / "README.md").read_text()
BLOCKS = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)
# In place of what takes minutes; each must occur.
FASTER = {
    "A block": {
        "--N 32 --M 80": "--N 4 --M 10",
        "--batch-size 4 --patch-size 128 128": "--batch-size 1 --patch-size 64 64",
        "--max-steps 300 --val-every 300 --save-every 300": "--max-steps 1",
        "--models gatedvc mambavc convvc": "--models gatedvc --N 4 --M 10",
    },
    "A scan": {
        "--checkpoint mambavc-light-0.0130": "--checkpoint tiny.pth.tar",
    },
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What of the project the page needs, with small pictures in demo/."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("kernels", "layers", "models", "tools", "training", "tests", "results"):
        # With __pycache__ and its dates, so that nothing is compiled anew.
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("assets"))
    for name in ("train.py", "eval.py", "utils.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    save_checkpoint(tiny_model(), folder / "tiny.pth.tar")
    picture = Image.open(ROOT / "demo" / "train" / "crop4.jpg")
    for part in ("train", "test"):
        (folder / "demo" / part).mkdir(parents=True)
        picture.crop((0, 0, 192, 192)).save(folder / "demo" / part / "a.png")
    return folder


def section(title):
    """Blocks (language, text) of a section, faster."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    for old, new in FASTER[title].items():
        assert old in text
        text = text.replace(old, new)
    return BLOCKS.findall(text)


# Runs lines of a shell, Python's in one process: importing PyTorch takes longer than most of them.
RUNNER = """
import contextlib, runpy, shlex, subprocess, sys

sys.path[0] = ""
for line in sys.stdin:
    command, _, file = line.partition(" > ")
    python, *sys.argv = shlex.split(command)
    if python != "python":
        subprocess.run(line, shell=True, check=True)
        continue
    with contextlib.ExitStack() as stack:
        if file:
            output = stack.enter_context(open(file.strip(), "w"))
            stack.enter_context(contextlib.redirect_stdout(output))
        try:
            if sys.argv[0] == "-m":
                del sys.argv[0]
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            if error.code:
                raise
    sys.stdout.flush()
"""


def run(folder, commands):
    """Standard output of commands."""
    bin_folder = Path(sys.executable).parent  # has the Python that they mean
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=commands, cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_block_is_written_trained_counted_and_compared(copy):
    (_, module), *commands = section("A block")
    (copy / "models" / "gated.py").write_text(module)
    out = run(copy, "".join(text for _, text in commands))
    assert re.search(r"^gatedvc 512x768: \S+ GMACs", out, re.MULTILINE)
    assert re.search(r"^gatedvc +\d", out, re.MULTILINE)
    assert "BD-rate against JPEG" in out
    assert out.count("| checkpoint_best.pth.tar |") == 2
    assert (copy / "out" / "rd.png").exists()


def test_a_scan_is_added_and_tested(copy):
    (_, module), (_, commands) = section("A scan")
    (copy / "kernels" / "scan_float64.py").write_text(module)
    out = run(copy, commands)
    assert re.search(r"^[1-9]\d* passed", out, re.MULTILINE)
    assert re.search(r"^mean +\d", out, re.MULTILINE)
