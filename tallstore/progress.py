"""How far long work has come, told to whoever wants to know."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Meter", "Report"]

#: Called with (stage, bytes done, bytes in all), from any thread, one call at a time.
Report = Callable[[str, int, int], None]


class Meter:
    """Adds up what threads have done and passes it on.

    Parameters
    ----------
    report
        Told after every step; None tells nobody.
    """

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self._lock = threading.Lock()

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        """Begin a stage of `total` bytes; returns what is to be called with each amount done."""
        done = 0
        report = self.report
        if report is None:
            return lambda count: None
        report(name, 0, total)

        def advance(count: int) -> None:
            nonlocal done
            with self._lock:
                done += count
                report(name, min(done, total), total)

        return advance
