"""A few threads that work on spans, each with torch's own threads switched off."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["Workers", "workers"]

_T = TypeVar("_T")
_R = TypeVar("_R")


class Workers:
    """A few threads that work on spans; see `workers`."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool = pool
        self.count = count

    def each(self, work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """``work(item)`` for each item, results in order, at most two a thread under way.

        The first failure is raised once the calls under way have ended.
        """
        pending: list[Future[_R]] = []
        try:
            for item in items:
                pending.append(self._pool.submit(work, item))
                if len(pending) > 2 * self.count:
                    pending[0].result()  # it is among them until it has ended
                    yield pending.pop(0).result()
            while pending:
                pending[0].result()
                yield pending.pop(0).result()
        finally:
            _end(pending, lambda _: None)

    def together(self, work: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
        """``work(item)`` for each item, results as they come; the calling thread works too.

        For a few long calls that somebody waits for: one thread less has to be woken, and nobody
        waits for a result before going on to the next.

        The first failure is raised once the calls under way have ended.
        """
        left, lock = iter(items), threading.Lock()
        found: list[_R] = []
        failed: list[BaseException] = []

        def go_on() -> None:
            try:
                while not failed:
                    with lock:
                        item = next(left, _NO_MORE)
                    if isinstance(item, _NoMore):
                        return
                    found.append(work(item))
            except BaseException as exc:
                failed.append(exc)

        others: list[Future[None]] = []
        try:
            for _ in range(self.count - 1):
                others.append(self._pool.submit(go_on))
            go_on()
        except BaseException as exc:
            failed.append(exc)
        _end(others, failed.append)
        if failed:
            raise failed[0]
        return found


def _end(futures: Collection[Future[_R]], tell: Callable[[BaseException], None]) -> None:
    """Cancel what has not begun, and wait for the rest, whatever the wait is interrupted by.

    What is under way still reads and writes: nobody may go on before it has ended, not by Ctrl-C.
    """
    interrupted: BaseException | None = None
    while True:
        try:
            # To wait for what has ended takes a while, too.
            left = [future for future in futures if not future.cancel() and not future.done()]
            if left:
                wait(left)
            break
        except BaseException as exc:
            interrupted = exc
            tell(exc)
    if interrupted is not None:
        raise interrupted


class _NoMore:
    """There are no more items."""


_NO_MORE = _NoMore()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(count: int | None = None) -> Iterator[Workers]:
    """Threads for the length of a block, each with torch's own threads switched off.

    Parameters
    ----------
    count
        Threads; the cores that this process may use, at most 16, where it is None.
    """
    count = count or min(cores(), 16)
    threads = torch.get_num_threads()
    ready = threading.Barrier(count + 1)

    def prepare() -> None:
        torch.set_num_threads(1)
        # A thread takes the process-wide number over at its first use of torch: now, while it is 1.
        torch.get_num_threads()
        ready.wait()

    with ThreadPoolExecutor(count, thread_name_prefix="tallstore") as pool:
        try:
            for _ in range(count):
                pool.submit(prepare)
            ready.wait()
        except BaseException:
            # A thread could not be started, or Ctrl-C: those that wait must not wait for ever.
            ready.abort()
            raise
        # The call in the workers also set the process-wide default: put that back.
        torch.set_num_threads(threads)
        yield Workers(pool, count)
