"""One request at a time, batched by task, nobody for ever behind; threads and asyncio alike."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch
from kernel_helpers import DEVICE
from serving_helpers import Net, make_store
from zoo import bits

import tallstore
from tallstore.errors import OptionError, UnknownTaskError
from tallstore.serving import TaskSwitcher
from tallstore.serving.turns import Request, Turns

TASKS = ("a", "b", "added")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "zoo.tall"
    make_store(path)
    return path


@pytest.fixture
def switcher(store: Path) -> TaskSwitcher:
    with tallstore.open(store) as opened:
        return TaskSwitcher(Net(opened.load()).to(DEVICE), store)


# -- turns alone --------------------------------------------------------------------------


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """Asked by somebody else each time."""
    monkeypatch.setattr("tallstore.serving.turns._asker", object)
    return Turns()


def asked(turns: Turns, *tasks: str) -> list[Request]:
    return [turns.ask(task) for task in tasks]


def order(turns: Turns, requests: list[Request]) -> str:
    """The tasks, in the order in which they are let in."""
    served = ""
    left = list(requests)
    while left:
        (inside,) = (request for request in left if request.admitted.done())
        served += str(inside.task)
        left.remove(inside)
        turns.leave(inside)
    return served


def test_requests_for_a_task_follow_each_other(turns: Turns) -> None:
    assert order(turns, asked(turns, *"abcabca")) == "abbccaa"


def test_alone_one_goes_on_and_on(turns: Turns) -> None:
    assert order(turns, asked(turns, *"aaaa")) == "aaaa"


def test_nobody_is_for_ever_behind(turns: Turns) -> None:
    first, other = asked(turns, "a", "b")
    waiting = [other]
    for _ in range(5):  # more and more come for the task whose turn it is
        waiting += asked(turns, "a")
    turns.leave(first)
    assert other.admitted.done()
    assert order(turns, waiting) == "baaaaa"


def test_who_gives_up_is_skipped(turns: Turns) -> None:
    first, second, third = asked(turns, "a", "b", "c")
    turns.leave(second)
    turns.leave(first)
    assert third.admitted.done()
    turns.leave(third)
    (again,) = asked(turns, "b")
    assert again.admitted.done()


# -- the switcher -------------------------------------------------------------------------


def exactly(model: torch.nn.Module, wanted: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return all(bits(found[name].cpu()) == bits(wanted[name]) for name in wanted)


def test_no_thread_sees_another_tasks_weights(store: Path, switcher: TaskSwitcher) -> None:
    wanted = {task: tallstore.load(store, task=task) for task in TASKS}
    wrong: list[str] = []
    switches: list[str] = []

    def client(number: int) -> None:
        for turn in range(20):
            task = TASKS[(number * 7 + turn * (number + 1)) % 3]
            with switcher.use(task) as model:
                switches.append(task)
                if switcher.live != task or not exactly(model, wanted[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(switches) == 100


def test_within_use_nobody_switches(switcher: TaskSwitcher) -> None:
    done = []
    with switcher.use("a"):
        thread = threading.Thread(target=lambda: done.append(switcher.switch("b")))
        thread.start()
        time.sleep(0.05)
        assert not done and switcher.live == "a"
        with pytest.raises(OptionError, match=r"within use\('a'\)"):
            switcher.switch("b")
    thread.join()
    assert switcher.live == "b" and done[0].previous == "a"


def test_a_failing_block_gives_the_turn_up(switcher: TaskSwitcher) -> None:
    with pytest.raises(ZeroDivisionError), switcher.use("a"):
        raise ZeroDivisionError
    with pytest.raises(UnknownTaskError, match="no task 'z' is served; there are: 'a', 'b'"):
        switcher.switch("z")
    assert switcher.switch("b").previous == "a"


def test_asyncio(store: Path, switcher: TaskSwitcher) -> None:
    wanted = {task: tallstore.load(store, task=task) for task in TASKS}

    async def client(number: int) -> int:
        right = 0
        for turn in range(6):
            task = TASKS[(number + turn) % 3]
            async with switcher.ause(task) as model:
                await asyncio.sleep(0)
                right += exactly(model, wanted[task])
        return right

    async def main() -> None:
        assert await asyncio.gather(*(client(n) for n in range(4))) == [6] * 4
        done = await switcher.aswitch("a")
        assert done.task == switcher.live == "a"
        async with switcher.ause("b"):
            with pytest.raises(OptionError, match="within use"):
                await switcher.aswitch("a")
            # Another asyncio task waits, and may give up.
            waiting = asyncio.ensure_future(switcher.aswitch("added"))
            await asyncio.sleep(0.02)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert (await switcher.aswitch("a")).previous == "b"
        with pytest.raises(UnknownTaskError):
            await switcher.aswitch("z")

    asyncio.run(main())
    assert switcher.switch("b").task == "b"


def test_a_cancelled_switch_ends_its_turn_when_it_is_done(
    switcher: TaskSwitcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go = threading.Event(), threading.Event()
    write = switcher._writer.write

    def slowly(code: object) -> int:
        inside.set()
        assert go.wait(10)
        return write(code)  # type: ignore[arg-type]

    monkeypatch.setattr(switcher._writer, "write", slowly)

    async def main() -> None:
        first = asyncio.ensure_future(switcher.aswitch("a"))
        await asyncio.to_thread(inside.wait, 10)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.ensure_future(switcher.aswitch("b"))
        await asyncio.sleep(0.02)
        assert not second.done()
        go.set()
        assert (await second).previous == "a"

    asyncio.run(main())
