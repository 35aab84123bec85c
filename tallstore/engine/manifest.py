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
from tallstore.errors import ChecksumError, CorruptStoreError, NewerFormatError, NotAStoreError
from tallstore.version import __version__

__all__ = ["FORMAT_VERSIONS", "Manifest"]

#: The versions that are read. Version 2 is version 1 with a list of what a reader has to know: a
#: store that needs nothing beyond version 1 is written in that, byte for byte as ever.
FORMAT_VERSIONS: Final = (1, 2)
#: The field of the body that makes a store one of version 2.
_REQUIRES: Final = "requires"
_FIELDS: Final = ("generation", "next_stream", "written_by", "streams", "body")

_PREFIX: Final = struct.Struct("<8sII16s")  # magic, format version, zero, store identity
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

    @property
    def format_version(self) -> int:
        """The version of the format that a store of this manifest is in."""
        return 2 if self.body.get(_REQUIRES) else 1

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
        prefix = _PREFIX.pack(_MAGIC, self.format_version, 0, self.store)
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
        magic, version, flags, store = _PREFIX.unpack(prefix)
        if magic != _MAGIC:
            raise NotAStoreError(f"{what}: an LMDB file, but not a tallstore")
        if version not in FORMAT_VERSIONS or flags:
            raise _unknown(value, version, flags, what)
        manifest = cls._parse(_text(value[_PREFIX.size :], prefix, what), store, what)
        if manifest.format_version != version:
            raise CorruptStoreError(f"{what}: its format version contradicts its manifest")
        return manifest

    @classmethod
    def _parse(cls, text: bytes, store: bytes, what: str) -> Manifest:
        what = f"{what}: manifest"
        record = strictjson.fields(
            strictjson.loads(text, what=what, max_bytes=MAX_CHUNK), what=what
        )
        strictjson.only(record, _FIELDS, what=what)
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


def _unknown(value: memoryview, version: int, flags: int, what: str) -> Exception:
    """Why a manifest is refused whose prefix holds a version or flags that are not known."""
    for known in FORMAT_VERSIONS:
        # A damaged field, if the checksum holds with what it must have been.
        prefix = _PREFIX.pack(_MAGIC, known, 0, bytes(value[16:32]))
        try:
            check_chunk(value[_PREFIX.size :], store=prefix, key=MANIFEST_KEY, what=what)
        except (CorruptStoreError, NewerFormatError):
            continue
        return ChecksumError(
            f"{what}: manifest: its format version is damaged ({version}, flags {flags:#x}, "
            f"where {known} was written); restore the store from a copy"
        )
    found = f"version {version}" + (f" with flags {flags:#x}" if flags else "")
    known_ones = " and ".join(map(str, FORMAT_VERSIONS))
    return NewerFormatError(
        f"{what}: written in format {found}, tallstore {__version__} reads versions {known_ones}; "
        "update tallstore"
    )


def _text(chunk: memoryview, prefix: bytes, what: str) -> bytes:
    raw_size = int.from_bytes(chunk[8:16], "little")
    if raw_size > MAX_CHUNK:
        raise CorruptStoreError(f"{what}: a manifest of {raw_size} bytes is over the cap")
    text = np.empty(raw_size, np.uint8)
    what = f"{what}: manifest"
    check_chunk(chunk, store=prefix, key=MANIFEST_KEY, what=what).decode(text, what=what)
    return text.tobytes()
