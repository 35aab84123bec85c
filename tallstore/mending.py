"""Records and documents of what is left of a task, or a base, after some of it is gone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from tallstore.catalog import BaseRecord, Catalog, TaskRecord
from tallstore.codes import ArenaCode
from tallstore.describing import describe, read_base
from tallstore.documents import CODE, Contents, StoredFile
from tallstore.engine.session import WriteSession
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError
from tallstore.packing.writing import write_blob

__all__ = ["base_without", "codes_hit", "has_codes", "task_without"]


def has_codes(snapshot: Snapshot, catalog: Catalog, name: str) -> bool:
    """Whether a task has codes everywhere, so that it can do without residuals."""
    task = describe(snapshot, catalog, task=name).task
    if task is None:
        return False
    if task.codings is None:
        return all(code.coded for code in task.codes)
    return all(p.segment in task.codings for ps in task.parts for p in ps if p.kind == CODE)


def codes_hit(snapshot: Snapshot, catalog: Catalog, name: str, bad: Collection[int]) -> bool:
    """Whether a damaged stream is one of a task's codes, or of the vector that they are over."""
    task = describe(snapshot, catalog, task=name).task
    if task is None:
        return False
    codes = [code for code in task.codes if code.coded]
    streams = {n for code in codes for n in (code.planes, code.sparse, code.seeded)}
    if catalog.vector is not None and any(code.shared for code in codes):
        streams |= set(catalog.vector.streams)
    return not streams.isdisjoint(bad)


def _kept_files(contents: Contents, gone: Sequence[str]) -> tuple[Contents, set[int]]:
    """Contents without some files, and the streams of the files that stay."""
    files: tuple[StoredFile, ...] = tuple(f for f in contents.files if f.path not in gone)
    return replace(contents, files=files), {file.stream for file in files}


def base_without(
    session: WriteSession,
    snapshot: Snapshot,
    catalog: Catalog,
    record: BaseRecord,
    gone: Sequence[str],
) -> BaseRecord:
    """A base's record, and its document written anew, without some files."""
    document = read_base(snapshot, catalog)
    contents, files = _kept_files(document.contents, gone)
    number = write_blob(session, replace(document, contents=contents).to_bytes())
    streams = tuple(sorted({*filter(None, document.streams), *files} - {0}))
    return replace(record, document=number, streams=streams, nbytes=contents.nbytes)


def task_without(
    session: WriteSession,
    snapshot: Snapshot,
    catalog: Catalog,
    name: str,
    *,
    exact: bool,
    codes: bool,
    files: Sequence[str],
) -> TaskRecord:
    """A task's record and document without its exact tier, its codes, or some files."""
    record, document = catalog.tasks[name], describe(snapshot, catalog, task=name).task
    if document is None:
        raise CorruptStoreError(f"{snapshot.path}: task {name!r} has no document")
    contents, kept = _kept_files(document.contents, files)
    document = replace(document, contents=contents)
    if not exact:
        left = tuple(replace(code, exact=None) for code in document.codes)
        document = replace(document, codes=left)
        record = replace(record, exact=False)
    if not codes:
        left = tuple(
            ArenaCode(code.arena, code.dtype, None, code.exact, bits=0, over_base=True)
            for code in document.codes
        )
        document = replace(document, codes=left, codings={}, stats=())
        record = replace(
            record, code="none", bits=0, density=None, relative_error=None, shared=False
        )
    number = write_blob(session, document.to_bytes())
    needed = {number for code in document.codes for number in code.streams}
    return replace(
        record,
        document=number,
        streams=tuple(sorted({*document.own_streams, *kept, *needed} - {0})),
        nbytes=contents.nbytes,
    )
