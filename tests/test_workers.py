"""Threads that wait for each other never wait for ever."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tallstore.workers import workers


@pytest.mark.parametrize("failure", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_thread_that_cannot_start_is_told_and_the_others_end(
    monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    submit = ThreadPoolExecutor.submit
    calls = 0

    def second_fails(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Future[Any]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise failure
        return submit(pool, work, *args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", second_fails)
    before = threading.active_count()
    raised: list[BaseException] = []

    def start() -> None:
        try:
            with workers(3):
                pass
        except BaseException as exc:
            raised.append(exc)

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    starting.join(20)
    assert not starting.is_alive(), "it waits for threads that wait for it"
    assert raised == [failure] and threading.active_count() == before


def test_work_comes_back_in_order() -> None:
    with workers(3) as pool:
        assert list(pool.each(lambda n: n * n, range(50))) == [n * n for n in range(50)]


def test_a_failure_is_told_when_nothing_is_under_way_any_more() -> None:
    """Else a caller could close what a call still reads."""
    started, ended = threading.Event(), threading.Event()

    def work(number: int) -> None:
        if not number:
            started.wait(10)
            raise ValueError("the first")
        started.set()
        ended.wait(0.3)
        ended.set()

    with workers(2) as pool:
        with pytest.raises(ValueError, match="the first"):
            list(pool.each(work, range(2)))
        assert ended.is_set()


def test_together_the_calling_thread_works_too() -> None:
    with workers(3) as pool:
        both = threading.Barrier(3, timeout=20)

        def work(number: int) -> tuple[int, int]:
            if number < 3:
                both.wait()  # each of three threads has one
            return number, threading.get_ident()

        found = pool.together(work, iter(range(50)))
        assert sorted(number for number, _ in found) == list(range(50))
        assert threading.get_ident() in {ident for _, ident in found}
        assert pool.together(work, ()) == []


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_together_the_first_failure_is_told_at_the_end(kind: type[BaseException]) -> None:
    ended = threading.Event()
    started = threading.Event()

    def work(number: int) -> None:
        if number == 1:
            started.wait(10)
            raise kind("the first")
        started.set()
        time.sleep(0.2)
        ended.set()

    with workers(2) as pool:
        with pytest.raises(kind, match="the first"):
            pool.together(work, range(1000))
        assert ended.is_set()

        def items() -> Iterator[int]:
            yield 0
            raise kind("while listing")

        with pytest.raises(kind, match="while listing"):
            pool.together(lambda n: n, items())


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such signals")
@pytest.mark.parametrize("how", ["each", "together"])
def test_an_interrupted_wait_goes_on(how: str) -> None:
    """Who was interrupted may write what is still being written."""
    under_way: list[int] = []

    def work(number: int) -> None:
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.01)
            return
        under_way.append(number)
        time.sleep(0.5)
        under_way.remove(number)

    class Rung(Exception):
        pass

    def ring(*_: object) -> None:
        raise Rung

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with workers(2) as pool:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(Rung):
                if how == "each":
                    list(pool.each(work, range(6)))
                else:
                    pool.together(work, range(6))
            assert not under_way
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
