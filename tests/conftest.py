"""What tests share: fixed seeds, fresh memory that is full of NaN, tiny networks, a terminal."""

import contextlib
import os
import random
import re
import struct
import sys
import threading

import numpy as np
import pytest
import torch

import models
import utils

if not torch.cuda.is_available():
    # Read when Triton is first imported: its kernels then run, slowly, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("stage_checks")  # failures there show their values, too

# The sizes differ from each other, so that one taken for another is noticed.
TINY = {
    "N": 8,
    "M": 20,
    "depths": (1, 2, 3, 1),
    "Z": 12,
    "context_width": 16,
    "transform_width": 24,
}
SHALLOW = {**TINY, "depths": (1, 1, 1, 1)}  # where depth costs time only


@pytest.fixture(autouse=True)
def hostile_environment():
    """Seed all generators; PyTorch fills new tensors with NaN, or the largest integer."""
    seed_all(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Terminal:
    """Standard error, inside this context, is a pseudo-terminal.

    Args:
        size: rows and columns.

    Attributes:
        stream: writes to it.
        written: after the context, all that came.
    """

    def __init__(self, size=(24, 80)):
        fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
        self._master, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
        self.stream = os.fdopen(end, "w", buffering=1)
        self.written = None
        self._before = sys.stderr
        self._reader = threading.Thread(target=self._read)  # a full terminal lets writers wait

    def __enter__(self):
        self._reader.start()
        sys.stderr = self.stream
        return self

    def __exit__(self, *error):
        sys.stderr = self._before
        self.stream.close()
        self._reader.join()
        log = utils.logger
        log.handlers = [each for each in log.handlers if each.stream is not self.stream]

    def _read(self):
        parts = []
        # Linux says with an error what others say with nothing: that the other end is closed.
        with os.fdopen(self._master, "rb", buffering=0) as master, contextlib.suppress(OSError):
            while part := master.read(4096):
                parts.append(part)
        self.written = b"".join(parts).decode()


def screen(written):
    """The lines that a terminal shows after this, without those that are blank."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row -= 1
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def tf32():
    """PyTorch may round the factors of float32 products to TF32, as train.py lets it on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 libraries draw from this one
    torch.manual_seed(seed)


def tiny_model(name="mambavc", **sizes):
    """A network of `TINY` sizes, or of those given, with tables, ready to code."""
    model = models.build_model(name, **{**TINY, **sizes})
    model.update()
    return model.eval()


def spread_model(seed=0, **sizes):
    """A tiny network whose latents and scales spread over many values, as trained ones do."""
    torch.manual_seed(seed)
    model = models.build_model("mambavc", **{**TINY, **sizes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("g_a.", "h_a.")) and parameter.ndim == 4:
                parameter *= 4
            if name.startswith("cc_scale_transforms") and name.endswith("4.bias"):
                parameter += torch.linspace(0, 8, len(parameter))
            # Widths of z's tables differ.
            if name == "entropy_bottleneck.matrices.0":
                parameter += torch.linspace(-1, 1, len(parameter))[:, None, None]
    model.update()
    return model.eval()


def gained_model(qualities=4, **sizes):
    """A `spread_model` whose gains on y and z differ from channel to channel and are no inverses,
    as trained ones.
    """
    model = spread_model(qualities=qualities, **sizes)
    with torch.no_grad():
        for parameter in model.gains.parameters():
            parameter += 0.1 * torch.randn(parameter.shape[1])
        model.gains.z_enc += torch.linspace(-0.3, 0.3, qualities)[:, None]
        model.gains.z_dec -= torch.linspace(-0.2, 0.2, qualities)[:, None]
    return model


def save_checkpoint(model, path, name="mambavc"):
    """Write the part of a training checkpoint that coding needs; return its path as text."""
    state = {"model": name, "model_args": model.config, "state_dict": model.state_dict()}
    torch.save(state, path)
    return str(path)
