"""The flat order of a checkpoint's segments: arenas of one dtype, cut into spans.

Segments are grouped by dtype into arenas, in the order in which they come. Each starts at a
multiple of `BLOCK` weights, so that a kernel's block has one level table and every access is a
full one. An arena is cut into spans of equally many weights; every stream over the arena (base,
vector, codes, residual) has one chunk a span, so that any span can be decoded by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tallstore.dtypes import itemsize
from tallstore.specs import SegmentSpec

__all__ = ["BLOCK", "SPAN", "Arena", "Layout", "Piece", "Place", "lay_out"]

#: Weights a kernel block; segments start at its multiples.
BLOCK: Final = 1024
#: Weights a span: a chunk of them is 16 MiB for the largest dtype, the cap of a chunk.
SPAN: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Arena:
    """A flat run of segments of one dtype."""

    dtype: str
    weights: int
    """Padding included, a multiple of `BLOCK`."""

    @property
    def span(self) -> int:
        """Weights a span."""
        return SPAN

    @property
    def spans(self) -> int:
        """How many spans there are."""
        return -(-self.weights // SPAN)

    @property
    def chunk_size(self) -> int:
        """Bytes of one chunk of elements."""
        return self.span * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a segment lies: `offset` weights into arena number `arena`."""

    arena: int
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a segment that lies in one span."""

    segment: int
    start: int
    """First element, counted in the segment."""
    within: int
    """First element, counted in the span."""
    count: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Segments and where they lie."""

    segments: tuple[SegmentSpec, ...]
    arenas: tuple[Arena, ...]
    places: tuple[Place, ...]

    def pieces(self, arena: int, span: int) -> Iterator[Piece]:
        """The parts of segments in one span, in order; what lies between them is padding."""
        size = self.arenas[arena].span
        low, high = span * size, (span + 1) * size
        for segment, place in enumerate(self.places):
            if place.arena != arena:
                continue
            start = max(low, place.offset)
            stop = min(high, place.offset + self.segments[segment].numel)
            if start < stop:
                yield Piece(segment, start - place.offset, start - low, stop - start)


def lay_out(segments: Sequence[SegmentSpec]) -> Layout:
    """The layout of `segments`, a function of their dtypes and sizes alone."""
    order: dict[str, int] = {}
    weights: list[int] = []
    places: list[Place] = []
    for segment in segments:
        arena = order.setdefault(segment.dtype, len(order))
        if arena == len(weights):
            weights.append(0)
        places.append(Place(arena, weights[arena]))
        weights[arena] += -(-segment.numel // BLOCK) * BLOCK
    arenas = tuple(Arena(dtype, weights[arena]) for dtype, arena in order.items())
    return Layout(tuple(segments), arenas, tuple(places))
