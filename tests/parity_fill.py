"""Deterministic weights and inputs for parity checks against the published MambaVC network.

Every parameter is filled from its state-dict key alone, so two implementations that use the same
keys and shapes hold the same weights without exchanging a file. NumPy's legacy generator is used
because its stream is frozen.
"""

import math
import zlib

import numpy as np


def _rng(key: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)


def fill(key: str, shape: tuple, seed: int = 0) -> np.ndarray | None:
    """Value of `key` as float32; None where it keeps its default (entropy models, buffers)."""
    if key.startswith("entropy_bottleneck.") or key.startswith("gaussian_conditional."):
        return None
    r = _rng(key, seed)
    n = r.standard_normal(shape).astype(np.float32)
    if key.endswith(".A_logs"):
        return (np.log(np.arange(1, shape[1] + 1, dtype=np.float32))[None] + 0.05 * n).astype(
            np.float32
        )
    if key.endswith(".Ds"):
        return 1 + 0.1 * n
    if key.endswith(".dt_projs_bias"):
        dt = np.exp(r.uniform(math.log(1e-3), math.log(1e-1), shape)).astype(np.float32)
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)
    if key.endswith(".dt_projs_weight"):
        return n / math.sqrt(shape[-1])
    if key.endswith(".relative_position_params"):
        return 0.1 * n
    if len(shape) == 1:  # norm gains and all biases
        gain = key.endswith("norm.weight") or key.endswith(("ln1.weight", "ln2.weight"))
        return (1 + 0.1 * n) if gain else 0.02 * n
    fan_in = int(np.prod(shape[1:])) if len(shape) in (2, 4) else shape[-1]
    return n / math.sqrt(fan_in)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth, structured RGB image, float32, shape (1, 3, height, width), range [0, 1]."""
    r = np.random.RandomState(1000 + seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    out = np.zeros((3, height, width))
    for c in range(3):
        for _ in range(12):
            f = r.uniform(0.2, 24, 2)
            out[c] += (
                r.uniform(0.2, 1)
                / (1 + f.sum() / 6)
                * np.sin(2 * math.pi * (f[0] * y / height + f[1] * x / width) + r.uniform(0, 6.28))
            )
    out = (out - out.min()) / (out.max() - out.min())
    return np.round(out * 255)[None].astype(np.float32) / np.float32(255)
