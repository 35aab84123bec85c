"""Every refusal: its class, its message, and that nothing stored is lost by it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from helpers import assert_same
from safetensors.torch import save_file
from zoo import State, child_environment, fine_tune, make_base, run_child

import tallstore
from tallstore.engine.keys import MANIFEST_KEY, chunk_key, split_key
from tallstore.engine.manifest import Manifest
from tallstore.engine.newfile import NewFile
from tallstore.engine.session import WriteSession
from tallstore.errors import (
    CheckpointError,
    ChecksumError,
    CorruptStoreError,
    DeviceError,
    EmptyZooError,
    MismatchError,
    NewerFormatError,
    NotAStoreError,
    OptionError,
    StoreExistsError,
    StoreFullError,
    StoreIOError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
    TallstoreError,
    TaskExistsError,
    TaskNameError,
    TruncatedStoreError,
    UnknownTaskError,
    UnsafePickleError,
    UnsupportedObjectError,
    WrongBaseError,
)


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


# -- what is not a store ------------------------------------------------------------------


def test_no_such_store(tmp_path: Path) -> None:
    path = tmp_path / "absent.tall"
    for use in every_use(path):
        with refused(StoreNotFoundError, f"{path}: no such store"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_no_such_directory(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "zoo.tall"
    base = make_base()
    for use in (
        lambda: tallstore.save(base, path),
        lambda: tallstore.save(base, path, task="t"),
        lambda: tallstore.pack(path, base, {"t": base}),
    ):
        with refused(StoreNotFoundError, tmp_path / "absent", "no such"):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", 3, None, b"zoo.tall"])
def test_no_path(path: Any) -> None:
    with refused(OptionError, f"path={path!r}", "the path of a store is needed"):
        tallstore.load(path)
    with refused(OptionError, f"path={path!r}"):
        tallstore.save({}, path)


def test_a_directory(tmp_path: Path) -> None:
    base = make_base()
    for use in [
        *every_use(tmp_path),
        lambda: tallstore.save(base, tmp_path, overwrite=True),
        lambda: tallstore.pack(tmp_path, base, {"t": base}, overwrite=True),
    ]:
        with refused(NotAStoreError, tmp_path, "a directory"):
            use()


FOREIGN: dict[str, bytes] = {
    "empty": b"",
    "a byte": b"x",
    "text": b"# A read-me of a few lines\n" * 20,
    "zeros": bytes(9000),
    "zip": b"PK\x03\x04" + bytes(500),
    "json": b'{"tensors": []}',
    "sqlite": b"SQLite format 3\0" + bytes(4096),
    "noise": random.Random(0).randbytes(20_000),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "f.tall"
    path.write_bytes(FOREIGN[name])
    base = make_base()
    for use in [
        *every_use(path),
        lambda: tallstore.save(base, path),
        lambda: tallstore.save(base, path, overwrite=True),
        lambda: tallstore.pack(path, base, {"t": base}, overwrite=True),
    ]:
        with refused(NotAStoreError, f"{path}: not a tallstore file"):
            use()
    assert path.read_bytes() == FOREIGN[name], "a foreign file was touched"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_of_another_kind(tmp_path: Path) -> None:
    base = make_base()
    torch.save(base, tmp_path / "m.pt")
    save_file(base, tmp_path / "m.safetensors")
    for name in ("m.pt", "m.safetensors"):
        with refused(NotAStoreError, f"{tmp_path / name}: not a tallstore file"):
            tallstore.load(tmp_path / name)


def test_a_foreign_lmdb_file(tmp_path: Path) -> None:
    path = tmp_path / "f.tall"
    for items in ({}, {b"a": b"b"}, {b"manifest": b"m" * 200}):
        path.unlink(missing_ok=True)
        with open_lmdb(path) as env, env.begin(write=True) as txn:
            for key, value in items.items():
                txn.put(key, value)
        before = path.read_bytes()
        for use in every_use(path):
            with refused(NotAStoreError, f"{path}: an LMDB file, but not a tallstore"):
                use()
        assert path.read_bytes() == before


def test_a_file_from_the_middle_of_a_crash(tmp_path: Path) -> None:
    # What a killed first save leaves under its temporary name: chunks, but no manifest.
    new = NewFile(tmp_path / "zoo.tall")
    session = WriteSession(new.environment, Manifest(store=bytes(16)))
    stream = session.stream(1 << 20)
    from tallstore.packing.encodings import AS_IS

    stream.put(0, np.zeros(100_000, np.uint8), encoding=AS_IS)
    session._finish()
    (half,) = tmp_path.glob(".zoo.tall.*.tmp")
    path = tmp_path / "half.tall"
    shutil.copyfile(half, path)
    session.abort()
    new.discard()
    assert len(path.read_bytes()) > 100_000
    for use in every_use(path):
        with refused(NotAStoreError, f"{path}: an LMDB file, but not a tallstore"):
            use()


def test_a_crashed_store_with_stray_chunks_is_whole(stored: Stored) -> None:
    def leave(items: dict[bytes, bytes]) -> None:
        items[chunk_key(1 << 40, 0)] = b"half a chunk"

    rewrite(stored.path, leave)
    with tallstore.open(stored.path) as store:
        assert store.verify().stray == 1 and store.verify().ok
    stored.check()
    tallstore.save(stored.base, stored.path, task="next")
    with tallstore.open(stored.path) as store:
        assert store.verify().stray == 0
    assert chunk_key(1 << 40, 0) not in values(stored.path)


# -- other versions -----------------------------------------------------------------------


def test_a_newer_format_version(stored: Stored) -> None:
    def patch(items: dict[bytes, bytes]) -> None:
        value = bytearray(items[MANIFEST_KEY])
        assert value[8:12] == (1).to_bytes(4, "little")
        value[8:12] = (3).to_bytes(4, "little")
        value[32:] = reversed(value[32:])  # nobody knows what will stand there
        items[MANIFEST_KEY] = bytes(value)

    rewrite(stored.path, patch)
    before = stored.path.read_bytes()
    for use in every_use(stored.path):
        with refused(
            NewerFormatError,
            f"{stored.path}: written in format version 3, tallstore {tallstore.__version__} reads "
            "versions 1 and 2; update tallstore",
        ):
            use()
    assert stored.path.read_bytes() == before


def _patch_metas(path: Path, offset: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    for page in (0, 4096):
        whole[page + 16 + offset : page + 16 + offset + len(data)] = data
    path.write_bytes(whole)


def test_another_version_of_lmdb(stored: Stored) -> None:
    _patch_metas(stored.path, 4, (2).to_bytes(4, "little"))
    with refused(NewerFormatError, stored.path, "LMDB data version 2, tallstore keeps version 1"):
        tallstore.load(stored.path)


def test_a_store_of_a_host_of_another_kind(stored: Stored) -> None:
    _patch_metas(stored.path, 24, bytes(4))  # where a 64-bit host has its page size
    with refused(NotAStoreError, stored.path, "32-bit host", "64-bit hosts"):
        tallstore.load(stored.path)
    _patch_metas(stored.path, 0, bytes.fromhex("beefc0de"))
    with refused(NotAStoreError, stored.path, "other byte order"):
        tallstore.load(stored.path)


# -- damage -------------------------------------------------------------------------------


def test_truncated_at_any_length_never_kills_the_process(stored: Stored, tmp_path: Path) -> None:
    code = """
