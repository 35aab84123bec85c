"""Task vectors out of a store: from the exact tier where there is one, else from the codes."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.bits import packed_size, unpack_bits
from tallstore.catalog import VectorRecord
from tallstore.codecs import Bytes
from tallstore.codes import ArenaCode
from tallstore.coding import add_residual, to_float32
from tallstore.decoding import Decoder
from tallstore.documents import BASE, CODE, BaseDocument, Part, TaskDocument
from tallstore.dtypes import is_codable, itemsize
from tallstore.engine.snapshot import Snapshot
from tallstore.layout import SPAN
from tallstore.mergestream.feed import Shapes, shapes
from tallstore.mergestream.ondevice import DeviceWeights
from tallstore.mergestream.rounding import converted
from tallstore.merging import Floats
from tallstore.merging.rule import Flags
from tallstore.scratch import Scratch
from tallstore.workers import cores

__all__ = ["StoreFeed", "StoredSpan", "merged_parts"]

#: Bytes that all threads together may hold of decoded spans.
_MEMORY: Final = 512 << 20
#: Decoded spans beside the tasks' own that a thread holds, of 4 bytes a weight, at most: base,
#: vector, prediction, residual, merged vector, output, and as much again for what is passing.
_BESIDE: Final = 12
_MOST_THREADS: Final = 16
#: A tensor of another size shares what it has in common with the base's if it is this much of it.
_LEAST_SHARE: Final = 0.9


class _Ranges:
    """Runs of weights of one arena, in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, count: int) -> None:
        at = bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._stops.insert(at, start + count)

    def within(self, start: int, stop: int) -> list[tuple[int, int]]:
        """What lies in `start` .. `stop`, counted from `start`."""
        found = []
        for n in range(max(bisect_right(self._starts, start) - 1, 0), len(self._starts)):
            if self._starts[n] >= stop:
                break
            low, high = max(start, self._starts[n]), min(stop, self._stops[n])
            if low < high:
                found.append((low - start, high - start))
        return found


def merged_parts(document: TaskDocument, base: BaseDocument) -> Iterator[tuple[int, Part]]:
    """(segment of the task, part) of all that a task has in common with the base.

    Not the few rows that heads of other sizes share: those are other classes, whatever the store
    keeps them as a difference from. A resized embedding shares nearly all of its rows.
    """
    for number, parts in enumerate(document.parts):
        own = document.contents.segments[number].numel
        for part in parts:
            if part.kind in (BASE, CODE) and part.count:
                whole = max(own, base.contents.segments[part.segment].numel)
                if part.count >= _LEAST_SHARE * whole:
                    yield number, part


