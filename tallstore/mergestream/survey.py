"""A rule's passes over all task vectors, and the merged vector of a span."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tallstore.mergestream.feed import Cut, Feed, SpanFeed, block_weights, cuts
from tallstore.merging import Floats, MergeRule, Stretch
from tallstore.workers import Workers

__all__ = ["Surveyed", "merge_span", "spans", "survey"]

_Key = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A rule that has made its surveys: one for all weights, or one for each tensor or cut row."""

    rule: MergeRule
    concluded: Mapping[_Key, MergeRule]

    def of(self, cut: Cut) -> MergeRule:
        """The rule for some weights."""
        return self.concluded.get(cut.key, self.rule)


def spans(feed: Feed) -> list[tuple[int, int]]:
    """(arena, span) of all that is merged."""
    return [(n, span) for n in feed.arenas for span in range(feed.layout.arenas[n].spans)]


class _Pass:
    """One survey under way. Thread-safe.

    A statistic is held from the first to the last span of its tensor: at any time those of the few
    tensors that the spans under way have in part.
    """

    def __init__(self, feed: Feed, rule: MergeRule, known: Mapping[_Key, MergeRule]) -> None:
        self._feed = feed
        self._rule = rule
        self._known = known
        self._lock = threading.Lock()
        self._totals: dict[_Key, npt.NDArray[np.int64]] = {}
        self._held: dict[_Key, npt.NDArray[np.int64]] = {}
        self._left: dict[_Key, int] = {}
        self.concluded: dict[_Key, MergeRule] = {}

    def look(self, arena: int, span: int, opened: SpanFeed) -> None:
        """Take in a span."""
        with np.errstate(over="ignore", invalid="ignore"):
            self._look(arena, span, opened)

    def _look(self, arena: int, span: int, opened: SpanFeed) -> None:
        size = block_weights(len(self._feed.tasks))
        place = span * self._feed.layout.arenas[arena].span
        for cut in cuts(self._feed, self._rule.scope, arena, span):
            if not cut.surveyed:
                continue
            rule = self._known.get(cut.key, self._rule)
            total = None
            for start, stop in cut.blocks(size):
                found = rule.survey(_stretch(self._feed, cut, arena, place, opened, start, stop))
                total = found if total is None else total + found
            if total is not None:
                self._fold(cut, rule, total, self._feed.held(arena, place + cut.within, cut.count))

    def _fold(
        self,
        cut: Cut,
        rule: MergeRule,
        total: npt.NDArray[np.int64],
        held: npt.NDArray[np.int64],
    ) -> None:
        with self._lock:
            if cut.key in self._totals:
                self._totals[cut.key] += total
                self._held[cut.key] += held
            else:
                self._totals[cut.key], self._held[cut.key] = total, held
            left = self._left.get(cut.key, cut.total) - cut.count
            self._left[cut.key] = left
            if left:
                return
            total, held = self._totals.pop(cut.key), self._held.pop(cut.key)
        # Nobody else comes to this key again.
        self.concluded[cut.key] = rule.conclude(total, weights=held)


def survey(
    rule: MergeRule, feed: Feed, *, workers: Workers, progress: Callable[[int], None]
) -> Surveyed:
    """Make the passes over all task vectors that a rule asks for.

    The result depends on neither the number of threads nor their order: statistics are integers,
    and every one is concluded from all of its weights.
    """
    known: Mapping[_Key, MergeRule] = {}
    for _ in range(rule.surveys):
        under_way = _Pass(feed, rule, known)

        def look(item: tuple[int, int], under_way: _Pass = under_way) -> None:
            opened = feed.open(*item)
            under_way.look(*item, opened)
            progress(opened.nbytes)

        for _ in workers.each(look, spans(feed)):
            pass
        known = under_way.concluded
    return Surveyed(rule, known)


def merge_span(surveyed: Surveyed, feed: Feed, arena: int, span: int, opened: SpanFeed) -> Floats:
    """The merged vector of a span, float32, finite, shape (weights,); zero in padding."""
    size = block_weights(len(feed.tasks))
    place = span * feed.layout.arenas[arena].span
    merged = np.zeros(opened.count, np.float32)
    for cut in cuts(feed, surveyed.rule.scope, arena, span):
        rule = surveyed.of(cut)
        for start, stop in cut.blocks(size):
            stretch = _stretch(feed, cut, arena, place, opened, start, stop)
            with np.errstate(over="ignore", invalid="ignore"):
                merged[start:stop] = rule.merge(stretch)
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(merged.sum()):
            np.nan_to_num(merged, copy=False)  # sums of finite vectors can overflow, both ways
    return merged


def _stretch(
    feed: Feed, cut: Cut, arena: int, place: int, opened: SpanFeed, start: int, stop: int
) -> Stretch:
    return Stretch(
        tasks=feed.tasks,
        vectors=opened.vectors(start, stop),
        arena=arena,
        start=place + start,
        tensor=cut.tensor,
        shape=cut.shape,
        first=cut.first + start - cut.within,
        masks=opened.masks(start, stop),
    )
