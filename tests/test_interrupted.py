"""Interrupts and failures at the worst moment: after the manifest has flipped, or twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from zoo import fine_tune, make_base

import tallstore
from tallstore.engine import session
from tallstore.engine.chunk import Encoding
from tallstore.engine.environment import Environment, open_environment
from tallstore.engine.manifest import Manifest
from tallstore.engine.session import WriteSession
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError, StoreIOError, TallstoreError

STEPS = ["chunks", "synced", "manifest", "committed", "reclaim"]


def large(seed: int) -> dict[str, torch.Tensor]:
    return {"a": torch.randn(40_000, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError])
def test_interrupted_at_a_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    interrupt: type[BaseException],
) -> None:
    """In place, over a store in use: the old or the new is there, whole, and no chunk is stray."""
    path = tmp_path / "m.tall"
    base = make_base()
    tallstore.save(base, path)
    tallstore.save(fine_tune(base, 1), path, task="t")

    def stop(self: WriteSession, name: str) -> None:
        if name == step:
            raise interrupt("now")

    with tallstore.open(path) as reader:
        monkeypatch.setattr(WriteSession, "step", stop)
        with pytest.raises((interrupt, TallstoreError)) if step != "reclaim" else _may_raise():
            tallstore.save(large(1), path, overwrite=True)
        monkeypatch.undo()
        assert_same(reader.load("t"), fine_tune(base, 1))
    with tallstore.open(path) as store:
        result = store.verify()
        assert result.ok, result.problems
        is_new = step in ("committed", "reclaim")
        assert list(store.tasks) == ([] if is_new else ["t"])
        assert_same(store.load(), large(1) if is_new else base)
    tallstore.save(large(2), path, task="next")
    with tallstore.open(path) as store:
        assert not store.verify().stray
        assert_same(store.load("next"), large(2))
    assert os.listdir(tmp_path) == ["m.tall"]


class _may_raise:
    """All is committed: whether the rest was tidied up is no failure, an interrupt is told."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        return kind is None or issubclass(kind, KeyboardInterrupt)


def test_an_interrupt_while_the_writer_is_at_work_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The lock must not be given back before the thread that writes rests.
    path = tmp_path / "m.tall"
    tallstore.save(make_base(), path)
    sessions: list[WriteSession] = []
    real = WriteSession._finish

    def finish(self: WriteSession) -> None:
        sessions.append(self)
        join = self._thread.join
        interrupts = [KeyboardInterrupt(), KeyboardInterrupt()]

        def interrupted(timeout: float | None = None) -> None:
            if interrupts:
                raise interrupts.pop()
            join(timeout)

        self._thread.join = interrupted  # type: ignore[method-assign]
        real(self)

    monkeypatch.setattr(WriteSession, "_finish", finish)
    with pytest.raises(KeyboardInterrupt):
        tallstore.save(large(1), path, task="t")
    monkeypatch.undo()
    assert not sessions[0]._thread.is_alive()
    with tallstore.open(path) as store:
        assert not store.tasks and store.verify().ok
    assert os.listdir(tmp_path) == ["m.tall"]


def test_a_chunk_is_never_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(make_base(), path)
    environment: Environment = open_environment(path)
    environment.handles += 1
    snapshot = Snapshot(environment)
    before = snapshot.manifest
    number = next(iter(before.streams))
    snapshot.close()
    # A session that thinks a live stream's number is free.
    lying = Manifest(store=before.store, streams=before.streams, next_stream=number)
    data = torch.zeros(10, dtype=torch.uint8).numpy()
    try:
        with (
            pytest.raises(CorruptStoreError, match="is there already, of another write"),
            WriteSession(environment, lying) as writing,
        ):
            writing.stream(1 << 20).put(0, data, encoding=Encoding())
            writing.commit({}, live=frozenset(), written_by="test")
    finally:
        environment.close()
    assert_same(tallstore.load(path), make_base())


def test_a_commit_stands_when_tidying_up_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.tall"
    base = make_base()
    tallstore.save(base, path)
    tallstore.save(fine_tune(base, 1), path, task="t")
    real = session.reclaim

    def reclaim(*arguments: object, **keywords: object) -> int:
        if "step" in keywords:
            raise StoreIOError("the device is gone")
        return real(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "reclaim", reclaim)
    tallstore.save(fine_tune(base, 2), path, task="t", overwrite=True)
    monkeypatch.undo()
    with tallstore.open(path) as store:
        assert store.verify().stray
        assert_same(store.load("t"), fine_tune(base, 2))
    tallstore.save(fine_tune(base, 3), path, task="next")
    with tallstore.open(path) as store:
        assert not store.verify().stray
