"""Runs of bytes one after the other, each Huffman-coded where that gains.

A body is a little-endian u32, its length with bit 31 set where it is the bytes as they are, then
these, or one zstd frame.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from tallstore.codecs import zstd
from tallstore.codecs.codec import Bytes
from tallstore.errors import CorruptStoreError

__all__ = ["BodyReader", "BodyWriter"]

_LENGTH: Final = struct.Struct("<I")
_RAW: Final = 1 << 31


class BodyWriter:
    """Gathers bodies."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, data: Bytes) -> None:
        """Write a body."""
        frame = zstd.literals(data)
        if len(frame) < 0.99 * data.size:
            self._parts += (_LENGTH.pack(len(frame)), frame)
        else:
            self._parts += (_LENGTH.pack(data.size | _RAW), data.tobytes())

    def to_bytes(self) -> bytes:
        """All of them."""
        return b"".join(self._parts)


class BodyReader:
    """Gives bodies back one by one."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._at = 0

    def take(self, count: int) -> Bytes:
        """The next body, of `count` bytes: a view of the payload, or new memory.

        Raises
        ------
        CorruptStoreError
            It is not there, or of another size.
        """
        if self._at + _LENGTH.size > len(self._payload):
            raise CorruptStoreError("a payload ends where a body is expected")
        (length,) = _LENGTH.unpack_from(self._payload, self._at)
        size = length & ~_RAW
        start = self._at + _LENGTH.size
        body = self._payload[start : start + size]
        if len(body) != size or (length & _RAW and size != count):
            raise CorruptStoreError(f"a body of {len(body)} bytes where {count} are expected")
        self._at = start + size
        if length & _RAW:
            return np.frombuffer(body, np.uint8)
        out = np.empty(count, np.uint8)
        zstd.decompress(body, out)
        return out

    def finish(self) -> None:
        """Raise `CorruptStoreError` if something follows."""
        if self._at != len(self._payload):
            raise CorruptStoreError("a payload goes on after its last body")
