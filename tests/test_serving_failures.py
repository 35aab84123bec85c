"""What goes wrong names itself, and leaves the task before live, or says that none is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_helpers import DEVICE
from serving_helpers import Net, assert_is, tensors
from zoo import State, bits, fine_tune, make_base

import tallstore
from tallstore.errors import (
    ChecksumError,
    CorruptStoreError,
    DeviceError,
    MismatchError,
    OptionError,
    StoreClosedError,
    StoreNotFoundError,
    UnknownTaskError,
)
from tallstore.serving import TaskSwitcher
from tallstore.serving.forms import Live
from tallstore.store import TallStore


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "zoo.tall"
    base = make_base()
    tallstore.pack(path, base, {"a": fine_tune(base, 1), "b": fine_tune(base, 2)})
    tallstore.add(path, {"exact": fine_tune(base, 3)})
    return path


def make(store: Path, **options: Any) -> tuple[TaskSwitcher, Net]:
    model = Net(make_base()).to(DEVICE)
    return TaskSwitcher(model, store, **options), model


def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once what it gives is called, the next chunk is damaged."""
    from tallstore.engine.snapshot import Snapshot

    left = [0]
    read = Snapshot.read_chunk

    def read_chunk(self: Snapshot, stream: Any, chunk: int, out: Any, **more: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise ChecksumError(f"{self.path}: stream {stream.number}: checksum mismatch")
        read(self, stream, chunk, out, **more)

    monkeypatch.setattr(Snapshot, "read_chunk", read_chunk)

    def start() -> None:
        left[0] = 1

    return start


def flip(path: Path, stream: int) -> None:
    """Damage a stream's first chunk."""
    import lmdb

    from tallstore.engine.keys import chunk_key

    environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False)
    with environment, environment.begin() as transaction:
        value = bytes(transaction.get(chunk_key(stream, 0)) or b"")
    whole = path.read_bytes()
    assert value and value in whole
    changed = value[:-1] + bytes([value[-1] ^ 4])
    path.write_bytes(whole.replace(value, changed))


def stream_of(store: Path, task: str) -> int:
    with TallStore(store) as opened:
        document = opened.describe(task).task
        assert document is not None
        return next(n for code in document.codes for n in (code.planes, code.exact) if n)


@pytest.mark.parametrize("task", ["b", "exact"])
@pytest.mark.parametrize("budget", [None, 0])
def test_a_damaged_chunk_leaves_the_task_before(store: Path, task: str, budget: int | None) -> None:
    """Found while it is read, which is before anything is written, however large the code is."""
    number = stream_of(store, task)
    flip(store, number)
    switcher, model = make(store, resident="stream", budget=budget)
    switcher.switch("a")
    wanted = {name: bits(t.cpu()) for name, t in tensors(model).items()}
    for _ in range(2):
        with pytest.raises(ChecksumError, match=rf"stream {number}, chunk 0: [^;]*; [^;]*$"):
            switcher.switch(task)
        assert switcher.live == "a" and switcher.switch("a").source == "live"
        assert {name: bits(t.cpu()) for name, t in tensors(model).items()} == wanted
    with pytest.raises(ChecksumError):
        TaskSwitcher(Net(make_base()).to(DEVICE), store)


