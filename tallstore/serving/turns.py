"""Whose turn it is: one request at a time, those for one task together, nobody for ever behind.

A turn is a task's. When it begins, all requests for the task that are waiting are let in, one after
the other; who asks later waits for the next turn, unless nobody else waits. The next turn is that
of the task whose request is oldest.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from tallstore.errors import OptionError
from tallstore.interrupts import Held

__all__ = ["Request", "SharedTurn", "Turns"]

#: Seconds until Ctrl-C is listened for.
_PATIENCE: Final = 0.05


@dataclass(eq=False, slots=True)
class Request:
    """Somebody who waits for a turn, or has it."""

    task: object
    owner: object
    admitted: Future[None] = field(default_factory=Future)


def _asker() -> object:
    """Who is asking: the asyncio task that is running, or else the thread."""
    with contextlib.suppress(RuntimeError):
        current = asyncio.current_task()
        if current is not None:
            return current
    return threading.get_ident()


class Turns:
    """Lets requests in, one at a time. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: Request | None = None
        self._turn: deque[Request] = deque()
        self._waiting: deque[Request] = deque()

    def ask(self, task: object) -> Request:
        """Join the queue; `Request.admitted` is done once one is let in.

        Raises
        ------
        OptionError
            Who asks is inside: it would wait for itself.
        """
        request = Request(task, _asker())
        with self._lock:
            inside = self._inside
            if inside is not None and inside.owner == request.owner:
                raise OptionError(
                    f"switching within use({inside.task!r}), by the same thread or asyncio task: "
                    "it would wait for itself; leave the with block first"
                )
            if inside is None:
                self._admit(request)
            elif inside.task == task and not self._waiting:
                self._turn.append(request)
            else:
                self._waiting.append(request)
        return request

    def leave(self, request: Request) -> None:
        """Give the turn up, or the place in the queue."""
        with self._lock:
            if self._inside is request:
                self._inside = None
                self._next()
                return
            for queue in (self._turn, self._waiting):
                with contextlib.suppress(ValueError):
                    queue.remove(request)

    def enter(self, task: object, held: Held) -> Request:
        """Wait to be let in; Ctrl-C, held back, is heard while waiting."""
        request = self.ask(task)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    request.admitted.result(_PATIENCE if held.active else None)
                    break
                held.hear()
        except BaseException:
            self.leave(request)
            raise
        return request

    async def enter_async(self, task: object) -> Request:
        """Wait to be let in, without blocking the event loop."""
        request = self.ask(task)
        try:
            # Shielded: what a cancelled wait would cancel is set by whoever leaves.
            await asyncio.shield(asyncio.wrap_future(request.admitted))
        except BaseException:
            self.leave(request)
            raise
        return request

    def _next(self) -> None:
        if not self._turn and self._waiting:
            task = self._waiting[0].task
            self._turn = deque(r for r in self._waiting if r.task == task)
            self._waiting = deque(r for r in self._waiting if r.task != task)
        if self._turn:
            self._admit(self._turn.popleft())

    def _admit(self, request: Request) -> None:
        self._inside = request
        request.admitted.set_result(None)

    def __repr__(self) -> str:
        inside: Any = self._inside.task if self._inside else None
        return f"<Turns {inside!r} inside, {len(self._turn) + len(self._waiting)} waiting>"


class SharedTurn:
    """A turn that several have a part in; it is given up when the last of them ends."""

    def __init__(self, leave: Callable[[], None], parts: int) -> None:
        self._leave = leave
        self._parts = parts
        self._lock = threading.Lock()

    def end(self) -> None:
        """End a part."""
        with self._lock:
            self._parts -= 1
            last = not self._parts
        if last:
            self._leave()
