"""Where task vectors come from, and how a span of them is cut for a rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from tallstore.layout import Layout
from tallstore.merging import Floats, Scope
from tallstore.merging.rule import Flags, row_length
from tallstore.specs import SegmentSpec, TensorSpec, contiguous_stride

__all__ = ["Cut", "Feed", "Shapes", "SpanFeed", "block_weights", "blocks", "cuts", "shapes"]

#: Bytes of task vectors, all tasks together, that a thread merges at a time.
_BUDGET: Final = 32 << 20
_LARGEST: Final = 1 << 17
_SMALLEST: Final = 1 << 13

#: Name and shape of the tensor that fills a segment; by segment.
Shapes = Mapping[int, tuple[str, tuple[int, ...]]]


def block_weights(tasks: int) -> int:
    """Weights a block: few enough for the cache, and for `tasks` of them at a time."""
    fitting = _BUDGET // (4 * max(tasks, 1)) // _SMALLEST * _SMALLEST
    return max(_SMALLEST, min(_LARGEST, fitting))


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of a span of `total` weights."""
    for start in range(0, total, size):
        yield start, min(start + size, total)


class SpanFeed(Protocol):
    """One span, opened: valid until the same thread opens the next one."""

    @property
    def count(self) -> int:
        """Weights in the span, padding included."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of checkpoints that it stands for: what progress counts."""
        ...

    def vectors(self, start: int, stop: int) -> Floats:
        """Task vectors of weights `start` .. `stop` of the span, float32, (rows, weights).

        Zero where a task lacks a weight, and where one is not finite.
        """
        ...

    def masks(self, start: int, stop: int) -> Flags | None:
        """TALL masks, bool, (tasks, weights); None where the feed was not asked for them."""
        ...


class Feed(Protocol):
    """The task vectors of some tasks over the arenas of a base."""

    @property
    def layout(self) -> Layout: ...
    @property
    def shapes(self) -> Shapes: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def arenas(self) -> Sequence[int]:
        """The arenas that are merged."""
        ...

    def open(self, arena: int, span: int) -> SpanFeed:
        """Read a span."""
        ...

    def held(self, arena: int, start: int, count: int) -> npt.NDArray[np.int64]:
        """How many of `count` weights of an arena each task has; shape (rows,)."""
        ...


def shapes(tensors: Sequence[TensorSpec], segments: Sequence[SegmentSpec]) -> Shapes:
    """The tensor of each segment; one that is no plain run of its segment counts as a vector."""
    found: dict[int, tuple[str, tuple[int, ...]]] = {}
    for tensor in tensors:
        count = segments[tensor.segment].numel
        plain = tensor.numel == count and tensor.stride == contiguous_stride(tensor.shape)
        known = found.get(tensor.segment)
        if known is None or (plain and known[1] == (count,)):
            shape = tensor.shape if plain else (count,)
            found[tensor.segment] = (known[0] if known else tensor.name, shape)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Weights of a span that share a statistic, or are merged without one."""

    key: tuple[int, ...]
    """What they share it with: () everything, (segment,) its tensor, (segment, row) its row."""
    within: int
    """First weight, counted in the span."""
    count: int
    total: int
    """Weights of all cuts of that key."""
    tensor: str = ""
    shape: tuple[int, ...] = ()
    first: int = 0
    """First weight, counted in the tensor."""
    unit: int = 1
    """Blocks are multiples of so many weights."""
    surveyed: bool = True

    def blocks(self, size: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of its blocks of about `size` weights, counted in the span."""
        step = max(size // self.unit, 1) * self.unit
        for start, stop in blocks(self.count, step):
            yield self.within + start, self.within + stop


def cuts(feed: Feed, scope: Scope, arena: int, span: int) -> Iterator[Cut]:
    """A span cut so that each cut has one statistic."""
    layout = feed.layout
    record = layout.arenas[arena]
    if scope is Scope.VECTOR:
        count = min(record.span, record.weights - span * record.span)
        total = sum(layout.arenas[n].weights for n in feed.arenas)
        yield Cut(key=(), within=0, count=count, total=total)
        return
    for piece in layout.pieces(arena, span):
        count = layout.segments[piece.segment].numel
        name, shape = feed.shapes.get(piece.segment, ("", (count,)))
        whole = Cut(
            key=(piece.segment,),
            within=piece.within,
            count=piece.count,
            total=count,
            tensor=name,
            shape=shape,
            first=piece.start,
        )
        yield from [whole] if scope is Scope.TENSOR else _rows(whole)


def _rows(piece: Cut) -> Iterator[Cut]:
    """The whole rows of a piece of a tensor together, and each row that a span's end cuts."""
    length = row_length(piece.shape)
    start, stop = piece.first, piece.first + piece.count
    low, high = -(-start // length) * length, stop // length * length
    edges = [start, *(n for n in (low, high) if start < n < stop), stop]
    for first, last in pairwise(edges):
        uncut = first % length == 0 and last % length == 0
        row = first // length
        yield Cut(
            key=(piece.key[0],) if uncut else (piece.key[0], row),
            within=piece.within + first - start,
            count=last - first,
            total=last - first if uncut else length,
            tensor=piece.tensor,
            shape=piece.shape,
            first=first,
            unit=length if uncut else 1,
            surveyed=not uncut,
        )
