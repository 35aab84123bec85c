"""Merged weights: base + alpha * v, a span at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tallstore.codecs import Bytes
from tallstore.coding import from_float32
from tallstore.dtypes import itemsize
from tallstore.mergestream.rounding import converted, finite
from tallstore.mergestream.stored import StoredSpan, StoreFeed
from tallstore.mergestream.survey import Surveyed, merge_span
from tallstore.merging import Floats

__all__ = ["Blend", "BlendedSpan"]

_WORDS: Final[dict[int, Any]] = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """A surveyed rule and a scaling.

    A weight is ``base + alpha * v`` in float32, each operation rounded, then rounded once to the
    dtype of the output and kept finite. Where v is 0 the weight is the base's, bit for bit. The
    merge of one task alone with alpha 1, by a rule that gives a single task's vector whole, is
    that task bit for bit: ``base + (finetuned - base)`` may differ in the last bit in float32, so
    it is not computed.

    Parameters
    ----------
    kept
        Where to keep merged vectors, to scale them again by another alpha: 4 bytes a weight of
        the model, as much as whoever evaluates it holds anyway.
    """

    feed: StoreFeed
    surveyed: Surveyed
    alpha: float
    kept: dict[tuple[int, int], Floats] | None = None

    @property
    def lone(self) -> bool:
        """Whether the merge is its only task."""
        return len(self.feed.tasks) == 1 and self.alpha == 1 and self.surveyed.rule.faithful

    def open(self, arena: int, span: int) -> BlendedSpan:
        """Merge a span; valid until the same thread opens the next one."""
        if self.lone:
            return BlendedSpan(self.feed.open(arena, span), None)
        merged = None if self.kept is None else self.kept.get((arena, span))
        opened = self.feed.open(arena, span, tasks=merged is None)
        with np.errstate(over="ignore"):
            if merged is None:
                merged = merge_span(self.surveyed, self.feed, arena, span, opened)
            if self.kept is not None:
                self.kept[arena, span] = merged
            return BlendedSpan(opened, merged * np.float32(self.alpha))


class BlendedSpan:
    """The merged weights of a span."""

    def __init__(self, opened: StoredSpan, step: Floats | None) -> None:
        self._opened = opened
        self._step = step

    def raw(self, start: int, stop: int, dtype: str) -> Bytes:
        """Weights `start` .. `stop` of the span, as bytes of `dtype`."""
        opened = self._opened
        if self._step is None:
            return opened.weights(start, stop, dtype)
        step = self._step[start:stop]
        with np.errstate(over="ignore", invalid="ignore"):
            moved = opened.base32(start, stop) + step
        rounded = from_float32(finite(moved, dtype), dtype)
        width = itemsize(opened.dtype)
        base = converted(opened.base[start * width : stop * width], opened.dtype, dtype)
        words = _WORDS[itemsize(dtype)]
        chosen: npt.NDArray[Any] = np.where(step == 0, base.view(words), rounded.view(words))
        return chosen.view(np.uint8)
