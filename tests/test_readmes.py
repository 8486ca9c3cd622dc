"""The pages: where links lead, what they list, flags of commands; and those that say how to change

the project: their files are written and their commands run, in a copy.
"""

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
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")]
}
BLOCKS = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)
# In place of what takes minutes; each must occur.
FASTER = {
    ("models", "A block"): {
        "--N 32 --M 80": "--N 4 --M 10",
        "--batch-size 4 --patch-size 128 128": "--batch-size 1 --patch-size 64 64",
        "--max-steps 300 --val-every 300 --save-every 300": "--max-steps 1",
        "--models gatedvc mambavc convvc": "--models gatedvc --N 4 --M 10",
    },
    ("kernels", "Add a backend"): {
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


def section(folder, title):
    """Blocks (language, text) of a section, faster."""
    page = PAGES[f"{folder}/README.md"]
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    for old, new in FASTER[folder, title].items():
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
    (_, module), *commands = section("models", "A block")
    (copy / "models" / "gated.py").write_text(module)
    out = run(copy, "".join(text for _, text in commands))
    assert re.search(r"^gatedvc 512x768: \S+ GMACs", out, re.MULTILINE)
    assert re.search(r"^gatedvc +\d", out, re.MULTILINE)
    assert "BD-rate against JPEG" in out
    assert "| gatedvc/0.013 |" in out and "| mambavc/0.013 |" in out
    assert (copy / "out" / "rd.png").exists()


def test_a_scan_is_added_and_tested(copy):
    (_, module), (_, branch), (_, commands) = section("kernels", "Add a backend")
    (copy / "kernels" / "scan_float64.py").write_text(module)
    out = run(copy, commands)
    assert branch in (copy / "kernels" / "scan.py").read_text()
    assert re.search(r"^[1-9]\d* passed", out, re.MULTILINE)
    assert re.search(r"^mean +\d", out, re.MULTILINE)


def anchors(page):
    """Of the headings of a page, as its hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_first_page_is_short_and_has_all_that_lies_beside_it():
    page = PAGES["README.md"]
    assert page.count("\n") <= 140
    (table,) = re.findall(r"^## Folders\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    folders = {f"{path.parent.name}/" for path in ROOT.glob("[a-z]*/__init__.py")}
    for name in folders | {path.name for path in ROOT.glob("*.py")}:
        assert f"`{name}`" in table, name


def test_the_page_of_the_tools_has_all_of_them():
    for path in (ROOT / "tools").rglob("*.py"):
        if "__main__" in path.read_text():
            tool = ".".join(path.relative_to(ROOT / "tools").with_suffix("").parts)
            assert f"`{tool}`" in PAGES["tools/README.md"], tool


@pytest.mark.parametrize("name", PAGES)
def test_commands_have_flags_that_there_are(name):
    text = PAGES[name].replace("\\\n", " ")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.splitlines()]
    commands += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    shared = [ROOT / "tools" / "networks.py", ROOT / "tools" / "figures" / "style.py"]
    for command in commands:
        program = re.search(r"(?:-m (tools\.[\w.]+)|\b(train|eval|codec)\.py)", command)
        if program is None or program[1] == "tools.NAME":
            continue
        file = (program[1] or program[2]).replace(".", "/") + ".py"
        source = "".join(path.read_text() for path in [ROOT / file, *shared])
        flags = re.findall(r"(?<=\s)--[\w-]+", command[program.end() :].partition(" #")[0])
        for flag in {*flags} - {"--help"}:
            assert f'"{flag}"' in source, command
