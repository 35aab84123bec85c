"""The contract of a codec: a chunk's bytes to fewer bytes and back."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Bytes", "Codec"]

#: A flat uint8 array.
Bytes = npt.NDArray[np.uint8]


class Codec(Protocol):
    """One way to write a chunk down. Stateless: `parameter` and `side` are all decoding needs.

    Attributes
    ----------
    number
        Its identity on disk.
    """

    @property
    def number(self) -> int: ...

    def encode(
        self, data: Bytes, *, parameter: int, min_gain: float, side: Bytes | None = None
    ) -> bytes | None:
        """The encoded bytes, or None where that would gain too little.

        Parameters
        ----------
        parameter
            Goes with the payload to disk.
        min_gain
            The least share that encoding must save, of the whole or of a part of it.
        side
            What the reader will have too, as many bytes, for a codec that makes use of it.
        """
        ...

    def decode(
        self, payload: memoryview, out: Bytes, *, parameter: int, side: Bytes | None = None
    ) -> None:
        """Fill `out`, all of it, from `payload`; `side` is what `encode` had.

        Raises
        ------
        CorruptStoreError
            The payload is not what `encode` writes for that many bytes.
        """
        ...
