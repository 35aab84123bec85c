"""Bytes as they are."""

from __future__ import annotations

from typing import Final

import numpy as np

from tallstore.codecs.codec import Bytes
from tallstore.errors import CorruptStoreError

__all__ = ["RawCodec"]


class RawCodec:
    """The identity."""

    number: Final[int] = 0

    def encode(
        self, data: Bytes, *, parameter: int, min_gain: float, side: Bytes | None = None
    ) -> bytes | None:
        """A copy of the bytes."""
        return data.tobytes()

    def decode(
        self, payload: memoryview, out: Bytes, *, parameter: int, side: Bytes | None = None
    ) -> None:
        """Copy the payload."""
        if len(payload) != out.size:
            raise CorruptStoreError(f"{len(payload)} stored bytes, {out.size} expected")
        np.copyto(out, np.frombuffer(payload, np.uint8))
