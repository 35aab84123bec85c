"""The envelope of a chunk: a header of 48 bytes, then the encoded payload.

The checksum covers the store's identity, the key, the header and the payload, so a flipped bit,
a chunk filed under another's key, and a chunk from another store are all found out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import xxhash

from tallstore.codecs import CODECS, RAW, Bytes, Codec
from tallstore.errors import ChecksumError, CorruptStoreError
from tallstore.strictjson import newer

__all__ = [
    "HEADER_SIZE",
    "MAX_CHUNK",
    "CheckedChunk",
    "ChunkBuffer",
    "Encoding",
    "check_chunk",
    "seal_chunk",
]

#: The most bytes a chunk holds before encoding.
MAX_CHUNK: Final = 16 << 20
HEADER_SIZE: Final = 48

_MAGIC: Final = b"TSC1"
# magic, codec, parameter, zero, raw size, payload size, zero
_HEAD: Final = struct.Struct("<4sBBHQQQ")


@dataclass(frozen=True, slots=True)
class Encoding:
    """Which codec to try on a chunk, its parameter, and the least share it must save."""

    codec: Codec = RAW
    parameter: int = 0
    min_gain: float = 0.05
    side: Bytes | None = field(default=None, compare=False, repr=False)
    """As many bytes as the chunk's, which whoever reads it will have too."""
    otherwise: Encoding | None = None
    """Another one to try: the shorter payload is taken, of equals the first."""

    def encode(self, data: Bytes) -> tuple[Codec, int, bytes] | None:
        """Codec, parameter and payload; None where nothing gains enough."""
        found = None if self.otherwise is None else self.otherwise.encode(data)
        if self.codec is RAW or not data.size:
            return found
        payload = self.codec.encode(
            data, parameter=self.parameter, min_gain=self.min_gain, side=self.side
        )
        if payload is None or (found is not None and len(found[2]) < len(payload)):
            return found
        return self.codec, self.parameter, payload


def _digest(store: bytes, key: bytes, head: bytes | memoryview, payload: object) -> bytes:
    state = xxhash.xxh3_128(store)
    state.update(key)
    state.update(head)
    state.update(payload)  # type: ignore[arg-type]
    return state.digest()


@dataclass(frozen=True, slots=True)
class ChunkBuffer:
    """Room for a chunk: its data, and before it the header, so that sealing copies nothing."""

    whole: Bytes

    @classmethod
    def of(cls, size: int) -> ChunkBuffer:
        """Room for `size` bytes of data, content undefined."""
        return cls(np.empty(HEADER_SIZE + size, np.uint8))

    @property
    def data(self) -> Bytes:
        """Where the data go."""
        return self.whole[HEADER_SIZE:]


def seal_chunk(buffer: ChunkBuffer, *, store: bytes, key: bytes, encoding: Encoding) -> memoryview:
    """Encode a chunk and complete its envelope.

    Parameters
    ----------
    buffer
        At most `MAX_CHUNK` bytes of data; it becomes the chunk, unless encoding gains.
    store, key
        The store's 16-byte identity and the chunk's key; both go into the checksum.
    encoding
        What to try; the bytes are stored as they are where it gains too little.
    """
    data = buffer.data
    if data.size > MAX_CHUNK:
        raise ValueError(f"a chunk of {data.size} bytes is over {MAX_CHUNK}")
    found = encoding.encode(data)
    if found is None:
        whole, number, parameter = buffer.whole, RAW.number, 0
    else:
        codec, parameter, payload = found
        whole, number = ChunkBuffer.of(len(payload)).whole, codec.number
        np.copyto(whole[HEADER_SIZE:], np.frombuffer(payload, np.uint8))
    chunk = whole.data
    size = len(chunk) - HEADER_SIZE
    _HEAD.pack_into(chunk, 0, _MAGIC, number, parameter, 0, data.size, size, 0)
    chunk[32:48] = _digest(store, key, chunk[:32], chunk[HEADER_SIZE:])
    return chunk


@dataclass(frozen=True, slots=True)
class CheckedChunk:
    """A chunk whose envelope and checksum are right."""

    codec: Codec
    parameter: int
    raw_size: int
    payload: memoryview

    @property
    def is_raw(self) -> bool:
        """Whether the payload is the data."""
        return self.codec is RAW

    def decode(self, out: Bytes, *, what: str, side: Bytes | None = None) -> None:
        """Decode into `out`, which has exactly the raw size; `side` is what its encoding had.

        Raises
        ------
        CorruptStoreError
            The payload is malformed.
        """
        if self.raw_size != out.size:
            raise CorruptStoreError(f"{what}: holds {self.raw_size} bytes, {out.size} expected")
        try:
            self.codec.decode(self.payload, out, parameter=self.parameter, side=side)
        except CorruptStoreError as exc:
            raise CorruptStoreError(f"{what}: {exc}") from exc


def check_chunk(chunk: memoryview, *, store: bytes, key: bytes, what: str) -> CheckedChunk:
    """Check a stored value.

    Parameters
    ----------
    chunk
        The value; the result refers to it.
    store, key
        As when it was sealed.
    what
        What the chunk is, for messages.

    Raises
    ------
    ChecksumError
        The bytes are not those that were written, or were written elsewhere.
    CorruptStoreError
        The envelope is malformed.
    NewerFormatError
        It is as it was written, by a later tallstore.
    """
    if len(chunk) < HEADER_SIZE:
        raise CorruptStoreError(f"{what}: {len(chunk)} bytes are too few for a chunk")
    magic, number, parameter, flags, raw_size, size, reserved = _HEAD.unpack_from(chunk)
    payload = chunk[HEADER_SIZE:]
    if magic[:3] != _MAGIC[:3]:
        raise CorruptStoreError(f"{what}: no chunk starts here (magic {bytes(magic)!r})")
    if size != len(payload):
        raise CorruptStoreError(f"{what}: {len(payload)} bytes stored, {size} announced")
    if _digest(store, key, chunk[:32], payload) != bytes(chunk[32:48]):
        raise ChecksumError(
            f"{what}: checksum mismatch; the stored bytes changed since they were written. "
            "Restore the store from a copy, or the task from its original"
        )
    if raw_size > MAX_CHUNK:
        raise CorruptStoreError(f"{what}: a raw size of {raw_size} bytes is over the cap")
    # The checksum is right, so the header is what somebody wrote: nothing below is damage.
    if magic != _MAGIC:
        raise newer(what, f"a chunk of version {bytes(magic[3:])!r}", [repr(_MAGIC[3:])])
    if flags or reserved:
        raise newer(what, f"flags {flags:#x}, {reserved:#x} in a chunk's header", ["none there"])
    codec = CODECS.get(number)
    if codec is None:
        raise newer(what, f"codec {number}", sorted(CODECS))
    if codec is RAW and raw_size != size:
        raise CorruptStoreError(f"{what}: {size} bytes stored as they are, of {raw_size}")
    return CheckedChunk(codec, parameter, raw_size, payload)
