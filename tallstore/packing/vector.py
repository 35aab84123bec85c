"""The shared vector: surveys, merging, and its streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.catalog import VectorRecord
from tallstore.codecs import Bytes
from tallstore.coding import Floats, from_float32, to_float32
from tallstore.dtypes import is_codable, itemsize
from tallstore.engine.session import WriteSession
from tallstore.layout import Arena, Layout
from tallstore.merging import MergeRule
from tallstore.packing.encodings import elements
from tallstore.packing.gathering import Candidate
from tallstore.packing.writing import Progress, SegmentReader, read_span
from tallstore.workers import Workers

__all__ = ["block_weights", "blocks", "survey", "write_vector"]

#: Bytes of task vectors, all tasks together, that a thread holds at a time.
_BUDGET: Final = 32 << 20
_LARGEST: Final = 1 << 17
_SMALLEST: Final = 1 << 13


def block_weights(tasks: int) -> int:
    """Weights a block: few enough for the cache, and for `tasks` of them at a time."""
    fitting = _BUDGET // (4 * max(tasks, 1)) // _SMALLEST * _SMALLEST
    return max(_SMALLEST, min(_LARGEST, fitting))


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of a span of `total` weights."""
    for start in range(0, total, size):
        yield start, min(start + size, total)


def _task_vectors(
    tasks: Sequence[Candidate], arena: int, start: int, base: Bytes, dtype: str
) -> Floats:
    """Task vectors of one block, shape (tasks, weights); what is not finite counts as unmoved."""
    base32 = to_float32(base, dtype)
    vectors = np.empty((len(tasks), base32.size), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for row, task in zip(vectors, tasks, strict=True):
            np.subtract(task.gather_float32(arena, start, base, base32), base32, out=row)
        if not np.isfinite(vectors.sum()):
            np.nan_to_num(vectors, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return vectors


def _coded_arenas(layout: Layout, tasks: Sequence[Candidate]) -> list[tuple[int, Arena]]:
    used = {arena for task in tasks for arena in task.arenas()}
    return [(n, a) for n, a in enumerate(layout.arenas) if n in used and is_codable(a.dtype)]


def _spans(arenas: Sequence[tuple[int, Arena]]) -> list[tuple[int, int]]:
    return [(number, span) for number, arena in arenas for span in range(arena.spans)]


def survey(
    rule: MergeRule,
    layout: Layout,
    base: SegmentReader,
    tasks: Sequence[Candidate],
    *,
    workers: Workers,
    progress: Progress,
) -> MergeRule:
    """Make the passes over all task vectors that a rule asks for."""
    arenas = _coded_arenas(layout, tasks)
    weights = np.array([sum(t.weights(n) for n, _ in arenas) for t in tasks], np.int64)
    size = block_weights(len(tasks))
    while rule.surveys:
        current = rule

        def look(item: tuple[int, int], current: MergeRule = current) -> npt.NDArray[np.int64]:
            arena, span = item
            record = layout.arenas[arena]
            data = read_span(layout, arena, span, base)
            width = itemsize(record.dtype)
            totals: list[npt.NDArray[np.int64]] = []
            for start, stop in blocks(data.size // width, size):
                piece = data[start * width : stop * width]
                place = span * record.span + start
                vectors = _task_vectors(tasks, arena, place, piece, record.dtype)
                counted = current.survey(vectors)
                totals = [totals[0] + counted] if totals else [counted]
            progress(data.size * len(tasks))
            return totals[0]

        totals = list(_running_sum(workers.each(look, _spans(arenas))))
        rule = rule.conclude(totals[-1], weights=weights)
    return rule


def _running_sum(
    arrays: Iterator[npt.NDArray[np.int64]],
) -> Iterator[npt.NDArray[np.int64]]:
    total = None
    for array in arrays:
        total = array if total is None else total + array
    if total is not None:
        yield total


def write_vector(
    session: WriteSession,
    rule: MergeRule,
    layout: Layout,
    base: SegmentReader,
    tasks: Sequence[Candidate],
    *,
    dtype: str,
    created: str,
    workers: Workers,
    progress: Progress,
) -> VectorRecord:
    """Merge the task vectors, round the result to `dtype`, and write it."""
    arenas = _coded_arenas(layout, tasks)
    width = itemsize(dtype)
    writers = {n: session.stream(arena.span * width) for n, arena in arenas}
    size = block_weights(len(tasks))

    def merge(item: tuple[int, int]) -> None:
        arena, span = item
        record = layout.arenas[arena]
        data = read_span(layout, arena, span, base)
        base_width = itemsize(record.dtype)
        merged = np.empty(data.size // base_width * width, np.uint8)
        for start, stop in blocks(data.size // base_width, size):
            piece = data[start * base_width : stop * base_width]
            place = span * record.span + start
            vectors = _task_vectors(tasks, arena, place, piece, record.dtype)
            rounded = from_float32(_finite(rule.merge(vectors), dtype), dtype)
            merged[start * width : stop * width] = rounded
        writers[arena].put(span, merged, encoding=elements(dtype))
        progress(data.size * len(tasks))

    for _ in workers.each(merge, _spans(arenas)):
        pass
    numbers = [writers[n].number if n in writers else 0 for n in range(len(layout.arenas))]
    return VectorRecord(
        streams=tuple(numbers),
        dtype=dtype,
        rule=rule.name,
        parameters=dict(rule.parameters()),
        tasks=tuple(task.name for task in tasks),
        created=created,
    )


def _finite(merged: Floats, dtype: str) -> Floats:
    """Keep the stored vector finite: a sum can overflow, the more so in float16."""
    largest = np.float32(65504.0) if dtype == "float16" else np.finfo(np.float32).max
    if dtype == "bfloat16":
        largest = np.float32(3.3895314e38)
    return np.clip(merged, -largest, largest)
