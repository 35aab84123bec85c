"""Keys in LMDB: (stream, chunk number), big endian, so that one load is one forward scan."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from tallstore.engine.chunk import MAX_CHUNK
from tallstore.errors import CorruptStoreError
from tallstore.strictjson import newer

__all__ = ["MANIFEST_KEY", "Stream", "chunk_key", "split_key"]

#: Sorts after every chunk: stream numbers stay below 2**62.
MANIFEST_KEY: Final = b"manifest"

_KEY: Final = struct.Struct(">QI")
_MAX_STREAM: Final = 1 << 62


def chunk_key(stream: int, chunk: int) -> bytes:
    """The 12-byte key of a chunk."""
    return _KEY.pack(stream, chunk)


def split_key(key: bytes) -> tuple[int, int] | None:
    """(stream, chunk) of a chunk's key, None for any other key."""
    return _KEY.unpack(key) if len(key) == _KEY.size else None


@dataclass(frozen=True, slots=True)
class Stream:
    """A finished stream of `raw` bytes: chunks of `chunk_size` bytes, the last one shorter.

    Stream numbers are handed out in increasing order and never used twice within a store, which
    is what makes a chunk write-once: a later generation of a task has other streams.
    """

    number: int
    chunk_size: int
    raw: int
    """Bytes before encoding."""
    stored: int
    """Bytes in LMDB, envelopes included."""

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.raw // self.chunk_size)

    def raw_size(self, chunk: int) -> int:
        """Bytes of one chunk before encoding."""
        return min(self.chunk_size, self.raw - chunk * self.chunk_size)

    def to_json(self) -> list[int]:
        """As it stands in the manifest."""
        return [self.number, self.chunk_size, self.raw, self.stored]

    @classmethod
    def from_json(cls, record: object) -> Stream:
        """Read what `to_json` wrote.

        Raises
        ------
        CorruptStoreError, NewerFormatError
            It is anything else.
        """
        if isinstance(record, list) and len(record) > 4:
            raise newer("manifest", f"a stream's record of {len(record)} items", ["records of 4"])
        if not (
            isinstance(record, list)
            and len(record) == 4
            and all(type(item) is int and 0 <= item < _MAX_STREAM for item in record)
            and record[0] > 0
            and 0 < record[1] <= MAX_CHUNK
        ):
            raise CorruptStoreError(f"{str(record)[:80]} is no stream's record")
        return cls(*record)
