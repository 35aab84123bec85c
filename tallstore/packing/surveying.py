"""The pass before coding: how far the weights of each tensor of a task moved."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tallstore.codecs import Bytes
from tallstore.codes import SEEDED, SegmentCode, seeded_pieces
from tallstore.coding import Floats, to_float32
from tallstore.dtypes import is_codable, itemsize
from tallstore.fitting import Magnitudes
from tallstore.packing.gathering import Candidate, Held
from tallstore.packing.masks import same_bytes
from tallstore.seeding import seeded_tensor, support
from tallstore.workers import Workers

__all__ = ["Moves", "SpanReader", "span_moves", "survey_candidate", "survey_values"]

#: Gives the base's bytes of a span of an arena, and the shared vector as float32, if it has one.
SpanReader = Callable[[int, int], tuple[Bytes, Floats | None]]


@dataclass(frozen=True, slots=True)
class Moves:
    """How a task's weights moved over one span."""

    moves: Floats
    """Task vector, float32; 0 where the task has no weight."""
    vector: Floats | None
    raw: Bytes
    """The task's own weights as bytes of its dtype, in gaps the base's."""
    held: list[Held]
    same: list[bool]
    """Whether the weights of each of `held` are the base's, bit for bit."""
    base: Floats


def span_moves(candidate: Candidate, arena: int, span: int, read: SpanReader) -> Moves:
    """Read a span of the base and of a task."""
    record = candidate.layout.arenas[arena]
    base, vector = read(arena, span)
    dtype = candidate.plan.dtypes[arena]
    raw, held = candidate.gather(arena, span * record.span, base)
    width = itemsize(dtype)
    same = [dtype == record.dtype and same_bytes(raw, base, item, width) for item in held]
    if not is_codable(record.dtype):
        none = np.zeros(0, np.float32)
        return Moves(none, None, raw, held, same, none)
    base32, own32 = to_float32(base, record.dtype), to_float32(raw, dtype)
    moves = np.zeros(base32.size, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for item in held:
            some = slice(item.start, item.stop)
            np.subtract(own32[some], base32[some], out=moves[some])
    return Moves(moves, vector, raw, held, same, base32)


def coded_spans(
    candidate: Candidate, only: Collection[int] | None = None
) -> Iterator[tuple[int, int]]:
    """(arena, span) of what it has of arenas that can be coded; of some segments, or of all."""
    for arena in candidate.arenas():
        record = candidate.layout.arenas[arena]
        if not is_codable(record.dtype):
            continue
        for span in range(record.spans):
            held = candidate.held(arena, span * record.span, record.span)
            if only is None or any(item.base_segment in only for item in held):
                yield arena, span


def survey_candidate(
    candidate: Candidate,
    read: SpanReader,
    *,
    shared: bool,
    only: Collection[int] | None = None,
    workers: Workers,
    progress: Callable[[int], None],
) -> dict[int, Magnitudes]:
    """A histogram of each of the base's segments that the task has; by segment.

    Parameters
    ----------
    shared
        Whether magnitudes are relative to the shared vector.
    only
        These segments of the base alone; None: all.

    Memory: 200 kB a segment, and three spans a thread.
    """
    found: dict[int, Magnitudes] = {}
    lock = threading.Lock()

    def survey(item: tuple[int, int]) -> None:
        arena, span = item
        seen = span_moves(candidate, arena, span, read)
        for held, same in zip(seen.held, seen.same, strict=True):
            if only is not None and held.base_segment not in only:
                continue
            some = slice(held.start, held.stop)
            part = Magnitudes(0)
            part.same = same
            start = seen.base[some]
            part.start = float(np.einsum("i,i->", start, start))
            if not same:
                vector = seen.vector if shared else None
                part.add(seen.moves[some], None if vector is None else vector[some])
            with lock:
                whole = found.setdefault(held.base_segment, Magnitudes(0))
                whole.weights += held.stop - held.start
                whole.merge(part)
        progress(seen.raw.size)

    for _ in workers.each(survey, coded_spans(candidate, only)):
        pass
    return found


def survey_values(
    candidate: Candidate,
    read: SpanReader,
    strides: Mapping[int, int],
    *,
    seed: int,
    workers: Workers,
    progress: Callable[[int], None],
) -> dict[int, Magnitudes]:
    """The same of the weights alone that a seed picks, one in so many of some segments."""
    codes = {n: SegmentCode(n, SEEDED, (0.0, 0.0), stride) for n, stride in strides.items()}
    found: dict[int, Magnitudes] = defaultdict(lambda: Magnitudes(0))
    lock = threading.Lock()
    layout = candidate.layout

    def survey(item: tuple[int, int]) -> None:
        arena, span = item
        pieces = seeded_pieces(layout, codes, arena, span)
        if not pieces:
            return
        seen = span_moves(candidate, arena, span, read)
        held_of = {held.base_segment: held for held in seen.held}
        for piece in pieces:
            held = held_of.get(piece.piece.segment)
            if held is None:
                continue
            tensor = seeded_tensor(
                piece, seed=seed, arena_span=layout.arenas[arena].span, span=span
            )
            part = Magnitudes(0)
            at = support(tensor)
            at += piece.piece.within
            # The task may have fewer rows than the base.
            at = at[(at >= held.start) & (at < held.stop)]
            part.add(seen.moves[at])
            with lock:
                whole = found[piece.piece.segment]
                whole.weights += at.size
                whole.merge(part)
        progress(seen.raw.size)

    for _ in workers.each(survey, coded_spans(candidate)):
        pass
    return dict(found)
