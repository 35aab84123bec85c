"""Where codes are: all on the device, on the host, in the store; never more than the budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_helpers import DEVICE
from serving_helpers import Net, assert_is
from zoo import fine_tune, make_base

import tallstore
from tallstore.errors import DeviceError, OptionError, UnknownTaskError
from tallstore.serving import TaskSwitcher

TASKS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "zoo.tall"
    base = make_base()
    tallstore.pack(path, base, {name: fine_tune(base, n) for n, name in enumerate(TASKS)})
    tallstore.add(path, {"exact": fine_tune(base, 9)})
    return path


def make(store: Path, **options: Any) -> tuple[TaskSwitcher, Net]:
    with tallstore.open(store) as opened:
        model = Net(opened.load()).to(DEVICE)
    return TaskSwitcher(model, store, **options), model


def sources(switcher: TaskSwitcher, tasks: str) -> str:
    """Where each switch found its code, by first letters."""
    return "".join(switcher.switch(task).source[0] for task in tasks)


def test_all_are_there_from_the_beginning(store: Path) -> None:
    switcher, _ = make(store)
    assert set(switcher.on_device) == {*TASKS, "exact"}
    assert sources(switcher, "abcdabcd") == "dddddddd"


def test_what_was_used_last_is_kept(store: Path) -> None:
    for resident in ("stream", "masks-on-host"):
        one = make(store, tasks=["a"])[0].need().codes
        switcher, model = make(store, tasks=TASKS, resident=resident, budget=2 * one)
        far = resident[0].replace("m", "h")
        assert sources(switcher, "aba") == f"{far}{far}d"
        assert switcher.on_device == ("b", "a")
        done = switcher.switch("c")  # b was not used for longest
        assert done.loaded == one and not done.hit and switcher.on_device == ("a", "c")
        assert sources(switcher, "acb") == f"dd{far}"
        assert switcher.on_device == ("c", "b")
        assert_is(model, store, "b")


def test_room_for_one(store: Path) -> None:
    one = make(store, tasks=["a"])[0].need().codes
    switcher, model = make(store, tasks=TASKS, resident="masks-on-host", budget=one)
    assert sources(switcher, "abab") == "hhhh"
    assert_is(model, store, "b")
    with pytest.raises(OptionError, match=r"budget=.* are in use, and task 'c' takes"):
        switcher.prefetch("c").result()
    assert switcher.switch("b").source == "live"


def test_prefetch(store: Path) -> None:
    switcher, model = make(store, tasks=TASKS, resident="stream")
    switcher.switch("a")
    assert switcher.prefetch("b").result() is None
    assert switcher.switch("b").source == "device"
    assert_is(model, store, "b")
    with pytest.raises(UnknownTaskError):
        switcher.prefetch("z")
    switcher.close()


@contextmanager
def slow_prefetch(
    switcher: TaskSwitcher, task: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Within it a task is being prefetched, and comes a moment later; gives what was read."""
    reads: list[str] = []
    begun, go = threading.Event(), threading.Event()
    read = switcher._stock._read

    def slowly(task: str) -> object:
        reads.append(task)
        begun.set()
        assert go.wait(10)
        return read(task)

    monkeypatch.setattr(switcher._stock, "_read", slowly)
    ahead = switcher.prefetch(task)
    assert begun.wait(10)
    timer = threading.Timer(0.05, go.set)
    timer.start()
    yield reads
    ahead.result()


def test_a_switch_waits_for_the_prefetch(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switcher, _ = make(store, tasks=TASKS, resident="stream")
    with slow_prefetch(switcher, "a", monkeypatch) as reads:
        assert switcher.switch("a").source == "device"
    assert reads == ["a"]


def test_a_switch_waits_for_room_that_a_prefetch_takes(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(store, tasks=["a"])[0].need().codes
    switcher, model = make(store, tasks=TASKS, resident="stream", budget=one)
    with slow_prefetch(switcher, "a", monkeypatch):
        assert switcher.switch("b").source == "store"
    assert switcher.on_device == ("b",)
    assert_is(model, store, "b")


def test_what_is_too_large_goes_straight_into_the_model(store: Path) -> None:
    switcher, model = make(store, resident="stream", budget=0)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for task in ("a", "exact", "b", "b", "exact"):
        done = switcher.switch(task)
        assert done.source in ("store", "live") and switcher.on_device == ()
        assert_is(model, store, task)
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert switcher.prefetch("a").result() is None
    # By itself, "stream" keeps codes, but no weights as large as the model.
    switcher, model = make(store, resident="stream")
    switcher.switch("exact")
    assert switcher.on_device == ()
    switcher.switch("a")
    assert switcher.on_device == ("a",)


def test_what_is_needed(store: Path) -> None:
    need = make(store)[0].need()
    weights = sum(t.nbytes for t in tallstore.load(store).values())
    assert weights < need.base == need.vector * 2 + 1024 * 8  # bfloat16; a block of integers
    assert need.largest == weights - 11 * 8 and need.staged < need.largest / 10
    assert need.on_device("stream") < need.on_device("masks-on-host") < need.on_device("all") + 1
    assert need.on_host("masks-on-host") == need.codes and need.on_host("all") == 0
    assert make(store, tasks=["exact"])[0].need().vector == 0


def test_too_small(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"budget=100: .*'masks-on-host' .* of the host's"):
        make(store, budget=100)
    with pytest.raises(OptionError, match=r"budget=100: resident='masks-on-host' takes"):
        make(store, resident="masks-on-host", budget=100)
    monkeypatch.setattr("tallstore.serving.stock.free_bytes", lambda device: 1000)
    with pytest.raises(
        DeviceError,
        match=r"too small for resident='all': .* are needed beside the model, 1\.00 kB are free\. "
        r"For these 5 tasks, resident='all' takes .*, 'masks-on-host' .*, 'stream' .*; tasks= ",
    ):
        make(store)
    monkeypatch.setattr("tallstore.serving.stock.free_bytes", lambda device: None)
    make(store)


def test_options(store: Path) -> None:
    for options in (
        {"resident": "some"},
        {"budget": -1},
        {"budget": "1"},
        {"fidelity": "exact"},
        {"private": "keep"},
        {"tasks": [1]},
        {"tasks": []},
    ):
        with pytest.raises(OptionError):
            make(store, **options)
    with pytest.raises(UnknownTaskError, match="no task 'z'"):
        make(store, tasks=["z"])
    with pytest.raises(OptionError, match=r"model=int: a torch\.nn\.Module"):
        TaskSwitcher(3, store)
    with pytest.raises(OptionError, match="it has no tensors"):
        TaskSwitcher(torch.nn.Module(), store)