def test_a_failure_in_mid_switch_is_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task too large to be kept, damaged between the check and the decoding."""
    switcher, model = make(store, resident="stream", budget=0)
    switcher.switch("a")
    start = failing(monkeypatch)
    check = switcher._stock.offer.reader.check

    def checked(plan: Any) -> None:
        check(plan)
        start()

    monkeypatch.setattr(switcher._stock.offer.reader, "check", checked)
    with pytest.raises(ChecksumError, match="partly overwritten: no task is live until the next"):
        switcher.switch("exact")
    assert switcher.live is None
    monkeypatch.setattr(switcher._stock.offer.reader, "check", check)
    done = switcher.switch("a")
    assert done.previous is None
    assert_is(model, store, "a")


def test_a_device_that_fails_in_mid_switch(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switcher, model = make(store)
    switcher.switch("a")

    def broken(self: Any, live: Live) -> Any:
        def job() -> int:
            raise DeviceError("the device is gone")

        yield job

    with monkeypatch.context() as patch:
        patch.setattr("tallstore.serving.forms.PlanesForm.jobs", broken)
        with pytest.raises(DeviceError, match="the device is gone; the model is partly overwri"):
            switcher.switch("b")
        assert switcher.live is None
        with pytest.raises(DeviceError):
            switcher.switch("b")
    assert switcher.switch("b").previous is None
    assert_is(model, store, "b")


def test_an_interrupt_in_mid_switch(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switcher, model = make(store)
    switcher.switch("a")
    with monkeypatch.context() as patch:

        def interrupted(self: Any, live: Live) -> Any:
            raise KeyboardInterrupt

        patch.setattr("tallstore.serving.forms.PlanesForm.jobs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            switcher.switch("b")
    assert switcher.live is None
    switcher.switch("b")
    assert_is(model, store, "b")


# -- a model that does not fit ------------------------------------------------------------


def test_the_model_does_not_fit(store: Path) -> None:
    def refused(change: Callable[[State], Any], *parts: str) -> None:
        state = make_base()
        change(state)
        model = Net(state).to(DEVICE)
        before = {name: bits(t.cpu()) for name, t in tensors(model).items()}
        with pytest.raises(MismatchError) as caught:
            TaskSwitcher(model, store)
        for part in (str(store), "task 'a'", "the model does not fit", *parts):
            assert part in str(caught.value), caught.value
        assert {name: bits(t.cpu()) for name, t in tensors(model).items()} == before

    refused(
        lambda s: s.update({"norm.weight": torch.ones(9)}),
        "'norm.weight' has shape [9] in the model, [7] in the store",
    )
    refused(
        lambda s: s.update({"norm.weight": torch.ones(7).half()}),
        "'norm.weight' is torch.float16 in the model, torch.float32 in the store",
    )
    refused(lambda s: s.pop("norm.weight"), "'norm.weight' [7] is not in the model")
    refused(lambda s: s.update(more=torch.ones(2)), "the task has no 'more' [2]")
    refused(lambda s: s.update({n: torch.ones(1) for n in list(s)[:6]}), " and 7 more")


def test_a_model_elsewhere(store: Path) -> None:
    model = torch.nn.Linear(3, 2, device="meta")
    with pytest.raises(MismatchError, match=r"not all on cpu: 'weight' on meta; move it first"):
        TaskSwitcher(model, store, device="cpu")
    model.bias = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(MismatchError, match="not all on meta: 'weight' on meta, 'bias' on cpu"):
        TaskSwitcher(model, store)
    if DEVICE == "cpu":
        with pytest.raises(DeviceError, match="no CUDA device can be used here"):
            TaskSwitcher(Net(make_base()), store, device="cuda")


def test_an_expanded_tensor(store: Path) -> None:
    state = {name: t.to(DEVICE) for name, t in make_base().items()}
    state["norm.weight"] = torch.ones(1, device=DEVICE).expand(7)
    with pytest.raises(MismatchError, match=r"'norm\.weight' is expanded in the model"):
        TaskSwitcher(state, store)


def test_names_with_a_prefix(store: Path) -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Net(make_base())

    model = Outer().to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        switcher.switch("a")
    assert_is(model.encoder, store, "a")


# -- a store that changes -----------------------------------------------------------------


def test_a_store_that_grows(store: Path) -> None:
    switcher, model = make(store)
    switcher.switch("a")
    tallstore.add(store, {"late": fine_tune(make_base(), 8)})
    tallstore.open(store, "a").remove("b")
    assert switcher.tasks == ("a", "b", "exact")
    switcher.switch("b")  # the snapshot has it still
    with pytest.raises(UnknownTaskError, match=r"no task 'late' is served.*after refresh\(\)"):
        switcher.switch("late")
    switcher.switch("a")
    base = switcher._stock.offer.resident.base(0)
    switcher.refresh()
    assert switcher._stock.offer.resident.base(0) is base  # not read again
    assert switcher.tasks == ("a", "exact", "late") and switcher.live == "a"
    assert switcher.switch("a").source == "live"
    switcher.switch("late")
    assert_is(model, store, "late")
    with pytest.raises(UnknownTaskError):
        switcher.switch("b")
    switcher.close()
    for use in (lambda: switcher.switch("a"), switcher.refresh, lambda: switcher.prefetch("a")):
        with pytest.raises(StoreClosedError):
            use()


def test_a_task_that_was_replaced(store: Path) -> None:
    switcher, model = make(store, resident="stream")
    switcher.switch("exact")
    tallstore.add(store, {"exact": fine_tune(make_base(), 77)}, overwrite=True)
    switcher.refresh()
    assert switcher.live is None
    switcher.switch("exact")
    assert_is(model, store, "exact")


def test_a_store_that_is_replaced(store: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.tall"
    shutil.copyfile(store, old)
    switcher, model = make(store)
    switcher.switch("b")
    other = make_base(7)
    fresh = tmp_path / "fresh.tall"
    tallstore.pack(fresh, other, {"a": fine_tune(other, 1), "c": fine_tune(other, 2)})
    os.replace(fresh, store)
    switcher.switch("a")
    assert_is(model, old, "a")
    switcher.refresh()
    assert switcher.tasks == ("a", "c") and switcher.live is None
    for task in ("a", "c"):
        switcher.switch(task)
        assert_is(model, store, task)


def test_a_refresh_that_fails_changes_nothing(store: Path, tmp_path: Path) -> None:
    switcher, model = make(store)
    switcher.switch("b")
    old, fresh = tmp_path / "old.tall", tmp_path / "fresh.tall"
    shutil.copyfile(store, old)
    other = {"w": torch.ones(5)}
    tallstore.pack(fresh, other, {"a": {"w": torch.zeros(5)}})
    os.replace(fresh, store)
    with pytest.raises(MismatchError, match="the model does not fit"):
        switcher.refresh()
    assert switcher.live == "b" and switcher.tasks == ("a", "b", "exact")
    switcher.switch("a")
    assert_is(model, old, "a")
    store.unlink()
    with pytest.raises(StoreNotFoundError):
        switcher.refresh()
    switcher.switch("exact")
    assert_is(model, old, "exact")


def test_a_store_that_outgrows_the_budget(store: Path) -> None:
    switcher, _ = make(store)
    budget = switcher.need().codes
    switcher.close()
    switcher, model = make(store, budget=budget)
    switcher.switch("b")
    tallstore.add(store, {"late": fine_tune(make_base(), 8)})
    with pytest.raises(
        OptionError, match=rf"budget={budget}: .*; give budget=\d+ or more, serve f"
    ):
        switcher.refresh()
    assert switcher.live == "b" and switcher.tasks == ("a", "b", "exact")
    assert switcher.switch("b").source == "live"
    for task in ("a", "exact", "b"):
        assert switcher.switch(task).source == "device"
        assert_is(model, store, task)
    tallstore.open(store, "a").remove("late")
    switcher.refresh()
    assert switcher.live == "b"
    assert "OptionError" in (TaskSwitcher.refresh.__doc__ or "")


def test_no_tasks_and_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        TaskSwitcher(Net(make_base()), tmp_path / "none.tall")
    empty = tmp_path / "empty.tall"
    tallstore.save(make_base(), empty)
    with pytest.raises(Exception, match="there are no tasks to serve"):
        TaskSwitcher(Net(make_base()), empty)
    assert issubclass(ChecksumError, CorruptStoreError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tensor_at_an_odd_address(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {"w": torch.randn(40, 30).to(dtype)}
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"a": {"w": base["w"] + 1}}, code="signs")
    memory = bytearray(base["w"].nbytes + 1)
    odd = torch.frombuffer(memory, dtype=dtype, offset=1).view(40, 30)
    with pytest.raises(MismatchError, match="'w' lies at no multiple of its"):
        TaskSwitcher({"w": odd}, path)
