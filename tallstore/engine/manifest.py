"""The committed description of a store: one strict-JSON document under one key.

The engine's own part is the store's identity, the generation and the table of streams. What the
streams mean (a base, tasks) is `body`, which the layers above write and read.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from tallstore import strictjson
from tallstore.codecs import ZSTD
from tallstore.engine.chunk import (
    HEADER_SIZE,
    MAX_CHUNK,
    ChunkBuffer,
    Encoding,
    check_chunk,
    seal_chunk,
)
from tallstore.engine.keys import MANIFEST_KEY, Stream
from tallstore.errors import CorruptStoreError, NewerFormatError, NotAStoreError

__all__ = ["FORMAT_VERSION", "Manifest"]

#: Raised by every change that an older tallstore would misread.
FORMAT_VERSION: Final = 1

_PREFIX: Final = struct.Struct("<8sI4x16s")  # magic, format version, store identity
_MAGIC: Final = b"TALLSTOR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a store holds at one generation."""

    store: bytes
    """The store's identity: 16 random bytes, part of every checksum."""
    generation: int = 0
    """How many commits there were."""
    next_stream: int = 1
    """The first stream number not handed out yet."""
    streams: Mapping[int, Stream] = field(default_factory=dict)
    """Every live stream; a chunk of any other stream is what an interrupted write left."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """What the layers above keep here."""
    written_by: str = ""
    """The program that wrote it, for people."""

    def to_bytes(self) -> bytes:
        """The value under `MANIFEST_KEY`: a fixed prefix, then the JSON in a chunk's envelope."""
        text = strictjson.dumps(
            {
                "generation": self.generation,
                "next_stream": self.next_stream,
                "written_by": self.written_by,
                "streams": [stream.to_json() for _, stream in sorted(self.streams.items())],
                "body": self.body,
            }
        )
        if len(text) > MAX_CHUNK:
            raise ValueError(f"a manifest of {len(text)} bytes is over the cap of {MAX_CHUNK}")
        prefix = _PREFIX.pack(_MAGIC, FORMAT_VERSION, self.store)
        buffer = ChunkBuffer.of(len(text))
        np.copyto(buffer.data, np.frombuffer(text, np.uint8))
        chunk = seal_chunk(
            buffer,
            store=prefix,
            key=MANIFEST_KEY,
            encoding=Encoding(ZSTD),
        )
        return prefix + bytes(chunk)

    @classmethod
    def from_bytes(cls, value: memoryview, *, what: str) -> Manifest:
        """Read a manifest.

        Parameters
        ----------
        value
            What stands under `MANIFEST_KEY`.
        what
            The store's path, for messages.

        Raises
        ------
        NotAStoreError, NewerFormatError, CorruptStoreError
        """
        if len(value) < _PREFIX.size + HEADER_SIZE:
            raise CorruptStoreError(f"{what}: the manifest has only {len(value)} bytes")
        prefix = bytes(value[: _PREFIX.size])
        magic, version, store = _PREFIX.unpack(prefix)
        if magic != _MAGIC:
            raise NotAStoreError(f"{what}: an LMDB file, but not a tallstore")
        if version != FORMAT_VERSION:
            raise NewerFormatError(
                f"{what}: written in format version {version}, this tallstore reads version "
                f"{FORMAT_VERSION}; update tallstore"
            )
        return cls._parse(_text(value[_PREFIX.size :], prefix, what), store, what)

    @classmethod
    def _parse(cls, text: bytes, store: bytes, what: str) -> Manifest:
        what = f"{what}: manifest"
        record = strictjson.fields(
            strictjson.loads(text, what=what, max_bytes=MAX_CHUNK), what=what
        )
        streams = [
            Stream.from_json(item)
            for item in strictjson.list_field(record, "streams", list, what=what)
        ]
        manifest = cls(
            store=store,
            generation=strictjson.field(record, "generation", int, what=what),
            next_stream=strictjson.field(record, "next_stream", int, what=what),
            streams={stream.number: stream for stream in streams},
            body=strictjson.str_keys(record, "body", what=what),
            written_by=strictjson.field(record, "written_by", str, what=what),
        )
        if len(manifest.streams) != len(streams) or any(
            number >= manifest.next_stream for number in manifest.streams
        ):
            raise CorruptStoreError(f"{what}: the table of streams contradicts itself")
        return manifest


def _text(chunk: memoryview, prefix: bytes, what: str) -> bytes:
    raw_size = int.from_bytes(chunk[8:16], "little")
    if raw_size > MAX_CHUNK:
        raise CorruptStoreError(f"{what}: a manifest of {raw_size} bytes is over the cap")
    text = np.empty(raw_size, np.uint8)
    what = f"{what}: manifest"
    check_chunk(chunk, store=prefix, key=MANIFEST_KEY, what=what).decode(text, what=what)
    return text.tobytes()
