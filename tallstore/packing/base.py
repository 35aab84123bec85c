"""Writing a base."""

from __future__ import annotations

from collections.abc import Callable

from tallstore.catalog import BaseRecord
from tallstore.codecs import Bytes
from tallstore.documents import BaseDocument
from tallstore.engine.chunk import Encoding
from tallstore.engine.session import WriteSession
from tallstore.layout import lay_out
from tallstore.ops import Workers
from tallstore.packing.writing import (
    Progress,
    content_identity,
    write_arenas,
    write_blob,
    write_contents,
)
from tallstore.sources.source import Source

__all__ = ["write_base"]


def write_base(
    session: WriteSession,
    source: Source,
    *,
    encoding: Callable[[str, Bytes], Encoding],
    created: str,
    workers: Workers,
    progress: Progress,
) -> tuple[BaseRecord, BaseDocument]:
    """Write a checkpoint as a store's base."""
    identity = content_identity(source, workers=workers)
    contents, file_streams = write_contents(session, source)
    streams = write_arenas(
        session,
        lay_out(contents.segments),
        source.read,
        encoding=encoding,
        workers=workers,
        progress=progress,
    )
    document = BaseDocument(contents=contents, streams=streams)
    number = write_blob(session, document.to_bytes())
    record = BaseRecord(
        document=number,
        streams=(*streams, *file_streams),
        identity=identity,
        label=source.label,
        kind=source.kind,
        tensors=len(contents.tensors),
        weights=sum(segment.numel for segment in contents.segments),
        nbytes=contents.nbytes,
        created=created,
    )
    return record, document
