"""Reading a checkpoint's weights in the base's order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from tallstore.codecs import Bytes
from tallstore.coding import Floats, from_float32, to_float32
from tallstore.documents import CODE
from tallstore.dtypes import itemsize
from tallstore.layout import Layout
from tallstore.matching import Plan
from tallstore.sources.source import Source

__all__ = ["Candidate", "Held"]


@dataclass(frozen=True, slots=True)
class Held:
    """Weights `start` .. `stop` of a block that a checkpoint has; the rest is the base's."""

    base_segment: int
    segment: int
    first: int
    """Element of the checkpoint's segment."""
    start: int
    stop: int


@dataclass(frozen=True)
class Candidate:
    """A checkpoint about to become a task, with its plan."""

    name: str
    source: Source
    plan: Plan
    layout: Layout
    """The base's."""
    changed: Mapping[int, Bytes] = field(default_factory=dict)
    """Segments to code as if the checkpoint had these bytes."""
    _by_arena: dict[int, list[tuple[int, int, int, int]]] = field(init=False)

    def __post_init__(self) -> None:
        by_arena: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        for segment, parts in enumerate(self.plan.parts):
            for part in parts:
                if part.kind == CODE:
                    place = self.layout.places[part.segment]
                    row = (place.offset, part.count, segment, part.segment)
                    by_arena[place.arena].append(row)
        for rows in by_arena.values():
            rows.sort()
        object.__setattr__(self, "_by_arena", by_arena)

    def arenas(self) -> list[int]:
        """The base's arenas that it is coded against."""
        return sorted(self._by_arena)

    def weights(self, arena: int) -> int:
        """How many weights of an arena it has."""
        return sum(count for _, count, _, _ in self._by_arena.get(arena, ()))

    def held(self, arena: int, start: int, count: int) -> Iterator[Held]:
        """What it has of weights `start` .. `start` + `count` of an arena, in order."""
        for offset, length, segment, base_segment in self._by_arena.get(arena, ()):
            low, high = max(start, offset), min(start + count, offset + length)
            if low < high:
                yield Held(base_segment, segment, low - offset, low - start, high - start)

    def gather(self, arena: int, start: int, base: Bytes) -> tuple[Bytes, list[Held]]:
        """The checkpoint's bytes over a block, in its own dtype, gaps filled from the base.

        Parameters
        ----------
        base
            The base's bytes of the block, in the base's dtype.
        """
        base_dtype = self.layout.arenas[arena].dtype
        dtype = self.plan.dtypes.get(arena, base_dtype)
        count = base.size // itemsize(base_dtype)
        held = list(self.held(arena, start, count))
        covered = sum(item.stop - item.start for item in held) == count
        if dtype != base_dtype:
            raw = from_float32(to_float32(base, base_dtype), dtype).copy()
        else:
            raw = np.empty_like(base) if covered else base.copy()
        size = itemsize(dtype)
        for item in held:
            self._read(item.segment, item.first * size, raw[item.start * size : item.stop * size])
        return raw, held

    def _read(self, segment: int, start: int, out: Bytes) -> None:
        if segment in self.changed:
            np.copyto(out, self.changed[segment][start : start + out.size])
        else:
            self.source.read(segment, start, out)

    def gather_float32(self, arena: int, start: int, base: Bytes, base32: Floats) -> Floats:
        """The checkpoint's weights over a block as float32; in gaps, exactly the base's."""
        base_dtype = self.layout.arenas[arena].dtype
        dtype = self.plan.dtypes.get(arena, base_dtype)
        raw, held = self.gather(arena, start, base)
        values = to_float32(raw, dtype)
        if dtype != base_dtype:
            end = 0
            for item in held:
                values[end : item.start] = base32[end : item.start]
                end = item.stop
            values[end:] = base32[end:]
        return values
