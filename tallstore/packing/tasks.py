"""Tasks to codes, residuals and what is kept as it is."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tallstore.catalog import TaskRecord, VectorRecord
from tallstore.codecs import Bytes
from tallstore.coding import CodeStats, residual
from tallstore.decoding import Decoder
from tallstore.documents import (
    BASE,
    CODE,
    OWN,
    ArenaCode,
    BaseDocument,
    Part,
    SegmentStats,
    StoredFile,
    TaskDocument,
)
from tallstore.dtypes import is_codable, itemsize
from tallstore.engine.session import StreamWriter, WriteSession
from tallstore.engine.snapshot import Snapshot
from tallstore.layout import Layout, lay_out
from tallstore.matching import OwnSlice
from tallstore.packing.encodings import BITS, policy, residuals
from tallstore.packing.gathering import Candidate
from tallstore.packing.masks import SpanMasks, same_bytes, tall_span
from tallstore.packing.writing import Progress, write_arenas, write_blob, write_contents
from tallstore.specs import SegmentSpec
from tallstore.workers import Workers

__all__ = ["Target", "encode_tasks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A checkpoint, and what is to be kept of it."""

    candidate: Candidate
    tall_lambda: float | None
    """None: no masks, the base alone is the prediction."""
    exact: bool
    score: float | None = None


