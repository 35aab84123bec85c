"""Verifying a store: every chunk against its checksum, every document against its rules."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from tallstore.catalog import Catalog
from tallstore.engine.keys import Stream
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError, NewerFormatError, TallstoreError
from tallstore.loading import Loader, Progress, no_progress
from tallstore.workers import workers

__all__ = ["Problem", "Verification", "verify_snapshot"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something damaged, and whom it concerns."""

    message: str
    owners: tuple[str, ...]
    """``"base"``, ``"shared vector"``, ``"task 'math'"``."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What verifying found."""

    chunks: int
    nbytes: int
    """Stored bytes checked."""
    problems: tuple[Problem, ...]
    stray: int
    """Chunks that an interrupted write left; the next write removes them."""

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not self.problems


def _owners(catalog: Catalog) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    if catalog.base is not None:
        for stream in {catalog.base.document, *catalog.base.streams}:
            owners[stream].append("base")
    if catalog.vector is not None:
        for stream in catalog.vector.streams:
            owners[stream].append("shared vector")
    for name, task in catalog.tasks.items():
        for stream in {task.document, *task.streams}:
            owners[stream].append(f"task {name!r}")
    return owners


def verify_snapshot(
    snapshot: Snapshot, catalog: Catalog, *, progress: Progress = no_progress
) -> Verification:
    """Check every chunk of every live stream, and every document.

    Never raises for damage: everything that is damaged is listed.
    """
    owners = _owners(catalog)
    streams = snapshot.manifest.streams
    problems: list[Problem] = []

    def check(item: tuple[Stream, int]) -> Problem | None:
        stream, chunk = item
        try:
            snapshot.read_chunk(stream, chunk, None)
        except (CorruptStoreError, NewerFormatError) as exc:
            return Problem(str(exc), tuple(owners.get(stream.number, ())))
        finally:
            progress(stream.stored // max(stream.chunks, 1))
        return None

    items = [(s, chunk) for s in streams.values() for chunk in range(s.chunks)]
    with workers() as pool:
        problems += [found for found in pool.each(check, items) if found is not None]
    for number in catalog.live_streams() - set(streams):
        message = f"{snapshot.path}: stream {number} is referred to but not in the manifest"
        problems.append(Problem(message, tuple(owners[number])))
    if not problems:
        problems += _documents(snapshot, catalog)
    stray = 0
    try:
        stray = snapshot.strays()
    except TallstoreError as exc:
        problems.append(Problem(str(exc), ()))
    nbytes = sum(stream.stored for stream in streams.values())
    return Verification(len(items), nbytes, tuple(problems), stray)


def _documents(snapshot: Snapshot, catalog: Catalog) -> list[Problem]:
    problems = []
    for task in (None, *catalog.tasks):
        try:
            Loader(snapshot, catalog, task=task)
        except TallstoreError as exc:
            owner = "base" if task is None else f"task {task!r}"
            problems.append(Problem(str(exc), (owner,)))
    return problems
