"""Long runs that an interrupt ends early, with the rows of what was done."""

from __future__ import annotations

import signal
from collections.abc import Callable

__all__ = ["interruptible"]


def interruptible() -> Callable[[], bool]:
    """Have SIGINT only be noted from now on; tells whether it came."""
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    return lambda: bool(came)
