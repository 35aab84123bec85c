"""Timing in pairs: what is compared runs by turns in one process, and ratios are of medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

__all__ = ["by_turns"]


def by_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    burst: int = 1,
    before: int = 1,
) -> dict[str, dict[str, float]]:
    """Seconds of each, as minimum, median and maximum; all of them, by turns.

    Parameters
    ----------
    runs
        What is compared.
    repeats, warmup
        Turns that count, and turns before them.
    burst
        Runs a turn. The first `before` of more than one do not count: torch's threads still spin
        on the cores after what ran before, and the caches hold what that left. The median of the
        very first is given by itself: "first".
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    firsts: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            for again in range(burst):
                began = time.perf_counter()
                run()
                spent = time.perf_counter() - began
                if turn < warmup:
                    continue
                if again >= before or burst == 1:
                    seconds[name].append(spent)
                elif again == 0:
                    firsts[name].append(spent)
    return {
        name: {"min": min(found), "median": median(found), "max": max(found)}
        | ({"first": median(firsts[name])} if firsts[name] else {})
        for name, found in seconds.items()
    }
