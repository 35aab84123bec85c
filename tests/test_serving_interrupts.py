"""Ctrl-C and the end of an event loop: a switch ends, and the turn with it, neither before."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernel_helpers import DEVICE
from serving_helpers import Net, assert_is, loops, make_store
from zoo import fine_tune, make_base

import tallstore
from tallstore.errors import StoreClosedError
from tallstore.interrupts import Held
from tallstore.ops import touches
from tallstore.serving import TaskSwitcher
from tallstore.serving import forms as forms_module
from tallstore.serving.model import Model
from tallstore.serving.stock import Stock
from tallstore.serving.turns import Turns
from tallstore.serving.writer import Writer
from tallstore.workers import workers

__all__ = ["loops"]  # a fixture

pytestmark = pytest.mark.usefixtures("loops")


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_held_back_until_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Held() as held:
        assert held.active
        with Held():
            interrupt()
            done.append("inner")
        interrupt()
        done.append("outer")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_heard_in_between_it_is_not_heard_again() -> None:
    with Held() as held:
        held.hear()
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            held.hear()


def test_a_handler_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    try:
        with Held():
            interrupt()
            assert not told
        assert told == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_never_interrupted() -> None:
    found = []

    def elsewhere() -> None:
        with Held() as held:
            found.append(held.active)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.fixture
def made(tmp_path: Path) -> tuple[TaskSwitcher, Path]:
    store = tmp_path / "zoo.tall"
    make_store(store)
    return TaskSwitcher(Net(make_base()).to(DEVICE), store), store


def when_called(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[[], object]
) -> None:
    """Do something once, before a function is called, and once after it was."""
    real = getattr(owner, name)
    armed = [True]

    def called(*args: Any, **options: Any) -> Any:
        if armed[0]:
            armed[0] = False
            then()
            try:
                return real(*args, **options)
            finally:
                then()
        return real(*args, **options)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Turns, "ask"),
        (Turns, "leave"),
        (Model, "check_places"),
        (Stock, "take"),
        (Writer, "write"),
        (Model, "install"),
    ],
)
def test_a_switch_goes_on_to_its_end(
    made: tuple[TaskSwitcher, Path], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    switcher, store = made
    with switcher:
        switcher.switch("a")
        when_called(monkeypatch, owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            switcher.switch("b")
        assert switcher.live == "b"
        assert_is(switcher.model, store, "b")
        when_called(monkeypatch, owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt), switcher.use("a"):
            pass
        switcher.switch("b")
        assert_is(switcher.model, store, "b")


def test_who_waits_for_a_turn_hears_it(made: tuple[TaskSwitcher, Path]) -> None:
    switcher, store = made
    inside, over = threading.Event(), threading.Event()

    def hold() -> None:
        with switcher.use("a"):
            inside.set()
            over.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(20)
    soon = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    soon.start()
    with pytest.raises(KeyboardInterrupt):
        switcher.switch("b")
    over.set()
    thread.join()
    switcher.switch("b")
    assert_is(switcher.model, store, "b")


def test_a_first_write_that_fails_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "zoo.tall"
    base = make_base()
    tallstore.pack(store, base, {"a": fine_tune(base, 1)}, code="signs")
    with TaskSwitcher(Net(make_base()).to(DEVICE), store) as switcher:
        calls = [0]

        def failing(real: Any) -> Any:
            def call(*args: Any) -> Any:
                calls[0] += 1
                if calls[0] == 3:
                    raise MemoryError("no room")
                return real(*args)

            return call

        # One for the compiled loops, one for the others.
        monkeypatch.setattr(touches, "words", failing(touches.words))
        monkeypatch.setattr(forms_module, "density", failing(forms_module.density))
        with pytest.raises(MemoryError):
            switcher.switch("a")
        switcher.switch("a")
        assert_is(switcher.model, store, "a")


def test_work_that_cannot_be_started_leaves_nobody_at_work() -> None:
    done: list[int] = []

    def work(item: int) -> int:
        time.sleep(0.05)
        done.append(item)
        return item

    with workers(2) as pool:
        submit = pool._pool.submit

        def fail(*args: Any) -> Any:
            submit(*args)
            raise RuntimeError("can't start new thread")

        pool._pool.submit = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="new thread"):
            pool.together(work, range(100))
        pool._pool.submit = submit  # type: ignore[method-assign]
        so_far = len(done)
        # What nobody waits for ends with the item that it is at.
        time.sleep(0.3)
        assert len(done) <= so_far + 1


# -- asyncio ------------------------------------------------------------------------------


def slowly(monkeypatch: pytest.MonkeyPatch, switcher: TaskSwitcher) -> tuple[list[str], Any]:
    """Switches wait for an event; which are under way is told, and no two may be."""
    under_way: list[str] = []
    go_on, real = threading.Event(), switcher._switch

    def switch(task: str, **options: Any) -> Any:
        assert not under_way
        under_way.append(task)
        try:
            go_on.wait(20)
            return real(task, **options)
        finally:
            under_way.remove(task)

    monkeypatch.setattr(switcher, "_switch", switch)
    return under_way, go_on


@pytest.mark.parametrize("how", ["aswitch", "ause"])
@pytest.mark.parametrize("cancelled", [True, False])
def test_a_loop_that_ends_does_not_end_the_turn(
    made: tuple[TaskSwitcher, Path], monkeypatch: pytest.MonkeyPatch, how: str, cancelled: bool
) -> None:
    switcher, store = made
    with switcher:
        under_way, go_on = slowly(monkeypatch, switcher)

        async def used() -> None:
            if how == "aswitch":
                await switcher.aswitch("a")
                return
            async with switcher.ause("a"):
                pass

        async def main() -> None:
            background = asyncio.create_task(used())
            while not under_way:
                await asyncio.sleep(0.001)
            if cancelled:
                background.cancel()

        asyncio.run(main())
        other = threading.Thread(target=switcher.switch, args=("b",))
        other.start()
        time.sleep(0.05)
        assert under_way == ["a"]
        go_on.set()
        other.join()
        assert switcher.live == "b"
        assert_is(switcher.model, store, "b")
        switcher.switch("a")


# -- at the end ---------------------------------------------------------------------------


def test_what_waits_while_it_is_closed(made: tuple[TaskSwitcher, Path]) -> None:
    switcher, _ = made
    found: list[BaseException] = []

    def refresh() -> None:
        try:
            switcher.refresh()
        except BaseException as exc:
            found.append(exc)

    thread = threading.Thread(target=refresh)
    with switcher.use("a"):
        thread.start()
        while not switcher._turns._waiting:
            time.sleep(0.001)
        switcher._closed = True
    thread.join()
    switcher._closed = False
    switcher.close()
    assert [type(exc) for exc in found] == [StoreClosedError]


def test_in_a_forked_process_it_says_so(
    made: tuple[TaskSwitcher, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    switcher, _ = made
    with switcher:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with pytest.raises(StoreClosedError, match="forked"):
                switcher.switch("a")
        switcher.switch("a")
