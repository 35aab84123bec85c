"""Verifying a store: every chunk against its checksum, every document against its rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tallstore.catalog import Catalog
from tallstore.damage import Damage, damage_of
from tallstore.decoding import Decoder
from tallstore.describing import describe, read_base
from tallstore.documents import BaseDocument
from tallstore.engine.keys import Stream
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError, NewerFormatError, TallstoreError
from tallstore.externalbase import OUTSIDE, base_elements
from tallstore.packing.writing import chunk_digest, content_identity
from tallstore.progress import Meter
from tallstore.workers import workers

__all__ = ["ExternalCheck", "Problem", "Verification", "verify_snapshot"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something damaged, and whom it concerns."""

    message: str
    owners: tuple[str, ...]
    """``"base"``, ``"shared vector"``, ``"task 'math'"``."""
    chunk: tuple[int, int] | None = None
    """The stream and chunk, where it is one that is damaged."""


@dataclass(frozen=True, slots=True)
class ExternalCheck:
    """What was checked of a base in another store."""

    path: Path
    chunks: int
    nbytes: int
    """Stored bytes checked."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What verifying found."""

    chunks: int
    nbytes: int
    """Stored bytes checked."""
    problems: tuple[Problem, ...]
    stray: int
    """Chunks that an interrupted write left; the next write removes them."""
    external: ExternalCheck | None = None
    """Of the store that has the base, where that is another one."""
    base: Damage | None = None
    """What is damaged of the base."""
    tasks: Mapping[str, Damage] = field(default_factory=dict)
    """The tasks that do not load whole, by name; those not named here do, bit for bit."""

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
    snapshot: Snapshot, catalog: Catalog, *, outside: bool = True, meter: Meter | None = None
) -> Verification:
    """Check every chunk of every live stream, every document, and a base in another store.

    Never raises for damage: everything that is damaged is listed.

    Parameters
    ----------
    outside
        Whether the chunks of a base in another store are checked.
    """
    owners = _owners(catalog)
    meter = meter or Meter(None)
    streams = snapshot.manifest.streams
    problems: list[Problem] = []
    progress = meter.stage("verify", sum(stream.stored for stream in streams.values()))

    def check(item: tuple[Stream, int]) -> Problem | None:
        stream, chunk = item
        try:
            snapshot.read_chunk(stream, chunk, None)
        except (CorruptStoreError, NewerFormatError) as exc:
            who = tuple(owners.get(stream.number, ()))
            return Problem(str(exc), who, (stream.number, chunk))
        finally:
            progress(stream.stored // max(stream.chunks, 1))
        return None

    items = [(s, chunk) for s in streams.values() for chunk in range(s.chunks)]
    with workers() as pool:
        problems += [found for found in pool.each(check, items) if found is not None]
    for number in catalog.live_streams() - set(streams):
        message = f"{snapshot.path}: stream {number} is referred to but not in the manifest"
        problems.append(Problem(message, tuple(owners[number])))
    external = None
    elsewhere: list[Problem] = []
    if not problems and outside and catalog.base is not None and catalog.base.external is not None:
        try:
            external, elsewhere = _external(snapshot, catalog, meter)
        except TallstoreError as exc:
            elsewhere = [Problem(str(exc), (OUTSIDE,))]
    if not problems and not elsewhere:
        problems += _documents(snapshot, catalog)
    if elsewhere and (external is None or not all(problem.chunk for problem in elsewhere)):
        nothing = Damage(frozenset({OUTSIDE}), (), ())
        damaged = dict.fromkeys((None, *catalog.tasks), nothing)
    else:
        damaged = _damaged(snapshot, catalog, problems, elsewhere) if problems + elsewhere else {}
    problems += [replace(problem, chunk=None) for problem in elsewhere]
    problems += [Problem(message, ()) for message in snapshot.page_damage()]
    stray = snapshot.strays()
    nbytes = sum(stream.stored for stream in streams.values())
    base = damaged.pop(None, None)
    tasks = {name: damage for name, damage in damaged.items() if name is not None}
    return Verification(len(items), nbytes, tuple(problems), stray, external, base, tasks)


def _damaged(
    snapshot: Snapshot,
    catalog: Catalog,
    problems: Sequence[Problem],
    elsewhere: Sequence[Problem],
) -> dict[str | None, Damage]:
    """What damaged chunks do; those of `elsewhere` are of the store that has the base."""
    bad, outside = (
        {problem.chunk for problem in some if problem.chunk is not None}
        for some in (problems, elsewhere)
    )
    found = {
        task: damage_of(snapshot, catalog, task, bad, outside=outside)
        for task in (None, *catalog.tasks)
    }
    return {task: damage for task, damage in found.items() if damage is not None}


def _documents(snapshot: Snapshot, catalog: Catalog) -> list[Problem]:
    problems = []
    base: BaseDocument | None = None
    for task in (None, *catalog.tasks):
        try:
            described = describe(snapshot, catalog, task=task, base=base)
            base = described.base
            Decoder(snapshot, base, task=described.task, vector=catalog.vector)
        except TallstoreError as exc:
            owner = "base" if task is None else f"task {task!r}"
            problems.append(Problem(str(exc), (owner,)))
    return problems


def _external(
    snapshot: Snapshot, catalog: Catalog, meter: Meter
) -> tuple[ExternalCheck, list[Problem]]:
    """Check a base in another store: its chunks, and its identity anew from what they hold."""
    base = read_base(snapshot, catalog)
    home, streams = base_elements(snapshot, base)
    records = [home.stream(number) for number in streams]
    nbytes = sum(record.stored for record in records)
    progress = meter.stage("base", nbytes)
    found = ExternalCheck(home.path, sum(record.chunks for record in records), nbytes)
    digests: list[str] = []
    problems: list[Problem] = []

    def check(item: tuple[Stream, int]) -> str | Problem:
        record, chunk = item
        try:
            return chunk_digest(home, record, chunk)
        except (CorruptStoreError, NewerFormatError) as exc:
            return Problem(str(exc), (OUTSIDE,), (record.number, chunk))
        finally:
            progress(record.stored // max(record.chunks, 1))

    with workers() as pool:
        for result in pool.each(check, [(r, chunk) for r in records for chunk in range(r.chunks)]):
            if isinstance(result, Problem):
                problems.append(result)
            else:
                digests.append(result)
    if not problems and catalog.base is not None:
        identity = content_identity(base.contents, digests)
        if identity != catalog.base.identity:
            message = (
                f"{home.path}: its base is said to be {catalog.base.identity}, but holds the "
                f"weights of {identity}; restore that store from a copy"
            )
            problems.append(Problem(message, (OUTSIDE,)))
    return found, problems