import os, shutil, sys
import tallstore
from tallstore.errors import NotAStoreError, TruncatedStoreError
whole, path = sys.argv[1:]
size = os.path.getsize(whole)
lengths = {*range(0, 260, 13), *range(size - 40, size, 7)}
for page in range(0, size + 1, 4096):
    lengths |= {page - 1, page, page + 1, page + 2048}
lengths = sorted(n for n in lengths if 0 <= n < size)
kinds = set()
for length in lengths:
    shutil.copyfile(whole, path)
    os.truncate(path, length)
    for use in (lambda: tallstore.load(path), lambda: tallstore.open(path, "a"),
                lambda: tallstore.save({}, path, task="t")):
        try:
            use()
        except (NotAStoreError, TruncatedStoreError) as exc:
            message = str(exc)
            assert message.startswith(path), message
            if isinstance(exc, TruncatedStoreError):
                assert str(length) in message and "restore it from a copy" in message, message
            else:
                assert "not a tallstore file" in message, message
            kinds.add(type(exc).__name__)
        else:
            raise SystemExit(f"{length} of {size} bytes were taken for a store")
    assert os.path.getsize(path) == length, "a truncated file was written to"
print(len(lengths), sorted(kinds))
"""
    done = run_child(code, stored.path, tmp_path / "cut.tall")
    count, _, kinds = done.stdout.partition(" ")
    assert int(count) > 50 and kinds.strip() == "['NotAStoreError', 'TruncatedStoreError']"


def damaged(whole: bytes, value: bytes, at: int, bit: int) -> bytes:
    """A file with one bit of a value flipped, in the stale copies on free pages too."""
    assert value in whole
    changed = bytearray(value)
    changed[at] ^= 1 << bit
    return whole.replace(value, changed)


def _who(store: Any, stream: int) -> set[str]:
    """The parts of a store that loading cannot do without a stream."""
    owners = {
        f"task {name!r}"
        for name, task in store.tasks.items()
        if stream in (task.document, *task.streams)
    }
    if stream in (store.base.document, *store.base.streams):
        owners.add("base")
    if store.vector is not None and stream in store.vector.streams:
        owners.add("shared vector")
    return owners


def test_a_flipped_bit_in_any_chunk_is_found(stored: Stored) -> None:
    whole = stored.path.read_bytes()
    chunks = {k: v for k, v in values(stored.path).items() if split_key(k) is not None}
    assert len(chunks) >= 8
    draw = random.Random(0)
    found: set[str] = set()
    for key, value in chunks.items():
        size = len(value)
        stream, chunk = split_key(key) or (0, 0)
        for at in {0, 5, 9, 17, 40, 48, size - 1, *(draw.randrange(size) for _ in range(3))}:
            stored.path.write_bytes(damaged(whole, value, at, draw.randrange(8)))
            with tallstore.open(stored.path) as store:
                result = store.verify()
                owners = _who(store, stream)
                assert owners and not result.ok
                assert [set(p.owners) for p in result.problems] == [owners]
                (problem,) = result.problems
                assert f"{stored.path}: stream {stream}, chunk {chunk}: " in problem.message
                found |= owners
                for task in (None, *stored.tasks):
                    state = stored.base if task is None else stored.tasks[task]
                    mine = "base" if task is None else f"task {task!r}"
                    touched = mine in owners or "base" in owners
                    touched |= task is not None and "shared vector" in owners
                    if not touched:
                        assert_same(store.load(task), state)
                        continue
                    with pytest.raises(CorruptStoreError) as caught:
                        store.load(task)
                    assert f"stream {stream}, chunk {chunk}" in str(caught.value)
                    if at >= 48:
                        assert type(caught.value) is ChecksumError
                        assert "Restore the store from a copy" in str(caught.value)
    assert found == {"base", "shared vector", "task 'one'", "task 'two'"}
    stored.path.write_bytes(whole)
    stored.check()


def test_out_says_that_it_was_partly_written_before_damage_was_found(stored: Stored) -> None:
    with tallstore.open(stored.path) as store:
        stream = store.base.streams[0]
    value = values(stored.path)[chunk_key(stream, 0)]
    stored.path.write_bytes(damaged(stored.path.read_bytes(), value, 60, 0))
    out = {name: torch.zeros_like(tensor) for name, tensor in stored.base.items()}
    with refused(ChecksumError, "checksum mismatch", "out= are partly overwritten"):
        tallstore.load(stored.path, out=out)


def test_a_flipped_bit_in_the_manifest_is_found(stored: Stored) -> None:
    whole = stored.path.read_bytes()
    value = values(stored.path)[MANIFEST_KEY]
    for at in range(0, len(value), 7):
        stored.path.write_bytes(damaged(whole, value, at, 2))
        with pytest.raises((CorruptStoreError, NotAStoreError, NewerFormatError)) as caught:
            tallstore.load(stored.path)
        assert str(caught.value).startswith(str(stored.path))
        if at >= 12:
            assert isinstance(caught.value, CorruptStoreError)


def test_a_missing_chunk(stored: Stored) -> None:
    with tallstore.open(stored.path) as store:
        stream = store.tasks["one"].streams[0]
    rewrite(stored.path, lambda items: items.pop(chunk_key(stream, 0)) and None)
    with refused(CorruptStoreError, f"stream {stream}, chunk 0 is missing from the store"):
        tallstore.load(stored.path, task="one")
    with tallstore.open(stored.path) as store:
        (problem,) = store.verify().problems
        assert problem.owners == ("task 'one'",) and "is missing" in problem.message
        assert_same(store.load("two"), stored.tasks["two"])


def test_a_chunk_swapped_with_another(stored: Stored) -> None:
    with tallstore.open(stored.path) as store:
        first, second = (
            chunk_key(store.describe(name).task.codes[0].planes, 0)  # type: ignore[union-attr]
            for name in ("one", "two")
        )

    def swap(items: dict[bytes, bytes]) -> None:
        assert len(items[first]) > 48 and items[first] != items[second]
        items[first], items[second] = items[second], items[first]

    rewrite(stored.path, swap)
    for task in stored.tasks:
        with refused(ChecksumError, stored.path, "checksum mismatch"):
            tallstore.load(stored.path, task=task)
    assert_same(tallstore.load(stored.path), stored.base)


def test_a_chunk_of_another_store(stored: Stored, tmp_path: Path) -> None:
    other = tmp_path / "other.tall"
    tallstore.pack(other, stored.base, stored.tasks, exact=True)
    with tallstore.open(stored.path) as store:
        key = chunk_key(store.base.streams[0], 0)
    theirs = values(other)
    assert key in theirs
    rewrite(stored.path, lambda items: items.update({key: theirs[key]}))
    with refused(ChecksumError, stored.path, "checksum mismatch"):
        tallstore.load(stored.path)


def test_another_base(stored: Stored) -> None:
    def change(body: dict[str, Any]) -> None:
        body["base"] = {**body["base"], "identity": "f" * 64}

    rewrite_body(stored.path, change)
    with refused(WrongBaseError, f"{stored.path}: task 'one': written against base", "f" * 16):
        tallstore.load(stored.path, task="one")
    with tallstore.open(stored.path) as store:
        assert [p.owners for p in store.verify().problems] == [("task 'one'",), ("task 'two'",)]


def test_a_manifest_that_contradicts_itself(stored: Stored) -> None:
    def no_stream(body: dict[str, Any]) -> None:
        task = dict(body["tasks"]["one"])
        body["tasks"] = {**body["tasks"], "one": {**task, "document": 999}}

    def bad_name(body: dict[str, Any]) -> None:
        body["tasks"] = {"../one": body["tasks"]["one"]}

    def lacks(body: dict[str, Any]) -> None:
        body["base"] = {k: v for k, v in body["base"].items() if k != "streams"}

    def no_base(body: dict[str, Any]) -> None:
        body["base"] = None

    whole = stored.path.read_bytes()
    for change, message in (
        (no_stream, "stream 999 is referred to but not in the manifest"),
        (bad_name, "'../one': a task's name is one plain word"),
        (lacks, "base lacks the field 'streams'"),
        (no_base, "the store holds no base"),
    ):
        stored.path.write_bytes(whole)
        rewrite_body(stored.path, change)
        with refused(CorruptStoreError, stored.path, message):
            tallstore.load(stored.path, task="one")
    stored.path.write_bytes(whole)
    stored.check()


# -- tasks --------------------------------------------------------------------------------


def test_an_unknown_task(stored: Stored) -> None:
    with refused(UnknownTaskError, f"{stored.path}: no task 'three'; there are 'one', 'two'"):
        tallstore.load(stored.path, task="three")
    with tallstore.open(stored.path, "a") as store:
        with refused(UnknownTaskError, "no task 'three'"):
            store.remove("one", "three")
        with refused(UnknownTaskError, "no task 'three'"):
            store.stored_bytes("three")
        with refused(UnknownTaskError, "no task 'three'"):
            store.unpack("three", stored.path.with_name("out.safetensors"))
    stored.check()


def test_a_store_without_tasks(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(make_base(), path)
    with refused(UnknownTaskError, f"{path}: no task 'a'", "the base alone"):
        tallstore.load(path, task="a")


def test_a_task_that_exists(stored: Stored) -> None:
    for use in (
        lambda: tallstore.save(stored.base, stored.path, task="one"),
        lambda: tallstore.add(stored.path, {"new": stored.base, "one": stored.base}),
    ):
        with refused(TaskExistsError, stored.path, "holds a task 'one' already", "overwrite"):
            use()
    stored.check()


BAD_NAMES: list[tuple[Any, str]] = [
    ("", "non-empty text"),
    (".", "no path"),
    ("..", "no path"),
    ("a/b", "no path"),
    ("a\\b", "no path"),
    ("/etc/passwd", "no path"),
    ("a\nb", "no control characters"),
    ("a\0b", "no control characters"),
    (" a", "no blanks around it"),
    ("a ", "no blanks around it"),
    ("-a", "does not begin with '-'"),
    ("a=b", "no '='"),
    ("a::b", "no '::'"),
    ("x" * 256, "at most 255 bytes"),
    ("ä" * 128, "at most 255 bytes"),
    ("\ud800", "no control characters"),
    (3, "non-empty text"),
]


@pytest.mark.parametrize(("name", "message"), BAD_NAMES, ids=lambda v: ascii(v)[:20])
def test_names_that_no_task_can_have(tmp_path: Path, name: Any, message: str) -> None:
    path = tmp_path / "m.tall"
    base = {"w": torch.ones(4)}
    tallstore.save(base, path)
    before = path.read_bytes()
    for use in (
        lambda: tallstore.save(base, path, task=name),
        lambda: tallstore.add(path, {name: base}),
        lambda: tallstore.pack(tmp_path / "z.tall", base, {name: base}),
    ):
        with refused(TaskNameError, message):
            use()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["a", "x" * 255, "mnli-m v2.1", "Ünïcode", "任务", "a:b", "~"])
def test_names_that_a_task_can_have(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.tall"
    base = {"w": torch.ones(4)}
    tallstore.save(base, path)
    tallstore.save({"w": torch.zeros(4)}, path, task=name)
    assert_same(tallstore.load(path, task=name), {"w": torch.zeros(4)})


# -- checkpoints that do not fit ----------------------------------------------------------


def test_an_empty_zoo(stored: Stored) -> None:
    with refused(EmptyZooError, stored.path, "no tasks to pack"):
        tallstore.pack(stored.path, stored.base, {}, overwrite=True)
    stored.check()


def test_another_architecture(stored: Stored, tmp_path: Path) -> None:
    other = {"gate.weight": torch.ones(50, 50), "gate.bias": torch.ones(50)}
    message = "only 0 of 2,550 weights match the base; names are absent from the base"
    with refused(MismatchError, message, "'gate.weight'", "Is it a fine-tune of this base?"):
        tallstore.pack(tmp_path / "z.tall", stored.base, {"a": stored.base, "b": other})
    with refused(MismatchError, message):
        tallstore.add(stored.path, {"b": other})
    assert not (tmp_path / "z.tall").exists()
    stored.check()


def test_shapes_that_clash(stored: Stored, tmp_path: Path) -> None:
    other = {name: t.new_ones((*t.shape, 2)) for name, t in stored.base.items()}
    with refused(
        MismatchError, "weights match the base; shapes clash", "'embed.weight' [37, 16, 2] against"
    ):
        tallstore.pack(tmp_path / "z.tall", stored.base, {"b": other})
    with refused(MismatchError, "shapes clash"):
        tallstore.add(stored.path, {"b": other})
    # dtypes that cannot be coded
    other = {name: t.to(torch.int8) for name, t in stored.base.items()}
    with refused(MismatchError, "weights match the base"):
        tallstore.add(stored.path, {"b": other})
    stored.check()


def test_a_base_without_floats(tmp_path: Path) -> None:
    base = {"w": torch.arange(9)}
    with refused(MismatchError, "no float32, bfloat16 or float16 weights to mask"):
        tallstore.pack(tmp_path / "z.tall", base, {"t": base})
    with refused(MismatchError, "no float32, bfloat16 or float16 weights to mask"):
        tallstore.pack(tmp_path / "z.tall", {}, {"t": base})
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_not_finite_packs(tmp_path: Path) -> None:
    base = make_base()
    base["norm.weight"][0] = float("nan")
    base["scale"] = torch.tensor(float("-inf"))
    tasks = {"a": fine_tune(base, 1), "b": fine_tune(make_base(), 2)}
    path = tmp_path / "z.tall"
    for exact in (True, False):
        tallstore.pack(path, base, tasks, exact=exact, overwrite=True)
        for name, state in tasks.items():
            found = tallstore.load(path, task=name)
            if exact:
                assert_same(found, state)
            kept = {key: found[key] for key in ("norm.weight", "scale")}
            assert_same(kept, {key: state[key] for key in kept})


def test_packing_where_something_is(stored: Stored) -> None:
    with refused(StoreExistsError, f"{stored.path}: there already"):
        tallstore.pack(stored.path, stored.base, stored.tasks)
    stored.check()


def test_a_truncated_safetensors_file(stored: Stored, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file(stored.base, path)
    os.truncate(path, path.stat().st_size - 100)
    with refused(CheckpointError, path):
        tallstore.pack(tmp_path / "z.tall", stored.base, {"t": path})
    with refused(CheckpointError, path):
        tallstore.add(stored.path, {"t": path})
    assert not (tmp_path / "z.tall").exists()
    stored.check()


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_a_pickle_that_would_execute_code(stored: Stored, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    evil = {"w": torch.ones(3), "x": _Evil(marker)}
    torch.save(evil, tmp_path / "zip.pt")
    torch.save(evil, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Evil(marker), protocol=2))
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert marker.exists(), "the bait works"
    marker.unlink()
    for name in ("zip.pt", "legacy.bin", "plain.pt"):
        path = tmp_path / name
        for use in (
            lambda p=path: tallstore.add(stored.path, {"t": p}),
            lambda p=path: tallstore.pack(tmp_path / "z.tall", p, {"t": stored.base}),
            lambda p=path: tallstore.pack(tmp_path / "z.tall", stored.base, {"t": p}),
        ):
            with refused(UnsafePickleError, path):
                use()
        with refused(NotAStoreError, path):
            tallstore.load(path)
    assert not marker.exists(), "the pickle was executed"
    assert not (tmp_path / "z.tall").exists()
    stored.check()


@pytest.mark.parametrize(
    ("obj", "where"),
    [
        ({"a": [1, {"b": object()}]}, "a"),
        ({"model": torch.ones(1), "f": lambda: 0}, "f"),
        ([1, 2, sys], "2"),
    ],
)
def test_an_unsupported_object(stored: Stored, obj: Any, where: str) -> None:
    for use in (
        lambda: tallstore.save(obj, stored.path, overwrite=True),
        lambda: tallstore.save(obj, stored.path, task="t"),
        lambda: tallstore.pack(stored.path, stored.base, {"t": obj}, overwrite=True),
    ):
        with refused(UnsupportedObjectError, where):
            use()
    stored.check()


def test_devices_that_are_not_there(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        with refused(DeviceError, f"device={device!r}: no CUDA device", "device='cpu'"):
            tallstore.load(stored.path, task="one", device=device)
    with refused(OptionError, "device='gpu'"):
        tallstore.load(stored.path, device="gpu")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_device_that_is_too_small(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert kwargs["device"] == torch.device("cuda", 0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "mem_get_info": (7 << 20, 9 << 20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch, "empty", empty)
    with refused(DeviceError, "cuda:0: out of memory while loading", "7 of 9 MiB are free"):
        tallstore.load(stored.path, device="cuda", dtype=dtype)
    with refused(DeviceError, "device='cuda:1': there are 1 CUDA devices"):
        tallstore.load(stored.path, device="cuda:1")


@pytest.mark.parametrize("fidelity", ["lossy", "", 1])
def test_a_fidelity_that_does_not_exist(stored: Stored, fidelity: Any) -> None:
    with refused(OptionError, f"fidelity={fidelity!r}", "'exact' or 'codes'"):
        tallstore.load(stored.path, task="one", fidelity=fidelity)


# -- the file system ----------------------------------------------------------------------


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


def test_a_full_disk(small_disk: Path) -> None:
    base = make_base()
    tasks = {"one": fine_tune(base, 1), "two": fine_tune(base, 2)}
    stored = Stored(small_disk / "zoo.tall", base, tasks)
    tallstore.pack(stored.path, base, tasks, exact=True)
    draw = torch.Generator().manual_seed(0)
    large = {"w": torch.randn(4 << 20, generator=draw)}
    fitting = {"w": torch.randn(1 << 19, generator=draw)}  # and then no more
    for use in (
        lambda: tallstore.save(large, stored.path, overwrite=True),
        lambda: tallstore.save(large, stored.path, task="new"),
        lambda: tallstore.save(large, small_disk / "new.tall"),
        lambda: tallstore.pack(small_disk / "new.tall", large, {"a": fine_tune(large, 1)}),
    ):
        with refused(
            StoreFullError,
            small_disk,
            "no space left on the device",
            "more bytes are needed",
            "what was stored before is intact",
            "Free some space",
        ):
            use()
        stored.check()
        assert not (small_disk / "new.tall").exists()
        # What was aborted is given back.
        assert shutil.disk_usage(small_disk).free > 5 << 20
    # There is room for something smaller.
    tallstore.save(fitting, stored.path, task="fits")
    assert_same(tallstore.load(stored.path, task="fits"), fitting)
    with refused(StoreFullError, "no space left on the device"):
        tallstore.save({"w": fitting["w"].repeat(3)}, stored.path, task="more")
    assert_same(tallstore.load(stored.path, task="fits"), fitting)
    with tallstore.open(stored.path, "a") as store:
        store.remove("fits")
    stored.check()


def test_a_full_disk_while_a_reader_is_there(small_disk: Path) -> None:
    base = make_base()
    stored = Stored(small_disk / "zoo.tall", base, {"one": fine_tune(base, 1)})
    tallstore.pack(stored.path, base, stored.tasks, exact=True)
    large = {"w": torch.randn(4 << 20, generator=torch.Generator().manual_seed(0))}
    with tallstore.open(stored.path) as reader:
        with refused(StoreFullError, stored.path, "no space left"):
            tallstore.save(large, stored.path, overwrite=True)
        assert_same(reader.load("one"), stored.tasks["one"])
        reader.refresh()
        assert_same(reader.load("one"), stored.tasks["one"])
    stored.check()


def test_a_file_that_may_not_grow(stored: Stored) -> None:
    code = """
