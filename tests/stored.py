"""A store to refuse things with, ways to change it behind its back, and a small disk."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest
from helpers import assert_same
from zoo import State, fine_tune, make_base

import tallstore
from tallstore.engine.keys import MANIFEST_KEY
from tallstore.engine.manifest import Manifest
from tallstore.errors import (
    TallstoreError,
)

__all__ = [
    "Stored",
    "damaged",
    "every_use",
    "open_lmdb",
    "refused",
    "remove",
    "rewrite",
    "rewrite_body",
    "small_disk",
    "stored",
    "values",
]


@contextmanager
def refused(kind: type[TallstoreError], *parts: object) -> Iterator[None]:
    """Expect a refusal of exactly this class whose one line holds all `parts`."""
    with pytest.raises(TallstoreError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {message}"
    assert message and "\n" not in message
    for part in parts:
        assert str(part) in message, f"{part!r} is not in: {message}"


@dataclasses.dataclass
class Stored:
    """A store of a base and two exact tasks over masks."""

    path: Path
    base: State
    tasks: dict[str, State]

    def check(self) -> None:
        """Everything is there, bit for bit, and nothing beside it."""
        with tallstore.open(self.path) as store:
            assert list(store.tasks) == list(self.tasks)
            assert_same(store.load(), self.base)
            for name, state in self.tasks.items():
                assert_same(store.load(name), state)
            assert store.verify().ok
        beside = {p.name for p in self.path.parent.iterdir() if p.name.startswith(".")}
        assert not beside, "temporary files are left"
        assert not list(self.path.parent.glob(f"{self.path.name}-*")), "lock files are left"


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    base = make_base()
    tasks = {"one": fine_tune(base, 1), "two": fine_tune(base, 2)}
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, exact=True)
    return Stored(path, base, tasks)


def open_lmdb(path: Path) -> lmdb.Environment:
    return lmdb.Environment(str(path), subdir=False, lock=False, map_size=1 << 26, lib_version=0)


def values(path: Path) -> dict[bytes, bytes]:
    with open_lmdb(path) as env, env.begin() as txn:
        return {bytes(key): bytes(value) for key, value in txn.cursor()}


def rewrite(path: Path, change: Callable[[dict[bytes, bytes]], None]) -> None:
    """Change keys and values behind the store's back."""
    before = values(path)
    after = dict(before)
    change(after)
    with open_lmdb(path) as env, env.begin(write=True) as txn:
        for key in before.keys() - after.keys():
            txn.delete(key)
        for key, value in after.items():
            txn.put(key, value)


def rewrite_body(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's body, with a checksum that fits."""

    def apply(items: dict[bytes, bytes]) -> None:
        manifest = Manifest.from_bytes(memoryview(items[MANIFEST_KEY]), what="test")
        body = dict(manifest.body)
        change(body)
        items[MANIFEST_KEY] = dataclasses.replace(manifest, body=body).to_bytes()

    rewrite(path, apply)


def remove(path: str | Path, task: str, **options: Any) -> None:
    with tallstore.open(path, "a", **options) as store:
        store.remove(task)


def every_use(path: Path) -> list[Callable[[], object]]:
    state = make_base()
    return [
        lambda: tallstore.load(path),
        lambda: tallstore.load(path, task="one"),
        lambda: tallstore.open(path),
        lambda: tallstore.open(path, "a"),
        lambda: tallstore.save(state, path, task="new"),
        lambda: tallstore.add(path, {"new": state}),
        lambda: tallstore.compact(path),
    ]


def damaged(whole: bytes, value: bytes, at: int, bit: int) -> bytes:
    """A file with one bit of a value flipped, in the stale copies on free pages too."""
    assert value in whole
    changed = bytearray(value)
    changed[at] ^= 1 << bit
    return whole.replace(value, changed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=6m", "tallstore-test", place],
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip() if done else ''}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
