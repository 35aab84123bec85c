"""Writing a base."""

from __future__ import annotations

from tallstore.catalog import BaseRecord
from tallstore.documents import BaseDocument, ExternalReference
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

__all__ = ["refer_to_base", "write_base"]


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
    return _record(
        session,
        source,
        document,
        streams=(*streams, *file_streams),
        identity=content_identity(contents, digests),
        created=created,
    )


def refer_to_base(
    session: WriteSession, source: Source, reference: ExternalReference, *, created: str
) -> tuple[BaseRecord, BaseDocument]:
    """Write all about a base but its elements, which are in another store.

    Parameters
    ----------
    source
        The base of that store. Its files are kept here too: tasks share them.
    """
    contents, file_streams = write_contents(session, source)
    streams = (0,) * len(lay_out(contents.segments).arenas)
    document = BaseDocument(contents=contents, streams=streams, external=reference)
    return _record(
        session,
        source,
        document,
        streams=file_streams,
        identity=reference.identity,
        created=created,
    )


def _record(
    session: WriteSession,
    source: Source,
    document: BaseDocument,
    *,
    streams: tuple[int, ...],
    identity: str,
    created: str,
) -> tuple[BaseRecord, BaseDocument]:
    contents = document.contents
    number = write_blob(session, document.to_bytes())
    record = BaseRecord(
        document=number,
        streams=streams,
        identity=identity,
        label=source.label,
        kind=source.kind,
        tensors=len(contents.tensors),
        weights=sum(segment.numel for segment in contents.segments),
        nbytes=contents.nbytes,
        created=created,
        external=None if document.external is None else document.external.path,
    )
    return record, document