class _Coding:
    """What is being gathered about one target while spans go by. Thread-safe."""

    def __init__(self, session: WriteSession, target: Target, layout: Layout) -> None:
        self.target = target
        self.layout = layout
        self._lock = threading.Lock()
        self.stats: dict[int, CodeStats] = defaultdict(CodeStats)
        self.planes: dict[int, StreamWriter] = {}
        self.exact: dict[int, StreamWriter] = {}
        for arena in target.candidate.arenas():
            record = layout.arenas[arena]
            if self.masks(arena):
                self.planes[arena] = session.stream(record.span // 8)
            if target.exact and itemsize(self.dtype(arena)) <= 8:
                self.exact[arena] = session.stream(record.span * itemsize(self.dtype(arena)))

    def masks(self, arena: int) -> bool:
        return self.target.tall_lambda is not None and is_codable(self.layout.arenas[arena].dtype)

    def dtype(self, arena: int) -> str:
        return self.target.candidate.plan.dtypes[arena]

    def count(self, segment: int, stats: CodeStats) -> None:
        with self._lock:
            self.stats[segment].add(stats)


def _encode_span(
    coding: _Coding,
    arena: int,
    span: int,
    base: Bytes,
    vector: Bytes | None,
    vector_record: VectorRecord | None,
    decoder: Decoder,
    masks: SpanMasks,
) -> None:
    target, layout = coding.target, coding.layout
    place = span * layout.arenas[arena].span
    base_dtype, dtype = layout.arenas[arena].dtype, coding.dtype(arena)
    planes = None
    if arena in coding.planes and vector is not None and vector_record and target.tall_lambda:
        planes, stats, raw = masks(
            target.candidate, arena, place, base, vector, vector_record.dtype, target.tall_lambda
        )
        coding.planes[arena].put(span, planes, encoding=BITS)
        for segment, sums in stats:
            coding.count(segment, sums)
    else:
        raw, held = target.candidate.gather(arena, place, base)
        width = itemsize(dtype)
        for item in held:
            same = dtype == base_dtype and same_bytes(raw, base, item, width)
            coding.count(item.base_segment, CodeStats(item.stop - item.start, same=same))
    if arena in coding.exact:
        predicted = decoder.predict(arena, base, vector, planes, dtype)
        zigzag = residual(raw, predicted, dtype)
        coding.exact[arena].put(span, zigzag, encoding=residuals(dtype))


def encode_tasks(
    session: WriteSession,
    snapshot: Snapshot,
    base: BaseDocument,
    vector: VectorRecord | None,
    targets: Sequence[Target],
    *,
    identity: str,
    known_files: Sequence[tuple[StoredFile, bytes]],
    created: str,
    compress: bool,
    masks: SpanMasks = tall_span,
    workers: Workers,
    progress: Progress,
) -> dict[str, TaskRecord]:
    """Write tasks against a base (and a shared vector) that are in the store already.

    Parameters
    ----------
    snapshot
        Where the base and the vector are read from.
    identity
        Of the base.
    known_files
        Files already stored, with their digests.
    compress
        Whether elements kept as they are are worth compressing.
    masks
        What makes the masks of a span.

    Returns
    -------
    dict
        A record for each target, by name.
    """
    layout = base.layout
    codings = [_Coding(session, target, layout) for target in targets]
    decoder = Decoder(snapshot, base, vector=vector)
    # Arenas of dtypes without masks are read for what changed there: integer buffers.
    spans = [
        (arena, span)
        for arena, record in enumerate(layout.arenas)
        if any(arena in coding.target.candidate.arenas() for coding in codings)
        for span in range(record.spans)
    ]

    def encode(item: tuple[int, int]) -> None:
        arena, span = item
        base_bytes, vector_bytes = decoder.base_and_vector(arena, span)
        for coding in codings:
            if arena in coding.target.candidate.arenas():
                _encode_span(coding, arena, span, base_bytes, vector_bytes, vector, decoder, masks)
                progress(base_bytes.size)

    for _ in workers.each(encode, spans):
        pass
    return {
        coding.target.candidate.name: _finish(
            session, coding, vector, identity, known_files, created, compress, workers, progress
        )
        for coding in codings
    }


def _finish(
    session: WriteSession,
    coding: _Coding,
    vector: VectorRecord | None,
    identity: str,
    known_files: Sequence[tuple[StoredFile, bytes]],
    created: str,
    compress: bool,
    workers: Workers,
    progress: Progress,
) -> TaskRecord:
    candidate, target = coding.target.candidate, coding.target
    parts, slices = _settle(coding)
    own = tuple(SegmentSpec(candidate.source.segments[s.segment].dtype, s.count) for s in slices)

    def read(number: int, start: int, out: Bytes) -> None:
        first = slices[number].start * itemsize(own[number].dtype)
        candidate.source.read(slices[number].segment, first + start, out)

    own_streams, _ = write_arenas(
        session,
        lay_out(own),
        read,
        encoding=policy(compress),
        workers=workers,
        progress=lambda _: None,
    )
    contents, file_streams = write_contents(session, candidate.source, known=known_files)
    used = {coding.layout.places[p.segment].arena for ps in parts for p in ps if p.kind == CODE}
    codes = tuple(
        ArenaCode(
            arena,
            coding.dtype(arena),
            coding.planes[arena].number if arena in coding.planes else None,
            coding.exact[arena].number if arena in coding.exact else None,
        )
        for arena in sorted(used)
    )
    coded = {p.segment for ps in parts for p in ps if p.kind == CODE}
    stats = {n: s for n, s in coding.stats.items() if n in coded and target.tall_lambda}
    document = TaskDocument(
        contents=contents,
        parts=parts,
        own=own,
        own_streams=own_streams,
        codes=codes,
        stats=tuple(
            SegmentStats(n, s.density, s.relative_error, float(np.sqrt(s.moved)))
            for n, s in sorted(stats.items())
        ),
    )
    number = write_blob(session, document.to_bytes())
    code_streams = [n for code in codes for n in (code.planes, code.exact) if n is not None]
    return _record(
        coding,
        document,
        stats,
        TaskRecord(
            document=number,
            streams=tuple(sorted({*own_streams, *file_streams, *code_streams})),
            base=identity,
            label=candidate.source.label,
            kind=candidate.source.kind,
            code="tall" if target.tall_lambda is not None and vector else "none",
            bits=1 if target.tall_lambda is not None else 0,
            tall_lambda=target.tall_lambda,
            exact=True,
            tensors=len(contents.tensors),
            weights=sum(segment.numel for segment in contents.segments),
            coded=0,
            own=sum(segment.numel for segment in own),
            density=None,
            relative_error=None,
            score=target.score,
            nbytes=contents.nbytes,
            created=created,
        ),
    )


def _record(
    coding: _Coding,
    document: TaskDocument,
    stats: Mapping[int, CodeStats],
    record: TaskRecord,
) -> TaskRecord:
    total = CodeStats()
    for sums in stats.values():
        total.add(sums)
    lossy = any(code.exact is None for code in document.codes)
    return replace(
        record,
        exact=not lossy,
        coded=sum(p.count for ps in document.parts for p in ps if p.kind == CODE),
        density=total.density if total.weights else None,
        relative_error=total.relative_error if total.weights else None,
    )


def _settle(coding: _Coding) -> tuple[tuple[tuple[Part, ...], ...], list[OwnSlice]]:
    """The final parts, once it is known what changed and what is finite.

    What equals the base refers to it; what masks cannot hold (NaN, Inf, changed integers) is kept
    as it is; the plan holds for everything else.
    """
    parts: list[tuple[Part, ...]] = []
    slices: list[OwnSlice] = []
    for segment, planned in enumerate(coding.target.candidate.plan.parts):
        settled, start = [], 0
        for part in planned:
            kind = _kind(coding, part)
            if kind == OWN:
                settled.append(Part(OWN, len(slices), 0, part.count))
                slices.append(OwnSlice(segment, start, part.count))
            else:
                settled.append(replace(part, kind=kind))
            start += part.count
        parts.append(tuple(settled))
    return tuple(parts), slices


def _kind(coding: _Coding, part: Part) -> str:
    if part.kind != CODE:
        return part.kind
    stats = coding.stats.get(part.segment)
    if part.count == 0 or (stats is not None and stats.same):
        return BASE
    arena = coding.layout.places[part.segment].arena
    if coding.masks(arena):
        # NaN through arithmetic has other bits on other machines: never predicted, always kept.
        return CODE if stats is None or stats.finite else OWN
    return CODE if arena in coding.exact else OWN
