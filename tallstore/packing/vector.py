"""The shared vector: surveys, merging, and its streams."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tallstore.catalog import VectorRecord
from tallstore.codecs import Bytes
from tallstore.codecs.quantized import FORMS, quantize, quantized_size
from tallstore.coding import Floats, from_float32, to_float32
from tallstore.documents import Contents
from tallstore.dtypes import is_codable, itemsize
from tallstore.engine.session import WriteSession
from tallstore.layout import Layout
from tallstore.mergestream.feed import Shapes, shapes
from tallstore.mergestream.rounding import finite
from tallstore.mergestream.survey import Surveyed, merge_span, spans
from tallstore.packing.encodings import BITS, elements
from tallstore.packing.gathering import Candidate
from tallstore.packing.writing import Progress, SegmentReader, read_span
from tallstore.workers import Workers

__all__ = ["CandidateFeed", "write_vector"]


class CandidateFeed:
    """Task vectors of checkpoints about to be packed; implements `tallstore.mergestream.feed.Feed`.

    Memory: the base's bytes of one span a thread, and one block of all tasks' vectors.
    """

    def __init__(
        self, contents: Contents, layout: Layout, base: SegmentReader, tasks: Sequence[Candidate]
    ) -> None:
        used = {arena for task in tasks for arena in task.arenas()}
        self.layout = layout
        self.shapes: Shapes = shapes(contents.tensors, contents.segments)
        self.candidates = tasks
        self.tasks = tuple(task.name for task in tasks)
        self.arenas = [
            n for n, arena in enumerate(layout.arenas) if n in used and is_codable(arena.dtype)
        ]
        self._base = base

    def open(self, arena: int, span: int) -> _Span:
        """Read the base's span; the tasks are read block by block."""
        return _Span(self, arena, span, read_span(self.layout, arena, span, self._base))

    def held(self, arena: int, start: int, count: int) -> npt.NDArray[np.int64]:
        """How many of the weights each checkpoint has."""
        return np.array(
            [
                sum(item.stop - item.start for item in task.held(arena, start, count))
                for task in self.candidates
            ],
            np.int64,
        )


class _Span:
    def __init__(self, feed: CandidateFeed, arena: int, span: int, base: Bytes) -> None:
        record = feed.layout.arenas[arena]
        self._tasks, self._arena, self._base, self._dtype = (
            feed.candidates,
            arena,
            base,
            record.dtype,
        )
        self._place = span * record.span
        self._width = itemsize(record.dtype)

    @property
    def count(self) -> int:
        return self._base.size // self._width

    @property
    def nbytes(self) -> int:
        return self._base.size * len(self._tasks)

    def vectors(self, start: int, stop: int) -> Floats:
        """Task vectors of one block; what is not finite counts as unmoved."""
        base = self._base[start * self._width : stop * self._width]
        base32 = to_float32(base, self._dtype)
        vectors = np.empty((len(self._tasks), base32.size), np.float32)
        place = self._place + start
        with np.errstate(invalid="ignore", over="ignore"):
            for row, task in zip(vectors, self._tasks, strict=True):
                tuned = task.gather_float32(self._arena, place, base, base32)
                np.subtract(tuned, base32, out=row)
            if not np.isfinite(vectors.sum()):
                np.nan_to_num(vectors, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        return vectors

    def masks(self, start: int, stop: int) -> None:
        """Masks are what the vector is merged for: there are none yet."""


def write_vector(
    session: WriteSession,
    surveyed: Surveyed,
    feed: CandidateFeed,
    *,
    dtype: str,
    created: str,
    workers: Workers,
    progress: Progress,
) -> VectorRecord:
    """Merge the task vectors, round the result to `dtype` or quantize it, and write it."""
    layout = feed.layout
    form = FORMS.get(dtype)

    def size(span: int) -> int:
        return span * itemsize(dtype) if form is None else quantized_size(span, form)

    writers = {n: session.stream(size(layout.arenas[n].span)) for n in feed.arenas}

    def merge(item: tuple[int, int]) -> None:
        arena, span = item
        opened = feed.open(arena, span)
        merged = merge_span(surveyed, feed, arena, span, opened)
        if form is not None:
            data, encoding = quantize(finite(merged, "bfloat16"), form), BITS
        else:
            data, encoding = from_float32(finite(merged, dtype), dtype), elements(dtype)
        writers[arena].put(span, data, encoding=encoding)
        progress(opened.nbytes)

    for _ in workers.each(merge, spans(feed)):
        pass
    numbers = [writers[n].number if n in writers else 0 for n in range(len(layout.arenas))]
    return VectorRecord(
        streams=tuple(numbers),
        dtype=dtype,
        rule=surveyed.rule.name,
        parameters=dict(surveyed.rule.parameters()),
        tasks=feed.tasks,
        created=created,
    )
