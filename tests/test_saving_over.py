"""Saving over a store, and other stores in its place: its readers keep what they see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from test_roundtrip import path
from zoo import child_environment, fine_tune, make_base

import tallstore
from tallstore.errors import (
    StoreExistsError,
    StoreLockedError,
    TaskExistsError,
    UnknownTaskError,
)

__all__ = ["path"]  # a fixture


def test_saving_over_a_store_without_tasks_replaces_it(path: Path) -> None:
    tallstore.save(make_base(0), path)
    tallstore.save(make_base(1), path)
    assert_same(tallstore.load(path), make_base(1))
    assert os.listdir(path.parent) == [path.name]


def test_saving_over_tasks_takes_overwrite(path: Path) -> None:
    tallstore.save(make_base(0), path)
    tallstore.save(fine_tune(make_base(0), 1), path, task="t")
    before = path.read_bytes()
    with pytest.raises(StoreExistsError) as caught:
        tallstore.save(make_base(1), path)
    assert "would lose its 1 tasks ('t')" in str(caught.value)
    assert "overwrite=True" in str(caught.value)
    assert path.read_bytes() == before
    tallstore.save(make_base(1), path, overwrite=True)
    assert_same(tallstore.load(path), make_base(1))
    with tallstore.open(path) as store:
        assert not store.tasks


def test_a_task_saved_over_a_task_takes_overwrite(path: Path) -> None:
    base = make_base()
    first, second = fine_tune(base, 1), fine_tune(base, 2)
    tallstore.save(base, path)
    tallstore.save(first, path, task="t")
    tallstore.save(first, path, task="other")
    with pytest.raises(TaskExistsError, match=r"holds a task 't' already; .*overwrite=True"):
        tallstore.save(second, path, task="t")
    assert_same(tallstore.load(path, task="t"), first)
    tallstore.save(second, path, task="t", overwrite=True)
    assert_same(tallstore.load(path, task="t"), second)
    assert_same(tallstore.load(path, task="other"), first)
    with tallstore.open(path) as store:
        assert list(store.tasks) == ["t", "other"] and store.verify().ok


def test_a_store_in_use_is_saved_over_and_its_reader_keeps_its_snapshot(path: Path) -> None:
    old, new = make_base(0), make_base(1)
    tallstore.save(old, path)
    with tallstore.open(path) as reader:
        inode, generation = path.stat().st_ino, reader.generation
        tallstore.save(new, path)
        assert path.stat().st_ino == inode, "an open store was replaced under its reader"
        assert_same(reader.load(), old)
        assert_same(tallstore.load(path), new)
        assert_same(reader.load(), old)
        assert reader.generation == generation
        reader.refresh()
        assert reader.generation > generation
        assert_same(reader.load(), new)
        assert reader.verify().ok
    tallstore.save(old, path)
    assert path.stat().st_ino != inode


def test_a_reader_keeps_a_task_that_is_removed(path: Path) -> None:
    base, tuned = make_base(), fine_tune(make_base(), 1)
    tallstore.save(base, path)
    tallstore.save(tuned, path, task="t")
    with tallstore.open(path) as reader, tallstore.open(path, "a") as writer:
        writer.remove("t")
        assert list(writer.tasks) == []
        assert_same(reader.load("t"), tuned)
        for seed in range(3):  # what was freed is used again, but not what a reader sees
            tallstore.save(fine_tune(base, seed), path, task=f"n{seed}")
        assert_same(reader.load("t"), tuned)
        with pytest.raises(UnknownTaskError):
            writer.load("t")
        reader.refresh()
        with pytest.raises(UnknownTaskError, match="no task 't'; there are 'n0', 'n1', 'n2'"):
            reader.load("t")


def test_compact_waits_for_readers_and_gives_space_back(path: Path) -> None:
    base = {"w": torch.arange(300_000).float().sin()}
    tallstore.save(base, path)
    for seed in range(3):
        tallstore.save(fine_tune(base, seed), path, task=f"t{seed}")
    with tallstore.open(path, "a") as store:
        store.remove("t0", "t1")
        with pytest.raises(StoreLockedError, match=r"in use by another reader.*timeout="):
            tallstore.compact(path, timeout=0.1)
        assert_same(store.load("t2"), fine_tune(base, 2))
    before, after = tallstore.compact(path)
    assert after == path.stat().st_size < before
    assert_same(tallstore.load(path, task="t2"), fine_tune(base, 2))
    assert_same(tallstore.load(path), base)
    tallstore.save(fine_tune(base, 4), path, task="t4")
    assert_same(tallstore.load(path, task="t4"), fine_tune(base, 4))


def test_packing_over_a_store_in_use_fails_and_works_once_it_is_free(path: Path) -> None:
    base = make_base()
    tallstore.pack(path, base, {"a": fine_tune(base, 1)}, exact=True)
    with tallstore.open(path) as reader:
        with pytest.raises(StoreLockedError, match="in use by another reader"):
            tallstore.pack(path, base, {"b": fine_tune(base, 2)}, overwrite=True, timeout=0.1)
        assert_same(reader.load("a"), fine_tune(base, 1))
    tallstore.pack(path, base, {"b": fine_tune(base, 2)}, exact=True, overwrite=True, timeout=0.5)
    assert_same(tallstore.load(path, task="b"), fine_tune(base, 2))


def test_a_store_made_anew_where_an_open_one_was_deleted(path: Path) -> None:
    tallstore.save(make_base(0), path)
    with tallstore.open(path) as reader:
        path.unlink()
        tallstore.save(make_base(1), path)
        assert_same(tallstore.load(path), make_base(1))
        assert_same(reader.load(), make_base(0))
    assert_same(tallstore.load(path), make_base(1))


def test_another_store_moved_over_an_open_one_by_hand(path: Path) -> None:
    other = path.with_name("other.tall")
    tallstore.save(make_base(0), path)
    tallstore.save(make_base(1), other)
    with tallstore.open(path) as reader:
        os.replace(other, path)
        with pytest.raises(StoreLockedError, match=r"deleted or moved, is still open in this"):
            tallstore.load(path)
        assert_same(reader.load(), make_base(0))
    # whose lock file it was nobody can tell: the next one to close the store removes it
    assert_same(tallstore.load(path), make_base(1))


def test_a_store_made_anew_where_another_process_holds_a_deleted_one(path: Path) -> None:
    # LMDB's lock file goes by name: the one of the deleted store must not serve the new one.
    tallstore.save(make_base(0), path)
    for seed in range(4):
        tallstore.save(fine_tune(make_base(0), seed), path, task=f"t{seed}")
    code = """
import sys, tallstore
from helpers import assert_same
from zoo import fine_tune, make_base
with tallstore.open(sys.argv[1]) as reader:
    print("open", flush=True)
    sys.stdin.readline()
    assert_same(reader.load("t3"), fine_tune(make_base(0), 3))
print("whole", flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "open\n"
        path.unlink()
        tallstore.save(make_base(1), path)
        assert_same(tallstore.load(path), make_base(1))
        tallstore.save(fine_tune(make_base(1), 5), path, task="new")
        with tallstore.open(path) as store:
            assert_same(store.load("new"), fine_tune(make_base(1), 5))
            assert store.verify().ok
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "whole\n"
            assert child.wait() == 0
            tallstore.save(make_base(2), path, task="late")
    assert_same(tallstore.load(path, task="new"), fine_tune(make_base(1), 5))
