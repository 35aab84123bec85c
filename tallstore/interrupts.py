"""Ctrl-C, held back for a moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Held"]


class Held:
    """Holds Ctrl-C back for the length of a block: it is heard at its end.

    An interrupt between two lines may lose a lock, or leave threads at work that nobody waits for.
    For blocks of milliseconds. Only the main thread is ever interrupted: elsewhere nothing is done.
    """

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._asked = False

    @property
    def active(self) -> bool:
        """Whether anything is held back."""
        return self._handler is not None

    def __enter__(self) -> Held:
        if threading.current_thread() is threading.main_thread():
            there = signal.getsignal(signal.SIGINT)
            if callable(there):
                try:
                    signal.signal(signal.SIGINT, self._note)
                except ValueError:  # in another interpreter than the main one
                    return self
                self._handler = there
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def hear(self) -> None:
        """Do now what Ctrl-C does, if it was asked for: raise KeyboardInterrupt, as a rule."""
        if self._asked and self._handler is not None:
            self._asked = False
            self._handler(signal.SIGINT, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self.hear()
