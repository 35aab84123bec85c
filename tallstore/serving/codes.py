"""The tasks' codes on the device: those used last, within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from tallstore.errors import OptionError
from tallstore.serving.reading import TaskCode
from tallstore.serving.results import Source
from tallstore.wording import size

__all__ = ["Codes", "Taken"]


@dataclass(frozen=True, slots=True)
class Taken:
    """A code on the device, and how it came there."""

    code: TaskCode
    source: Source
    loaded: int


class Codes:
    """Holds codes within a budget; the one that was not used for longest goes first. Thread-safe.

    Parameters
    ----------
    load
        Brings a task's code to the device.
    source
        Where from.
    budget
        Bytes; None: no limit.
    forget
        Called when the live task's code goes: nobody may hold on to it.
    """

    def __init__(
        self,
        load: Callable[[str], TaskCode],
        *,
        source: Source,
        budget: int | None,
        forget: Callable[[], None],
    ) -> None:
        self._load = load
        self._forget = forget
        self._source = source
        self._budget = budget
        self._held: OrderedDict[str, TaskCode] = OrderedDict()
        self._coming: dict[str, Future[TaskCode]] = {}
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        #: The task that is live, or being written: to go from a sparse code to the next takes both.
        self.live: str | None = None

    def take(self, task: str, nbytes: int, *, ahead: bool = False) -> Taken:
        """A task's code, brought to the device if it is not there.

        Parameters
        ----------
        nbytes
            That it will take.
        ahead
            Keep the live task's code, whatever it takes.

        Raises
        ------
        OptionError
            `ahead`, and the budget does not hold both.
        """
        while True:
            with self._lock:
                if task in self._held:
                    self._held.move_to_end(task)
                    return Taken(self._held[task], "device", 0)
                coming = self._coming.get(task)
                ahead_of_us = None
                if coming is None:
                    ahead_of_us = self._make_room(task, nbytes, keep_live=ahead)
                if coming is None and ahead_of_us is None:
                    self._sizes[task] = nbytes
                    mine = self._coming[task] = Future()
                    break
            if coming is not None:
                return Taken(coming.result(), "device", 0)
            if ahead_of_us is not None:
                wait([ahead_of_us])
        try:
            code = self._load(task)
        except BaseException as exc:
            with self._lock:
                del self._coming[task], self._sizes[task]
            mine.set_exception(exc)
            raise
        with self._lock:
            del self._coming[task]
            self._held[task] = code
            self._sizes[task] = code.nbytes
        mine.set_result(code)
        return Taken(code, self._source, code.nbytes)

    def _make_room(self, task: str, nbytes: int, *, keep_live: bool) -> Future[TaskCode] | None:
        """Drop codes until there is room; gives one to wait for where only that helps."""
        if self._budget is None:
            return None
        idle = [name for name in self._held if name != self.live]
        if self.live is not None and self.live in self._held and not keep_live:
            idle.append(self.live)
        while sum(self._sizes.values()) + nbytes > self._budget:
            if not idle and self._coming:
                return next(iter(self._coming.values()))
            if not idle:
                held = sum(self._sizes.values())
                raise OptionError(
                    f"budget={self._budget}: {size(held)} of it are in use, and task {task!r} "
                    f"takes {size(nbytes)}; give {size(held + nbytes)} or more"
                )
            self._drop(idle.pop(0))
        return None

    def _drop(self, task: str) -> None:
        self._held.pop(task, None)
        self._sizes.pop(task, None)
        if task == self.live:
            self.live = None
            self._forget()

    def adopt(self, older: Codes, tasks: Iterable[str]) -> None:
        """Take over codes that another one holds."""
        kept = set(tasks)
        with older._lock:
            for task in [name for name in older._held if name in kept]:
                self._held[task] = older._held[task]
                self._sizes[task] = older._sizes[task]
            self.live = older.live if older.live in self._held else None

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            for task in list(self._held):
                self._drop(task)

    def fits(self, nbytes: int) -> bool:
        """Whether the budget holds so much at all."""
        return self._budget is None or nbytes <= self._budget

    def nbytes(self) -> int:
        """Bytes held, and on their way."""
        with self._lock:
            return sum(self._sizes.values())

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks whose codes are on the device, the one used last at the end."""
        with self._lock:
            return tuple(self._held)
