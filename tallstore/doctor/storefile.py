"""One store: what it is, who uses it, and what interrupted writes left in it and beside it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tallstore.doctor.diagnosis import Problem, Section
from tallstore.errors import TallstoreError

if TYPE_CHECKING:
    from tallstore.store import TallStore

__all__ = ["storefile"]


def storefile(path: Path, *, readable: bool) -> Section:
    """What a store is like, short of verifying its chunks.

    Parameters
    ----------
    path
        Of its file.
    readable
        Whether the packages that reading takes can be imported.
    """
    facts: dict[str, Any] = {"path": str(path), "exists": path.is_file(), "file_bytes": 0}
    problems: list[Problem] = []
    with contextlib.suppress(OSError):
        facts["file_bytes"] = path.stat().st_size
    problems += _beside(path, facts)
    if not readable:
        what = f"{path}: it cannot be looked into, since packages are missing"
        problems.append(Problem(what, "see what is wrong with the programs"))
        return Section(facts, tuple(problems))
    try:
        problems += _inside(path, facts)
    except TallstoreError as exc:
        what, _, cure = str(exc).rpartition("; ")
        restored = "restore it from a copy, or from the originals"
        problems.append(Problem(what or str(exc), cure if what else restored))
    return Section(facts, tuple(problems))


# -- beside it ----------------------------------------------------------------------------


def _unclaimed(path: Path) -> bool:
    """Whether nobody holds a file: who writes it has a lock on it, as long as he lives."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _leftovers(path: Path) -> Iterator[Path]:
    """Temporary files that killed writers left beside a store."""
    for found in sorted(path.parent.glob(f".{glob.escape(path.name)}.*.tmp")):
        if _unclaimed(found):
            yield found


def _beside(path: Path, facts: dict[str, Any]) -> Iterator[Problem]:
    left = {str(found): found.stat().st_size for found in _leftovers(path)}
    facts["leftovers"] = left
    if left:
        what = f"{len(left)} files ({sum(left.values())} bytes) of killed writes: {', '.join(left)}"
        cure = f"the next pack or save to {path} removes them, or delete them"
        yield Problem(what, cure, serious=False)
    writer = path.with_name(path.name + "-writer")
    facts["writer"] = None
    if writer.exists() and not _unclaimed(writer):
        with contextlib.suppress(OSError, ValueError):
            facts["writer"] = int(writer.read_bytes()[:20])


# -- inside it ----------------------------------------------------------------------------


def _inside(path: Path, facts: dict[str, Any]) -> Iterator[Problem]:
    from tallstore.engine.readers import readers
    from tallstore.store import TallStore

    if path.is_file():
        table = readers(path)
        facts["readers"] = None if table is None else list(table.processes)
        facts["stale_readers"] = None if table is None else table.stale
        if table is not None and table.stale:
            what = f"{table.stale} slots of readers that were killed; they kept space from use"
            yield Problem(what, "nothing: they are cleared now", serious=False)
    with TallStore(path) as store:
        used, whole = store.file_bytes()
        facts.update(
            format_version=store.format_version,
            generation=store.generation,
            written_by=store.written_by,
            tasks=len(store.tasks),
            base=store.base.identity,
            file_bytes=whole,
            free_bytes=max(whole - used, 0),
        )
        facts["stray_chunks"] = strays = store._held().strays()
        if strays:
            what = f"{strays} chunks of an interrupted write take space in {path}"
            yield Problem(what, "the next write to it removes them", serious=False)
        yield from _external(store, facts)


def _external(store: TallStore, facts: dict[str, Any]) -> Iterator[Problem]:
    from tallstore.describing import read_base
    from tallstore.externalbase import base_elements

    place = store.external_base
    facts["external_base"] = None if place is None else str(place)
    if place is None:
        return
    try:
        base_elements(store._held(), read_base(store._held(), store._catalog))
    except TallstoreError as exc:
        cure = f"put that base back, or: tallstore relink {store.path} BASE.tall"
        yield Problem(str(exc).partition("; put that base back")[0], cure)
