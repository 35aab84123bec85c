"""Tasks to codes, residuals and what is kept as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tallstore.catalog import TaskRecord, VectorRecord
from tallstore.codecs import Bytes
from tallstore.codes import SegmentCode, SegmentStats
from tallstore.coding import CodeStats, to_float32
from tallstore.decoding import Decoder
from tallstore.documents import (
    BASE,
    CODE,
    OWN,
    BaseDocument,
    Part,
    StoredFile,
    TaskDocument,
)
from tallstore.dtypes import itemsize
from tallstore.engine.session import WriteSession
from tallstore.engine.snapshot import Snapshot
from tallstore.layout import lay_out
from tallstore.matching import OwnSlice
from tallstore.packing.encoding import TargetEncoder
from tallstore.packing.encodings import policy
from tallstore.packing.masks import SpanMasks, tall_span
from tallstore.packing.target import Target
from tallstore.packing.writing import Progress, write_arenas, write_blob, write_contents
from tallstore.spancodes import code_bits
from tallstore.specs import SegmentSpec
from tallstore.workers import Workers

__all__ = ["encode_tasks"]


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
    codings = [TargetEncoder(session, target, layout) for target in targets]
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
        vector32 = None
        if vector is not None and vector_bytes is not None:
            vector32 = to_float32(vector_bytes, vector.decoded_dtype)
        for coding in codings:
            if arena in coding.target.candidate.arenas():
                coding.encode(arena, span, base_bytes, vector_bytes, vector, vector32, masks)
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
    coding: TargetEncoder,
    vector: VectorRecord | None,
    identity: str,
    known_files: Sequence[tuple[StoredFile, bytes]],
    created: str,
    compress: bool,
    workers: Workers,
    progress: Progress,
) -> TaskRecord:
    candidate, target = coding.target.candidate, coding.target
    codings = coding.settle()
    parts, slices = _settle(coding, codings)
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
    coded = {p.segment for ps in parts for p in ps if p.kind == CODE}
    used = {coding.layout.places[segment].arena for segment in coded}
    codes = tuple(coding.arena_code(arena) for arena in sorted(used))
    counted = target.tall_lambda is not None or target.drafts is not None
    stats = {n: s for n, s in coding.stats.items() if n in coded and n in codings and counted}
    document = TaskDocument(
        contents=contents,
        parts=parts,
        own=own,
        own_streams=own_streams,
        codes=codes,
        stats=tuple(_stats(n, s, target) for n, s in sorted(stats.items())),
        codings=None if target.plain else {n: c for n, c in codings.items() if n in coded},
        seed=target.seed,
    )
    number = write_blob(session, document.to_bytes())
    code_streams = [number for code in codes for number in code.streams]
    total = CodeStats()
    for sums in stats.values():
        total.add(sums)
    lossy = any(code.exact is None for code in codes)
    return TaskRecord(
        document=number,
        streams=tuple(sorted({*own_streams, *file_streams, *code_streams})),
        base=identity,
        label=candidate.source.label,
        kind=candidate.source.kind,
        code=target.code,
        bits=max((code_bits(code) for code in codes if code.coded), default=0),
        tall_lambda=target.tall_lambda,
        exact=not lossy,
        tensors=len(contents.tensors),
        weights=sum(segment.numel for segment in contents.segments),
        coded=sum(p.count for ps in parts for p in ps if p.kind == CODE),
        own=sum(segment.numel for segment in own),
        density=total.density if total.weights else None,
        relative_error=total.relative_error if total.weights else None,
        score=target.score,
        nbytes=contents.nbytes,
        created=created,
        parameters=target.parameters,
        shared=any(code.shared and code.coded for code in codes) and not target.plain,
    )


def _stats(segment: int, stats: CodeStats, target: Target) -> SegmentStats:
    return SegmentStats(
        segment,
        stats.density,
        stats.relative_error,
        float(np.sqrt(stats.moved)),
        stats.projection if target.drafts is not None else None,
    )


def _settle(
    coding: TargetEncoder, codings: Mapping[int, SegmentCode]
) -> tuple[tuple[tuple[Part, ...], ...], list[OwnSlice]]:
    """The final parts, once it is known what changed and what can be coded.

    What equals the base refers to it; what codes cannot hold (NaN, Inf, changed integers, a gain
    that there is none of) is kept as it is; the plan holds for everything else.
    """
    parts: list[tuple[Part, ...]] = []
    slices: list[OwnSlice] = []
    for segment, planned in enumerate(coding.target.candidate.plan.parts):
        settled, start = [], 0
        for part in planned:
            kind = _kind(coding, part, codings)
            if kind == OWN:
                settled.append(Part(OWN, len(slices), 0, part.count))
                slices.append(OwnSlice(segment, start, part.count))
            else:
                settled.append(replace(part, kind=kind))
            start += part.count
        parts.append(tuple(settled))
    return tuple(parts), slices


def _kind(coding: TargetEncoder, part: Part, codings: Mapping[int, SegmentCode]) -> str:
    if part.kind != CODE:
        return part.kind
    stats = coding.stats.get(part.segment)
    if part.count == 0 or (stats is not None and stats.same):
        return BASE
    arena = coding.layout.places[part.segment].arena
    if coding.masks(arena):
        # NaN through arithmetic has other bits on other machines: never predicted, always kept.
        return CODE if stats is None or stats.finite else OWN
    return CODE if part.segment in codings or coding.has_residual(arena) else OWN
