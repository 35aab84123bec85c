"""Where the elements of a checkpoint lie: in which spans of the base's arenas, or of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tallstore.documents import CODE, OWN, BaseDocument, TaskDocument
from tallstore.dtypes import itemsize
from tallstore.layout import Layout
from tallstore.spans import Run, SpanKey
from tallstore.specs import SegmentSpec

__all__ = ["SpanMap"]


@dataclass(frozen=True, slots=True)
class _Link:
    """One part, seen from what it refers to."""

    segment: int
    offset: int
    start: int
    count: int
    coded: bool


class SpanMap:
    """The spans of the base, or of one task, and what each holds of it.

    A span is named (own, arena, number): `own` tells the task's own arenas from the base's.
    """

    def __init__(self, base: BaseDocument, task: TaskDocument | None) -> None:
        self._base = base
        self._task = task
        self._links = self._link()
        self.segments: Sequence[SegmentSpec] = (task or base).contents.segments

    def _link(self) -> dict[tuple[bool, int], list[_Link]]:
        links: dict[tuple[bool, int], list[_Link]] = defaultdict(list)
        if self._task is None:
            for number, segment in enumerate(self._base.contents.segments):
                links[False, number].append(_Link(number, 0, 0, segment.numel, False))
            return links
        for number, parts in enumerate(self._task.parts):
            offset = 0
            for part in parts:
                link = _Link(number, offset, part.start, part.count, part.kind == CODE)
                links[part.kind == OWN, part.segment].append(link)
                offset += part.count
        return links

    def _layout(self, own: bool) -> Layout:
        return self._task.own_layout if own and self._task else self._base.layout

    @property
    def has_codes(self) -> bool:
        """Whether anything is predicted from the base."""
        return any(link.coded for links in self._links.values() for link in links)

    def dtype(self, key: SpanKey) -> str:
        """The dtype of a span's elements."""
        own, arena, _ = key
        return self._layout(own).arenas[arena].dtype

    def width(self, run: Run) -> int:
        """Bytes of an element of the segment that a run is of."""
        return itemsize(self.segments[run.segment].dtype)

    def spans(self, wanted: Sequence[int]) -> list[SpanKey]:
        """The spans that hold any part of the segments `wanted`, in the order of the streams."""
        pairs: set[SpanKey] = set()
        chosen = set(wanted)
        for (own, number), links in self._links.items():
            for link in links:
                if link.segment in chosen and link.count:
                    pairs.update(self._link_spans(own, number, link))
        return sorted(pairs)

    def _link_spans(self, own: bool, number: int, link: _Link) -> Iterator[SpanKey]:
        layout = self._layout(own)
        place = layout.places[number]
        size = layout.arenas[place.arena].span
        first = place.offset + link.start
        for span in range(first // size, (first + link.count - 1) // size + 1):
            yield own, place.arena, span

    def runs(self, key: SpanKey) -> Iterator[Run]:
        """What a span holds of the loaded checkpoint."""
        own, arena, span = key
        for piece in self._layout(own).pieces(arena, span):
            for link in self._links.get((own, piece.segment), ()):
                start = max(piece.start, link.start)
                stop = min(piece.start + piece.count, link.start + link.count)
                if start < stop:
                    yield Run(
                        link.segment,
                        link.offset + start - link.start,
                        stop - start,
                        piece.within + start - piece.start,
                        link.coded,
                        piece.segment,
                    )
