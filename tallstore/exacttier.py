"""The exact tier of tasks that are there: taken off, or put back from an original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tallstore.catalog import Catalog, TaskRecord
from tallstore.codecs import Bytes
from tallstore.codes import PLANES, TALL_LEVELS, ArenaCode, SegmentCode
from tallstore.coding import CodeStats
from tallstore.decoding import Decoder
from tallstore.describing import describe
from tallstore.documents import CODE, OWN, BaseDocument, Part, TaskDocument
from tallstore.dtypes import is_codable, itemsize
from tallstore.engine.session import WriteSession
from tallstore.errors import CorruptStoreError, OptionError, UnknownTaskError
from tallstore.layout import lay_out
from tallstore.loading import Loader
from tallstore.matching import OwnSlice
from tallstore.originals import Likeness
from tallstore.packing.encoding import TargetEncoder
from tallstore.packing.encodings import policy
from tallstore.packing.target import Target
from tallstore.packing.writing import write_arenas, write_blob
from tallstore.progress import Meter, Report
from tallstore.sources.source import Source
from tallstore.specs import SegmentSpec
from tallstore.storesource import StoreSource
from tallstore.workers import Workers, workers
from tallstore.writing import HeldStore, commit, held_for_writing, without_idle_vector

__all__ = ["restore_exact", "strip_exact"]

#: An original errs from a task's codes as the task's record says, but for rounding to its dtype,
#: which in 16 bits may be as much as what fine codes leave.
_CLOSE = 0.25
#: By how much of itself a tensor's distance from the base may differ from the recorded one, which
#: has six digits, and may come from sums in another order.
_SAME = 1e-4
#: Bytes compared at a time.
_PIECE = 1 << 24


def strip_exact(
    path: Path, names: Sequence[str] | None, *, timeout: float, report: Report | None = None
) -> list[str]:
    """Drop the exact tier of tasks that have codes beside it; the space is used again.

    What has no code, such as a tensor whose gain is undefined, is kept as it is from now on.

    Parameters
    ----------
    names
        Which; None: all that have both.

    Returns
    -------
    list of str
        The tasks that were stripped.

    Raises
    ------
    UnknownTaskError
    OptionError
        A task has no exact tier, or nothing beside it.
    """
    with held_for_writing(path, timeout=timeout) as held, workers() as pool:
        chosen = _strippable(path, held.catalog, names)
        meter = Meter(report).stage("strip", sum(held.catalog.tasks[n].nbytes for n in chosen))
        with WriteSession(held.environment, held.manifest) as session:
            tasks = dict(held.catalog.tasks)
            for name in chosen:
                tasks[name] = _stripped(session, held, name, pool)
                meter(tasks[name].nbytes)
            commit(session, without_idle_vector(replace(held.catalog, tasks=tasks)))
    return chosen


def _strippable(path: Path, catalog: Catalog, names: Sequence[str] | None) -> list[str]:
    if names is None:
        found = [n for n, task in catalog.tasks.items() if task.exact and task.code != "none"]
        if not found:
            raise OptionError(
                f"{path}: no task has both codes and an exact tier, so there is nothing to strip"
            )
        return found
    for name in names:
        record = catalog.tasks.get(name)
        if record is None:
            known = ", ".join(map(repr, catalog.tasks)) or "none"
            raise UnknownTaskError(f"{path}: no task {name!r}; there are: {known}")
        if record.code == "none":
            raise OptionError(
                f"{path}: task {name!r} has no codes, only its exact difference from the base; "
                "stripped of it nothing would be left. repack gives it a code"
            )
        if not record.exact:
            raise OptionError(f"{path}: task {name!r} has no exact tier")
    return list(dict.fromkeys(names))


def _document(held: HeldStore, name: str) -> tuple[BaseDocument, TaskDocument]:
    described = describe(held.snapshot, held.catalog, task=name)
    if described.task is None:
        raise CorruptStoreError(f"{held.snapshot.path}: task {name!r} has no document")
    return described.base, described.task


def _stripped(session: WriteSession, held: HeldStore, name: str, pool: Workers) -> TaskRecord:
    base, document = _document(held, name)
    record = held.catalog.tasks[name]
    codings = document.codings

    def coded(part: Part) -> bool:
        if part.kind != CODE:
            return False
        if codings is not None:
            return part.segment in codings
        arena = base.layout.places[part.segment].arena
        return is_codable(base.layout.arenas[arena].dtype)

    parts: list[tuple[Part, ...]] = []
    slices: list[OwnSlice] = []
    for segment, found in enumerate(document.parts):
        settled, start = [], 0
        for part in found:
            if part.kind == OWN or (part.kind == CODE and not coded(part)):
                settled.append(Part(OWN, len(slices), 0, part.count))
                slices.append(OwnSlice(segment, start, part.count))
            else:
                settled.append(part)
            start += part.count
        parts.append(tuple(settled))
    own = tuple(SegmentSpec(document.contents.segments[s.segment].dtype, s.count) for s in slices)
    source = StoreSource(Loader(held.snapshot, held.catalog, task=name), label=name)

    def read(number: int, start: int, out: Bytes) -> None:
        first = slices[number].start * itemsize(own[number].dtype)
        source.read(slices[number].segment, first + start, out)

    streams, _ = write_arenas(
        session, lay_out(own), read, encoding=policy(True), workers=pool, progress=lambda _: None
    )
    codes = tuple(replace(code, exact=None) for code in document.codes if code.coded)
    after = replace(document, parts=tuple(parts), own=own, own_streams=streams, codes=codes)
    files = {file.stream for file in document.contents.files}
    return replace(
        record,
        document=write_blob(session, after.to_bytes()),
        streams=tuple(sorted({*streams, *files, *(n for code in codes for n in code.streams)})),
        exact=not any(part.kind == CODE for some in parts for part in some),
        own=sum(segment.numel for segment in own),
        coded=sum(part.count for some in parts for part in some if part.kind == CODE),
    )


def restore_exact(
    path: Path,
    originals: Mapping[str, Source],
    *,
    timeout: float,
    report: Report | None = None,
) -> list[str]:
    """Give tasks an exact tier again, from the checkpoints that they were coded from.

    Returns
    -------
    list of str
        Remarks.

    Raises
    ------
    UnknownTaskError
    OptionError
        A task has an exact tier.
    MismatchError
        A checkpoint is not the one that the task was coded from.
    """
    with held_for_writing(path, timeout=timeout) as held, workers() as pool:
        for name in originals:
            record = held.catalog.tasks.get(name)
            if record is None:
                known = ", ".join(map(repr, held.catalog.tasks)) or "none"
                raise UnknownTaskError(f"{path}: no task {name!r}; there are: {known}")
            if record.exact:
                raise OptionError(f"{path}: task {name!r} has its exact tier")
        room = sum(s.nbytes for source in originals.values() for s in source.segments)
        meter = Meter(report)
        notes: list[str] = []
        with WriteSession(held.environment, held.manifest, room=room) as session:
            tasks = dict(held.catalog.tasks)
            for name, source in originals.items():
                tasks[name], remarks = _restored(session, held, name, source, pool, meter)
                notes += remarks
            commit(session, replace(held.catalog, tasks=tasks))
    return notes


def _restored(
    session: WriteSession,
    held: HeldStore,
    name: str,
    source: Source,
    pool: Workers,
    meter: Meter,
) -> tuple[TaskRecord, list[str]]:
    likeness = Likeness(held.snapshot, held.catalog, name, source)
    base, document, candidate = likeness.base, likeness.task, likeness.candidate
    record = held.catalog.tasks[name]
    target = Target(candidate=candidate, exact=True, code=record.code, parameters={})
    encoder = TargetEncoder(session, target, base.layout)
    decoder = Decoder(held.snapshot, base)
    progress = meter.stage("add", record.nbytes)

    def encode(item: tuple[int, int]) -> None:
        arena, span = item
        start, _ = decoder.base_and_vector(arena, span)
        start = start.copy()
        encoder.encode(arena, span, start, None, None, None, _no_masks)
        likeness.add(arena, span, start)
        progress(start.size)

    for _ in pool.each(encode, likeness.spans):
        pass
    likeness.check()
    exact = {code.arena: encoder.arena_code(code.arena).exact for code in document.codes}
    codings = document.codings
    if codings is None:
        found = {p.segment for ps in document.parts for p in ps if p.kind == CODE}
        codings = {n: SegmentCode(n, PLANES, TALL_LEVELS) for n in sorted(found)}
    codes: tuple[ArenaCode, ...] = tuple(
        replace(code, exact=exact[code.arena], over_base=True) for code in document.codes
    )
    after = replace(document, codes=codes, codings=codings)
    files = {file.stream for file in document.contents.files}
    streams = {*document.own_streams, *files, *(n for code in codes for n in code.streams)}
    return replace(
        record,
        document=write_blob(session, after.to_bytes()),
        streams=tuple(sorted(streams - {0})),
        exact=True,
        parameters={} if record.parameters is None else record.parameters,
    ), [*source.notes, *candidate.plan.notes]


def _no_masks(*_: object) -> tuple[Bytes, list[tuple[int, CodeStats]], Bytes]:
    raise RuntimeError("the exact tier has no masks")
