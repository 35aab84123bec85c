"""Segments, files and documents to streams: the parts that every kind of save shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from tallstore import strictjson
from tallstore.codecs import Bytes
from tallstore.documents import Contents, StoredFile
from tallstore.dtypes import itemsize
from tallstore.engine.chunk import ChunkBuffer, Encoding
from tallstore.engine.keys import Stream
from tallstore.engine.session import WriteSession
from tallstore.engine.snapshot import Snapshot
from tallstore.layout import Layout
from tallstore.packing.encodings import BITS, DOCUMENT, Policy
from tallstore.sources.source import Source
from tallstore.workers import Workers

__all__ = [
    "Progress",
    "SegmentReader",
    "chunk_digest",
    "content_identity",
    "write_arenas",
    "write_blob",
    "write_contents",
]

#: Called with the bytes that were just dealt with; from any thread.
Progress = Callable[[int], None]
#: Fills a buffer with the bytes of a segment from a byte on.
SegmentReader = Callable[[int, int, Bytes], None]

_BLOB_CHUNK = 4 << 20


def write_blob(session: WriteSession, data: bytes, *, encoding: Encoding = DOCUMENT) -> int:
    """Write bytes as a stream of their own; returns its number."""
    writer = session.stream(_BLOB_CHUNK)
    flat = np.frombuffer(data, np.uint8)
    for chunk, start in enumerate(range(0, flat.size, _BLOB_CHUNK)):
        writer.put(chunk, flat[start : start + _BLOB_CHUNK], encoding=encoding)
    return writer.number


def write_arenas(
    session: WriteSession,
    layout: Layout,
    read: SegmentReader,
    *,
    encoding: Policy,
    workers: Workers,
    progress: Progress,
) -> tuple[tuple[int, ...], list[str]]:
    """Write all arenas of a layout, a stream each and a chunk a span.

    Parameters
    ----------
    read
        Gives the bytes of the layout's segments.
    encoding
        The encoding of a chunk, from its dtype and its bytes.

    Returns
    -------
    streams
        One an arena.
    digests
        XXH3-128 of the bytes of every span, arena by arena.
    """
    writers = [session.stream(arena.chunk_size) for arena in layout.arenas]

    def write(item: tuple[int, int]) -> str:
        arena, span = item
        buffer = ChunkBuffer.of(_span_bytes(layout, arena, span))
        data = buffer.data
        read_span(layout, arena, span, read, out=data)
        digest = _digest(data)
        policy = encoding(layout.arenas[arena].dtype, data)
        writers[arena].put_buffer(span, buffer, encoding=policy)
        progress(data.size)
        return digest

    spans = [(a, span) for a, arena in enumerate(layout.arenas) for span in range(arena.spans)]
    digests = list(workers.each(write, spans))
    return tuple(writer.number for writer in writers), digests


def _span_bytes(layout: Layout, arena: int, span: int) -> int:
    record = layout.arenas[arena]
    weights = min(record.span, record.weights - span * record.span)
    return weights * itemsize(record.dtype)


def read_span(
    layout: Layout, arena: int, span: int, read: SegmentReader, *, out: Bytes | None = None
) -> Bytes:
    """The bytes of one span, padding zeroed; in `out`, where that is given."""
    size = itemsize(layout.arenas[arena].dtype)
    data = np.empty(_span_bytes(layout, arena, span), np.uint8) if out is None else out
    end = 0
    for piece in layout.pieces(arena, span):
        data[end : piece.within * size] = 0
        end = (piece.within + piece.count) * size
        read(piece.segment, piece.start * size, data[piece.within * size : end])
    data[end:] = 0
    return data


def write_contents(
    session: WriteSession, source: Source, *, known: Sequence[tuple[StoredFile, bytes]] = ()
) -> tuple[Contents, tuple[int, ...]]:
    """Write a source's files and describe it.

    Parameters
    ----------
    known
        Files already stored, with the digest of each: a file of the same content refers to it.

    Returns
    -------
    contents
        Without anything about where segments are.
    streams
        What was written.
    """
    held = {(digest, file.nbytes): file for file, digest in known}
    files, blobs, offset = [], [], 0
    pending = []
    for spec in source.files:
        data = source.read_file(spec.path)
        found = held.get((file_digest(data), len(data)))
        if found is not None:
            files.append(StoredFile(spec.path, len(data), found.stream, found.offset))
        else:
            pending.append((len(files), spec.path, len(data), offset))
            files.append(StoredFile(spec.path, len(data), 0, offset))
            blobs.append(data)
            offset += len(data)
    streams: tuple[int, ...] = ()
    if pending:
        number = write_blob(session, b"".join(blobs), encoding=BITS)
        streams = (number,)
        for index, path, nbytes, start in pending:
            files[index] = StoredFile(path, nbytes, number, start)
    contents = Contents(
        kind=source.kind,
        tree=source.tree,
        tensors=tuple(source.tensors),
        segments=tuple(source.segments),
        files=tuple(files),
    )
    return contents, streams


def file_digest(data: bytes) -> bytes:
    """What tells whether two files are the same."""
    return hashlib.sha256(data).digest()


def _digest(data: Bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data.data)


def chunk_digest(snapshot: Snapshot, stream: Stream, chunk: int) -> str:
    """What `write_arenas` gave for a chunk, from what is stored, checked on the way."""
    data = np.empty(stream.raw_size(chunk), np.uint8)
    snapshot.read_chunk(stream, chunk, data)
    return _digest(data)


def content_identity(contents: Contents, digests: Sequence[str]) -> str:
    """A hash of a checkpoint's tensors, in the order in which its document lists them.

    SHA-256 of their names, shapes and dtypes and of the digests of all spans: it tells bases apart
    by accident-proof margins, and is no defence against forgery.
    """
    described = contents.to_json()
    record = [described["tensors"], described["segments"], list(digests)]
    return hashlib.sha256(strictjson.dumps(record)).hexdigest()
