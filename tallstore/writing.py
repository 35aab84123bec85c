"""Every way to change a store that is there, or to make one of an object: locks, commit, clean-up.

Each function is all or nothing. The caller gives open sources; `tallstore.store` and
`tallstore.api` are the public faces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tallstore.catalog import Catalog, now
from tallstore.describing import read_base
from tallstore.documents import BaseDocument
from tallstore.engine.environment import Environment, lmdb_errors, open_environment
from tallstore.engine.lockless import holding_off
from tallstore.engine.manifest import Manifest
from tallstore.engine.newfile import NewFile
from tallstore.engine.session import WriteSession, pages_in_use, reclaim
from tallstore.engine.snapshot import Snapshot
from tallstore.engine.writerlock import WriterLock
from tallstore.errors import (
    CorruptStoreError,
    StoreExistsError,
    UnknownTaskError,
)
from tallstore.externalbase import open_external, with_base_at
from tallstore.packing.base import write_base
from tallstore.packing.encodings import policy
from tallstore.progress import Meter, Report
from tallstore.sources.source import Source
from tallstore.version import WRITTEN_BY
from tallstore.workers import workers

__all__ = [
    "HeldStore",
    "commit",
    "compact_store",
    "held_for_writing",
    "relink_store",
    "remove_tasks",
    "without_idle_vector",
    "write_object",
]


@dataclass(frozen=True, slots=True)
class HeldStore:
    """An existing store held for writing."""

    environment: Environment
    snapshot: Snapshot
    catalog: Catalog

    @property
    def manifest(self) -> Manifest:
        return self.snapshot.manifest

    def base(self) -> BaseDocument:
        return read_base(self.snapshot, self.catalog)

    @contextmanager
    def committed(self) -> Iterator[Snapshot]:
        """What the store holds by now: `snapshot` is of what it held."""
        self.environment.handles += 1
        found = _snapshot(self.environment)
        try:
            yield found
        finally:
            found.close()


@contextmanager
def held_for_writing(path: Path, *, timeout: float) -> Iterator[HeldStore]:
    """Lock the store at `path` and hold it for writing."""
    with WriterLock(path, timeout=timeout), _held(path, timeout=timeout) as held:
        yield held


@contextmanager
def _held(path: Path, *, timeout: float) -> Iterator[HeldStore]:
    """Hold a locked store for writing, rid of what interrupted writes left in it."""
    environment = open_environment(path)
    try:
        _check_writable(environment)
        with lmdb_errors(path, doing="write"), holding_off(path, timeout=timeout):
            environment.handles += 1
            snapshot = _snapshot(environment)
        try:
            catalog = Catalog.from_json(snapshot.manifest.body, what=str(path))
            reclaim(environment, snapshot.manifest)
            yield HeldStore(environment, snapshot, catalog)
        finally:
            snapshot.close()
    finally:
        environment.close()


def _check_writable(environment: Environment) -> None:
    if environment.refusal is not None:
        raise environment.refusal


def _snapshot(environment: Environment) -> Snapshot:
    try:
        return Snapshot(environment)
    except BaseException:
        environment.close()
        raise


def without_idle_vector(catalog: Catalog) -> Catalog:
    """Drop the shared vector once no task is coded over it."""
    return replace(catalog, vector=catalog.used_vector())


def commit(session: WriteSession, catalog: Catalog) -> None:
    """Make a catalog what the store holds."""
    session.commit(catalog.to_json(), live=catalog.live_streams(), written_by=WRITTEN_BY)


def write_object(
    path: Path,
    source: Source,
    *,
    overwrite: bool,
    compress: bool,
    timeout: float,
    report: Report | None,
) -> None:
    """Make a store whose base is `source`, in the place of the one that is there, if any.

    A store that nobody else has open is replaced by a new file; one in use gets a new generation,
    so that its readers keep what they see.

    Raises
    ------
    StoreExistsError
        The store there has tasks, which hang on its base, and `overwrite` is false.
    """
    with WriterLock(path, timeout=timeout):
        if path.exists() and _write_over(path, source, overwrite, compress, timeout, report):
            return
        new = NewFile(path)
        try:
            manifest = Manifest(store=os.urandom(16))
            with WriteSession(new.environment, manifest, room=_size(source)) as session:
                _fill(session, source, compress, report)
            new.publish(timeout=timeout)
        finally:
            new.discard()


def _write_over(
    path: Path,
    source: Source,
    overwrite: bool,
    compress: bool,
    timeout: float,
    report: Report | None,
) -> bool:
    """Write a new generation into a store that is in use; False where it is not."""
    with _held(path, timeout=timeout) as held:
        if held.catalog.tasks and not overwrite:
            names = ", ".join(map(repr, list(held.catalog.tasks)[:5]))
            raise StoreExistsError(
                f"{path}: saving here would lose its {len(held.catalog.tasks)} tasks ({names}), "
                "which are stored as differences from its base; give task= to add one, "
                "overwrite=True to start afresh, or another path"
            )
        # Two handles are this function's own: the store's and its snapshot's.
        if held.environment.handles <= 2 and not held.environment.in_use_elsewhere():
            return False
        with WriteSession(held.environment, held.manifest, room=_size(source)) as session:
            _fill(session, source, compress, report)
        return True


def _size(source: Source) -> int:
    return sum(segment.nbytes for segment in source.segments)


def _fill(session: WriteSession, source: Source, compress: bool, report: Report | None) -> None:
    total = _size(source)
    with workers() as pool:
        record, _ = write_base(
            session,
            source,
            encoding=policy(compress),
            created=now(),
            workers=pool,
            progress=Meter(report).stage("save", total),
        )
    commit(session, Catalog(base=record))


def remove_tasks(path: Path, names: Sequence[str], *, timeout: float) -> None:
    """Remove tasks; their space is used again by later writes, or given back by compacting.

    Raises
    ------
    UnknownTaskError
        One is not there; nothing was removed.
    """
    with held_for_writing(path, timeout=timeout) as held:
        for name in names:
            if name not in held.catalog.tasks:
                known = ", ".join(map(repr, held.catalog.tasks)) or "none"
                raise UnknownTaskError(f"{path}: no task {name!r}; there are: {known}")
        kept = {n: task for n, task in held.catalog.tasks.items() if n not in names}
        with WriteSession(held.environment, held.manifest) as session:
            commit(session, without_idle_vector(replace(held.catalog, tasks=kept)))


def relink_store(path: Path, base: Path, *, timeout: float) -> str:
    """Say for good which store has the base of the one at `path`; returns what is recorded.

    Raises
    ------
    OptionError
        The store has its base itself.
    WrongBaseError, StoreNotFoundError, NotAStoreError
        The store at `base` does not have it; nothing was changed.
    """
    with held_for_writing(path, timeout=timeout) as held:
        catalog = with_base_at(path, held.catalog, base)
        document = read_base(held.snapshot, catalog)
        if document.external is None:
            raise CorruptStoreError(f"{path}: its base is nowhere")
        open_external(path, document.external, document).close()
        if catalog != held.catalog:
            with WriteSession(held.environment, held.manifest) as session:
                commit(session, catalog)
        return document.external.path


def compact_store(path: Path, *, timeout: float) -> tuple[int, int]:
    """Rewrite the file without free pages; returns its size before and after, in bytes.

    Raises
    ------
    StoreLockedError
        Another handle on it is open; nothing was changed.
    """
    with WriterLock(path, timeout=timeout):
        before = path.stat().st_size if path.exists() else 0
        with _reclaimed(path, timeout=timeout) as environment:
            new = NewFile(path)
            try:
                with lmdb_errors(path, doing="compact", needed=pages_in_use(environment)):
                    new.copy_of(environment)
            except BaseException:
                new.discard()
                raise
        try:
            new.publish(timeout=timeout)
        finally:
            new.discard()
        return before, path.stat().st_size


@contextmanager
def _reclaimed(path: Path, *, timeout: float) -> Iterator[Environment]:
    environment = open_environment(path)
    try:
        _check_writable(environment)
        with lmdb_errors(path, doing="compact"), holding_off(path, timeout=timeout):
            environment.handles += 1
            snapshot = _snapshot(environment)
        try:
            reclaim(environment, snapshot.manifest)
        finally:
            snapshot.close()
        yield environment
    finally:
        environment.close()