class _Task:
    """A task, and which of the base's weights it has."""

    def __init__(
        self, name: str, document: TaskDocument, base: BaseDocument, decoder: Decoder
    ) -> None:
        self.name = name
        self.document = document
        self.decoder = decoder
        self.codes = {code.arena: code for code in document.codes}
        #: By arena, what it has in a code of its own.
        self.coded: dict[int, _Ranges] = defaultdict(_Ranges)
        #: By arena, what it has at all: with what it never moved.
        self.known: dict[int, _Ranges] = defaultdict(_Ranges)
        for _, part in merged_parts(document, base):
            place = base.layout.places[part.segment]
            self.known[place.arena].add(place.offset + part.start, part.count)
            if part.kind == CODE:
                self.coded[place.arena].add(place.offset + part.start, part.count)

    def within(self, arena: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The coded weights among some."""
        ranges = self.coded.get(arena)
        return ranges.within(start, stop) if ranges else []


class StoreFeed:
    """Task vectors of stored tasks; implements `tallstore.mergestream.feed.Feed`. Thread-safe.

    Memory: each thread holds a span (1 Mi weights) of every task's weights, in the task's dtype,
    and about twelve spans beside; `threads` is chosen so that all together stay below 512 MiB, and
    is at least 1. The size of the model does not enter.

    Parameters
    ----------
    snapshot
        Stays the caller's.
    tasks
        Documents by name, in the order in which vectors are added up.
    vector
        The store's shared vector, if it has one.
    masks
        Whether the tasks' TALL masks are wanted.
    shared
        Take the stored shared vector, divided by this number, in place of the task vectors: one
        row, which merging as a sum leaves as it is. None: task vectors.
    device
        What reconstructs tasks on a device; None: the CPU does.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        base: BaseDocument,
        tasks: Mapping[str, TaskDocument],
        *,
        vector: VectorRecord | None,
        masks: bool = False,
        shared: int | None = None,
        device: DeviceWeights | None = None,
    ) -> None:
        self.base = base
        self.layout = base.layout
        self.shapes: Shapes = shapes(base.contents.tensors, base.contents.segments)
        self.tasks = tuple(tasks)
        self.scratch = Scratch()
        # One thread uses the decoders one after another, so they can share.
        shared_scratch = Scratch()
        self.stored = [
            _Task(
                name,
                document,
                base,
                Decoder(snapshot, base, task=document, vector=vector, scratch=shared_scratch),
            )
            for name, document in tasks.items()
        ]
        self.arenas = [n for n, arena in enumerate(self.layout.arenas) if is_codable(arena.dtype)]
        self.snapshot = snapshot
        self.vector = vector
        self.wants_masks = masks
        self.shared = shared
        self.device = device
        needed = shared is not None or any(
            code.shared and code.coded for task in self.stored for code in task.codes.values()
        )
        self.decoder = Decoder(snapshot, base, vector=vector if needed else None)

    @property
    def threads(self) -> int:
        """How many threads may open spans at a time."""
        spans = _BESIDE + (len(self.stored) if self.shared is None else 0)
        return max(1, min(cores(), _MOST_THREADS, _MEMORY // (4 * SPAN * spans)))

    def open(self, arena: int, span: int, *, tasks: bool = True) -> StoredSpan:
        """Read and check the chunks of a span; without `tasks`, those of the base alone."""
        return StoredSpan(self, arena, span, self.stored if tasks else ())

    def held(self, arena: int, start: int, count: int) -> npt.NDArray[np.int64]:
        """How many of the weights each task has: those it never moved, too."""
        counts = []
        for task in self.stored:
            ranges = task.known.get(arena)
            found = ranges.within(start, start + count) if ranges else []
            counts.append(sum(high - low for low, high in found))
        return np.array(counts, np.int64)


class StoredSpan:
    """One span of a `StoreFeed`, in the scratch memory of the thread that opened it."""

    def __init__(self, feed: StoreFeed, arena: int, span: int, tasks: Sequence[_Task]) -> None:
        self._feed = feed
        self._arena = arena
        self._place = span * feed.layout.arenas[arena].span
        self.dtype = feed.layout.arenas[arena].dtype
        self.base, self._vector = feed.decoder.base_and_vector(arena, span)
        self.count = self.base.size // itemsize(self.dtype)
        self._planes: list[Bytes | None] = []
        self._tuned: list[Bytes | None] = []
        for number, task in enumerate(tasks):
            code = task.codes.get(arena)
            within = task.within(arena, self._place, self._place + self.count)
            planes = tuned = None
            if code is not None and within and feed.wants_masks and code.planes is not None:
                planes = feed.scratch.take(f"planes {number}", self.count // 8)
                task.decoder.planes(arena, span, planes)
            if code is not None and within and feed.shared is None:
                tuned = self._weights(number, task, code, span)
            self._planes.append(planes)
            self._tuned.append(tuned)

    def _weights(self, number: int, task: _Task, code: ArenaCode, span: int) -> Bytes:
        """A task's weights over the span, in its dtype, as loading gives them."""
        feed, arena = self._feed, self._arena
        codes = task.decoder.codes(arena, span, feed.scratch.take)
        residual = task.decoder.residual(arena, span, self.base)
        if feed.device is not None:
            out = feed.scratch.take(f"weights {number}", self.count * itemsize(code.dtype))
            shared = None
            if self._vector is not None and feed.vector is not None and code.shared:
                shared = self._vector, feed.vector.decoded_dtype
            levels = None
            if codes is not None:
                levels = task.decoder.levels(arena).table, task.decoder.rows(arena, span)
            base = self.base, self.dtype
            feed.device.fill(out, base, codes, levels, shared, residual, code.dtype)
            return out
        predicted = task.decoder.predict(arena, span, self.base, self._vector, codes, code.dtype)
        if residual is not None:
            predicted = add_residual(predicted, residual, code.dtype)
        out = feed.scratch.take(f"weights {number}", predicted.size)
        np.copyto(out, predicted)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of checkpoints that it stands for."""
        return self.base.size * len(self._feed.tasks)

    def base32(self, start: int, stop: int) -> Floats:
        """The base's weights `start` .. `stop` of the span."""
        width = itemsize(self.dtype)
        return to_float32(self.base[start * width : stop * width], self.dtype)

    def vectors(self, start: int, stop: int) -> Floats:
        """Task vectors; or, as one row, the shared vector."""
        if self._feed.shared is not None:
            return self._shared(start, stop)[None]
        base = self.base32(start, stop)
        vectors = np.zeros((len(self._tuned), stop - start), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for row, task, tuned in zip(vectors, self._feed.stored, self._tuned, strict=True):
                if tuned is not None:
                    for low, high, weights in self._pieces(task, tuned, start, stop):
                        np.subtract(weights, base[low:high], out=row[low:high])
            if not np.isfinite(vectors.sum()):
                np.nan_to_num(vectors, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        return vectors

    def _pieces(
        self, task: _Task, tuned: Bytes, start: int, stop: int
    ) -> list[tuple[int, int, Floats]]:
        """(start, stop, weights) of what a task has, counted from `start`."""
        dtype = task.codes[self._arena].dtype
        width = itemsize(dtype)
        return [
            (low, high, to_float32(tuned[(start + low) * width : (start + high) * width], dtype))
            for low, high in task.within(self._arena, self._place + start, self._place + stop)
        ]

    def _shared(self, start: int, stop: int) -> Floats:
        """The stored shared vector, divided; zero where there is none."""
        record = self._feed.vector
        if self._vector is None or record is None:
            return np.zeros(stop - start, np.float32)
        width = itemsize(record.decoded_dtype)
        values = to_float32(self._vector[start * width : stop * width], record.decoded_dtype)
        shared: Floats = values / np.float32(self._feed.shared or 1)
        return shared

    def masks(self, start: int, stop: int) -> Flags | None:
        """The stored TALL masks; false where a task has no code."""
        if not self._feed.wants_masks:
            return None
        masks = np.zeros((len(self._planes), stop - start), np.bool_)
        first = start // 8
        for row, task, planes in zip(masks, self._feed.stored, self._planes, strict=True):
            if planes is None:
                continue
            flags = unpack_bits(planes[first : packed_size(stop)], stop - 8 * first)
            flags = flags[start - 8 * first :]
            within = task.within(self._arena, self._place + start, self._place + stop)
            for low, high in within:
                row[low:high] = flags[low:high]
        return masks

    def weights(self, start: int, stop: int, dtype: str) -> Bytes:
        """The only task's own weights as bytes of `dtype`: the base's where it has no other."""
        width, base_width = itemsize(dtype), itemsize(self.dtype)
        base = self.base[start * base_width : stop * base_width]
        out = converted(base, self.dtype, dtype).copy()
        (task,), (tuned,) = self._feed.stored, self._tuned
        if tuned is None:
            return out
        own = task.codes[self._arena].dtype
        own_width = itemsize(own)
        within = task.within(self._arena, self._place + start, self._place + stop)
        for low, high in within:
            raw = tuned[(start + low) * own_width : (start + high) * own_width]
            out[low * width : high * width] = converted(raw, own, dtype)
        return out
