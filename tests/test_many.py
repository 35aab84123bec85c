"""Many at once: a short run of bench.many, data loaders, pools, and a second writer's wait."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from torch.utils.data import DataLoader, Dataset
from zoo import State, child_environment, fine_tune, make_base

import tallstore
from bench import many
from tallstore.engine.writerlock import WriterLock
from tallstore.errors import StoreLockedError


def test_readers_wait_for_nobody(tmp_path: Path) -> None:
    path = many.synthetic(tmp_path, weights=20_000)
    row = many.measure(path, seconds=4, threads=(1, 3))
    assert row["loads"] > 20 and row["commits"] >= 2 and row["wrong"] == 0
    # A reader that waited for the writer that stands still would not have loaded at all.
    still = row["beside a writer that stands still"]
    assert still["loads"] > 4 and still["longest_s"] < 1.3
    assert os.listdir(tmp_path) == ["many.tall"]


class Tasks(Dataset[State]):
    """Loads a task in each worker, by a handle that the worker opens when it first needs one."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path, self.names = path, names
        self.store: tallstore.TallStore | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> State:
        if self.store is None:
            self.store = tallstore.open(self.path)
        loaded: State = self.store.load(self.names[index])
        return loaded


def first(batch: list[State]) -> State:
    return batch[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads, from 3.12 on
def test_data_loader_workers(tmp_path: Path, method: str) -> None:
    path = tmp_path / "zoo.tall"
    base = make_base()
    tasks = {f"t{n}": fine_tune(base, n) for n in range(6)}
    tallstore.pack(path, base, tasks, exact=True)
    with tallstore.open(path) as store:  # this process's own handle stays its own
        loader = DataLoader(
            Tasks(path, list(tasks)),
            batch_size=1,
            num_workers=min(2, len(os.sched_getaffinity(0))),
            collate_fn=first,
            multiprocessing_context=method,
        )
        for name, loaded in zip(tasks, loader, strict=True):
            for key, tensor in tasks[name].items():
                assert torch.equal(loaded[key], tensor), (name, key)
        assert_same(store.load("t3"), tasks["t3"])
        del loader
    tallstore.save(base, path, task="next", timeout=10)
    tallstore.compact(path, timeout=10)
    assert os.listdir(tmp_path) == ["zoo.tall"]


def load_sum(path: str, name: str) -> float:
    return float(tallstore.load(path, task=name)["embed.weight"].double().sum())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_pool_of_processes(tmp_path: Path, method: str) -> None:
    path = tmp_path / "zoo.tall"
    base = make_base()
    tasks = {f"t{n}": fine_tune(base, n) for n in range(4)}
    tallstore.pack(path, base, tasks, exact=True)
    with tallstore.open(path) as store, multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.starmap(load_sum, [(str(path), name) for name in tasks])
        wanted = [float(t["embed.weight"].double().sum()) for t in tasks.values()]
        assert found == wanted
        assert store.verify().ok


def test_of_two_handles_one_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    base = make_base()
    tallstore.pack(path, base, {f"t{n}": fine_tune(base, n) for n in range(3)}, exact=True)
    failures: list[BaseException] = []
    with tallstore.open(path) as kept:

        def open_and_close() -> None:
            try:
                for _ in range(20):
                    with tallstore.open(path) as passing:
                        assert_same(passing.load("t1"), fine_tune(base, 1))
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=open_and_close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert_same(kept.load("t2"), fine_tune(base, 2))
        for thread in threads:
            thread.join(60)
        assert not failures, failures
        assert kept.verify().ok


# -- the second writer --------------------------------------------------------------------


def test_a_wait_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "zoo.tall"
    tallstore.save(make_base(), path)
    with (
        caplog.at_level(logging.WARNING, logger="tallstore"),
        WriterLock(path, timeout=0),
        pytest.raises(StoreLockedError, match=r"waited 2\.5 s"),
    ):
        tallstore.save(make_base(), path, task="t", timeout=2.5)
    said = [record.getMessage() for record in caplog.records if record.name == "tallstore"]
    assert len(said) == 1
    assert f"{path}: another process (pid {os.getpid()}) is writing to it" in said[0]
    assert "waiting up to 2.5 s" in said[0]


def test_the_command_waits_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    tallstore.save(make_base(), path)
    tallstore.save(fine_tune(make_base(), 1), path, task="t")
    command = [sys.executable, "-m", "tallstore", "rm", str(path), "t", "--yes", "--timeout"]
    with WriterLock(path, timeout=0):
        done = subprocess.run(
            [*command, "1.5"],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "is writing to it; waiting up to 1.5 s" in done.stderr
        assert "Error:" in done.stderr and "waited 1.5 s" in done.stderr
        waiting = subprocess.Popen(
            [*command, "60"], env=child_environment(), stderr=subprocess.PIPE, text=True
        )
        assert waiting.stderr is not None
        assert "waiting up to 60 s" in waiting.stderr.readline()
    with waiting:
        assert waiting.wait(60) == 0
    with tallstore.open(path) as store:
        assert not store.tasks
