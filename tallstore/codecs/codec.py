"""The contract of a codec: a chunk's bytes to fewer bytes and back."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Bytes", "Codec"]

#: A flat uint8 array.
Bytes = npt.NDArray[np.uint8]


class Codec(Protocol):
    """One way to write a chunk down. Stateless: `parameter` is all that decoding needs.

    Attributes
    ----------
    number
        Its identity on disk.
    """

    @property
    def number(self) -> int: ...

    def encode(self, data: Bytes, *, parameter: int) -> bytes | None:
        """The encoded bytes, or None where that would gain less than 5 %."""
        ...

    def decode(self, payload: memoryview, out: Bytes, *, parameter: int) -> None:
        """Fill `out`, all of it, from `payload`.

        Raises
        ------
        CorruptStoreError
            The payload is not what `encode` writes for that many bytes.
        """
        ...
