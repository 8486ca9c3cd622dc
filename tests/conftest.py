"""What every test gets: fixed seeds and fresh memory that is full of NaN."""

import os
import random

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported: its kernels then run, slowly, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def hostile_environment():
    """Seed all generators; PyTorch fills new tensors with NaN, or the largest integer."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 libraries draw from this one
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