import resource, signal, sys
import torch, tallstore
from tallstore.errors import TallstoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
large = {"w": torch.arange(1 << 20).float().sin()}
for keywords in ({"task": "new"}, {"overwrite": True}):
    try:
        tallstore.save(large, sys.argv[1], **keywords)
    except TallstoreError as exc:
        print(type(exc).__name__, exc)
"""
    lines = run_child(code, stored.path).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        kind, _, message = line.partition(" ")
        assert kind in (StoreIOError.__name__, StoreFullError.__name__)
        assert str(stored.path) in message
    stored.check()


def test_a_store_locked_by_another_process(stored: Stored) -> None:
    code = """
import sys
from pathlib import Path
from tallstore.engine.writerlock import WriterLock
with WriterLock(Path(sys.argv[1]), timeout=0):
    print("held", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(stored.path)],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "held\n"
        base = stored.base
        message = f"another process (pid {child.pid}) is writing to it; waited 0.1 s"
        for use in (
            lambda: tallstore.save(base, stored.path, task="new", timeout=0.1),
            lambda: tallstore.save(base, stored.path, overwrite=True, timeout=0.1),
            lambda: tallstore.pack(stored.path, base, {"t": base}, overwrite=True, timeout=0.1),
            lambda: tallstore.compact(stored.path, timeout=0.1),
            lambda: remove(stored.path, "one", timeout=0.1),
        ):
            with refused(StoreLockedError, stored.path, message, "timeout="):
                use()
        # readers are not in the way of writers, nor the other way round
        for name, state in stored.tasks.items():
            assert_same(tallstore.load(stored.path, task=name), state)
        child.stdin.close()
        assert child.wait() == 0
    tallstore.save(base, stored.path, task="new", timeout=0)


