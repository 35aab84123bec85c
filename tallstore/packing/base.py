"""Writing a base."""

from __future__ import annotations

from tallstore.catalog import BaseRecord
from tallstore.documents import BaseDocument
from tallstore.engine.session import WriteSession
from tallstore.layout import lay_out
from tallstore.packing.encodings import Policy
from tallstore.packing.writing import (
    Progress,
    content_identity,
    write_arenas,
    write_blob,
    write_contents,
)
from tallstore.sources.source import Source
from tallstore.workers import Workers

__all__ = ["write_base"]


def write_base(
    session: WriteSession,
    source: Source,
    *,
    encoding: Policy,
    created: str,
    workers: Workers,
    progress: Progress,
) -> tuple[BaseRecord, BaseDocument]:
    """Write a checkpoint as a store's base."""
    contents, file_streams = write_contents(session, source)
    streams, digests = write_arenas(
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
        identity=content_identity(contents, digests),
        label=source.label,
        kind=source.kind,
        tensors=len(contents.tensors),
        weights=sum(segment.numel for segment in contents.segments),
        nbytes=contents.nbytes,
        created=created,
    )
    return record, document
