"""Entropy coding of integer symbols with tabulated distributions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyModel

__all__ = ["BitstreamError", "SymbolDecoder", "SymbolEncoder", "Tables"]


class BitstreamError(ValueError):
    """The bytes are not a stream that this model can decode to the right picture."""


@dataclass(frozen=True)
class Tables:
    """CDF tables of one entropy model, as CompressAI builds them (16-bit precision).

    Attributes:
        cdfs: int32 (tables, longest); row k is valid up to ``lengths[k]``.
        lengths: int32 (tables,).
        offsets: int32 (tables,); symbol value of a row's first entry.
    """

    cdfs: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, model: EntropyModel) -> Tables:
        """Tables of a CompressAI entropy model.

        Raises:
            ValueError: the model has none yet.
        """
        if model.quantized_cdf.numel() == 0:
            raise ValueError("the model has no CDF tables; call update() before coding")
        buffers = (model.quantized_cdf, model.cdf_length, model.offset)
        return cls(*(buffer.int().cpu().numpy() for buffer in buffers))


class SymbolEncoder:
    """Turns symbols into bytes: `put` any number of times, then `flush`."""

    def __init__(self, tables: Tables):
        self._tables = [tables.cdfs.tolist(), tables.lengths.tolist(), tables.offsets.tolist()]
        self._encoder = BufferedRansEncoder()

    def put(self, symbols: np.ndarray, indexes: np.ndarray) -> None:
        """Append symbols (int32, flat), each with the index of its table."""
        self._encoder.encode_with_indexes(symbols.tolist(), indexes.tolist(), *self._tables)

    def flush(self) -> bytes:
        """All symbols put so far, as bytes."""
        return self._encoder.flush()


class SymbolDecoder:
    """Reads the symbols of one `SymbolEncoder` string in the order they were put."""

    def __init__(self, data: bytes, tables: Tables):
        self._tables = [tables.cdfs.tolist(), tables.lengths.tolist(), tables.offsets.tolist()]
        self._decoder = RansDecoder()
        self._decoder.set_stream(data)

    def get(self, indexes: np.ndarray) -> np.ndarray:
        """Next symbols (int32, flat), one for each table index."""
        values = self._decoder.decode_stream(indexes.tolist(), *self._tables)
        return np.asarray(values, dtype=np.int32)
