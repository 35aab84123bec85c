"""Threads that wait for each other never wait for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