def test_a_read_only_file_system(stored: Stored, small_disk: Path) -> None:
    there = Stored(small_disk / "zoo.tall", stored.base, stored.tasks)
    shutil.copyfile(stored.path, there.path)
    before = there.path.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    there.check()
    for use in (
        lambda: tallstore.save(stored.base, there.path, overwrite=True),
        lambda: tallstore.save(stored.base, there.path, task="new"),
        lambda: tallstore.save(stored.base, small_disk / "new.tall"),
        lambda: tallstore.pack(small_disk / "new.tall", stored.base, {"t": stored.base}),
        lambda: remove(there.path, "one"),
        lambda: tallstore.compact(there.path),
    ):
        with refused(StoreReadOnlyError, small_disk, "no permission"):
            use()
    assert there.path.read_bytes() == before
    assert [p.name for p in small_disk.iterdir()] == ["zoo.tall"]


@pytest.mark.skipif(os.getuid() != 0, reason="takes root to become somebody without rights")
def test_files_and_directories_without_permission(stored: Stored) -> None:
    code = """
import os, shutil, sys, tempfile
import torch, tallstore, tallstore.loading, tallstore.checking, tallstore.writing
import tallstore.opening, tallstore.packing.pack, zoo
from helpers import assert_same
from test_bad_input import remove
from tallstore.errors import StoreReadOnlyError
place = tempfile.mkdtemp()
path = os.path.join(place, "zoo.tall")
secret = os.path.join(place, "secret.tall")
shutil.copyfile(sys.argv[1], path)
shutil.copyfile(sys.argv[1], secret)
os.chmod(place, 0o755)
os.chmod(path, int(sys.argv[2], 8))
os.chmod(secret, 0o600)
root = os.fork()
if root:
    status = os.waitpid(root, 0)[1]
    files = sorted(os.listdir(place))
    shutil.rmtree(place)
    assert files == ["secret.tall", "zoo.tall"], files
    sys.exit(os.waitstatus_to_exitcode(status))
os.setgid(65534)
os.setuid(65534)
base = zoo.make_base()
assert_same(tallstore.load(path), base)
with tallstore.open(path, "a") as store:
    assert_same(store.load("one"), zoo.fine_tune(base, 1))
    assert store.verify().ok
for use in (
    lambda: tallstore.save(base, path, overwrite=True),
    lambda: tallstore.save(base, path, task="new"),
    lambda: tallstore.save(base, os.path.join(place, "new.tall")),
    lambda: tallstore.compact(path),
    lambda: remove(path, "one"),
    lambda: tallstore.load(secret),
):
    try:
        use()
    except StoreReadOnlyError as exc:
        assert "no permission" in str(exc) and place in str(exc), exc
        assert isinstance(exc, PermissionError)
    else:
        raise SystemExit("nobody may do that")
assert_same(tallstore.load(path), base)
"""
    for mode in ("444", "666"):
        run_child(code, stored.path, mode)
    stored.check()


def test_a_failing_device(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with refused(StoreIOError, stored.path, "cannot write", "Input/output error"):
        tallstore.save(stored.base, stored.path, overwrite=True)
    monkeypatch.undo()
    stored.check()


def test_truncation_is_no_corruption_of_another_kind() -> None:
    assert issubclass(TruncatedStoreError, CorruptStoreError)
