"""Damaged and contradictory stores: found, named, and nothing else is lost by it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from stored import Stored, damaged, refused, rewrite, rewrite_body, values
from zoo import run_child

import tallstore
from tallstore.engine.keys import MANIFEST_KEY, chunk_key, split_key
from tallstore.errors import (
    ChecksumError,
    CorruptStoreError,
    NewerFormatError,
    NotAStoreError,
    WrongBaseError,
)


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
                    # The exact tier does without the codes, and the codes without it.
                    refusals = []
                    for fidelity in (None, "codes"):
                        try:
                            loaded = store.load(task, fidelity=fidelity)
                        except CorruptStoreError as exc:
                            refusals.append(exc)
                        else:
                            assert task is not None
                            if fidelity is None:
                                assert_same(loaded, state)
                    assert refusals
                    for refusal in refusals:
                        assert f"stream {stream}, chunk {chunk}" in str(refusal)
                        if at >= 48:
                            assert type(refusal) is ChecksumError
                            assert "Restore the store from a copy" in str(refusal)
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
        stream = store.describe("one").task.codes[0].exact  # type: ignore[union-attr]
        assert stream is not None
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
            tallstore.load(stored.path, task=task, fidelity="codes")
        assert_same(tallstore.load(stored.path, task=task), stored.tasks[task])
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
