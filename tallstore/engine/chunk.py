"""The envelope of a chunk: a header of 48 bytes, then the encoded payload.

The checksum covers the store's identity, the key, the header and the payload, so a flipped bit,
a chunk filed under another's key, and a chunk from another store are all found out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from tallstore.codecs import CODECS, RAW, Bytes, Codec
from tallstore.errors import ChecksumError, CorruptStoreError

__all__ = ["HEADER_SIZE", "MAX_CHUNK", "Encoding", "open_chunk", "seal_chunk"]

#: The most bytes a chunk holds before encoding.
MAX_CHUNK: Final = 16 << 20
HEADER_SIZE: Final = 48

_MAGIC: Final = b"TSC1"
_HEAD: Final = struct.Struct("<4sBB2xQQ8x")  # magic, codec, parameter, raw size, payload size


@dataclass(frozen=True, slots=True)
class Encoding:
    """Which codec to try on a chunk, and its parameter."""

    codec: Codec = RAW
    parameter: int = 0


def _digest(store: bytes, key: bytes, head: bytes | memoryview, payload: object) -> bytes:
    state = xxhash.xxh3_128(store)
    state.update(key)
    state.update(head)
    state.update(payload)  # type: ignore[arg-type]
    return state.digest()


def seal_chunk(data: Bytes, *, store: bytes, key: bytes, encoding: Encoding) -> bytearray:
    """Encode `data` and put it into its envelope.

    Parameters
    ----------
    data
        Flat uint8, at most `MAX_CHUNK` bytes.
    store, key
        The store's 16-byte identity and the chunk's key; both go into the checksum.
    encoding
        What to try; the bytes are stored as they are where it gains too little.
    """
    if data.size > MAX_CHUNK:
        raise ValueError(f"a chunk of {data.size} bytes is over {MAX_CHUNK}")
    codec, parameter = encoding.codec, encoding.parameter
    payload: bytes | None = None
    if codec is not RAW and data.size:
        payload = codec.encode(data, parameter=parameter)
    if payload is None:
        codec, parameter = RAW, 0
    size = data.size if payload is None else len(payload)
    chunk = bytearray(HEADER_SIZE + size)
    _HEAD.pack_into(chunk, 0, _MAGIC, codec.number, parameter, data.size, size)
    body = np.frombuffer(chunk, np.uint8)[HEADER_SIZE:]
    np.copyto(body, data if payload is None else np.frombuffer(payload, np.uint8))
    chunk[32:48] = _digest(store, key, bytes(chunk[:32]), body)
    return chunk


def open_chunk(
    chunk: memoryview, out: Bytes | None, *, store: bytes, key: bytes, what: str
) -> None:
    """Check a chunk and decode it into `out`.

    Parameters
    ----------
    chunk
        The stored value.
    out
        Flat uint8 of exactly the chunk's raw size; None only checks.
    what
        What the chunk is, for messages.

    Raises
    ------
    ChecksumError
        The bytes are not those that were written, or were written elsewhere.
    CorruptStoreError
        The envelope or the payload is malformed.
    """
    if len(chunk) < HEADER_SIZE:
        raise CorruptStoreError(f"{what}: {len(chunk)} bytes are too few for a chunk")
    magic, number, parameter, raw_size, size = _HEAD.unpack_from(chunk)
    if magic != _MAGIC:
        raise CorruptStoreError(f"{what}: no chunk starts here (magic {bytes(magic)!r})")
    payload = chunk[HEADER_SIZE:]
    if size != len(payload):
        raise CorruptStoreError(f"{what}: {len(payload)} bytes stored, {size} announced")
    if _digest(store, key, chunk[:32], payload) != bytes(chunk[32:48]):
        raise ChecksumError(
            f"{what}: checksum mismatch; the stored bytes changed since they were written. "
            "Restore the store from a copy, or the task from its original"
        )
    if raw_size > MAX_CHUNK:
        raise CorruptStoreError(f"{what}: a raw size of {raw_size} bytes is over the cap")
    codec = CODECS.get(number)
    if codec is None:
        raise CorruptStoreError(f"{what}: unknown codec {number}; update tallstore")
    if out is None:
        return
    if raw_size != out.size:
        raise CorruptStoreError(f"{what}: holds {raw_size} bytes, {out.size} expected")
    try:
        codec.decode(payload, out, parameter=parameter)
    except CorruptStoreError as exc:
        raise CorruptStoreError(f"{what}: {exc}") from exc
