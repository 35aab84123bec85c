"""What is not a store, or not one for this version or host: refused by name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stored import Stored, every_use, open_lmdb, refused, rewrite, values
from zoo import make_base

import tallstore
from tallstore.engine.keys import MANIFEST_KEY, chunk_key
from tallstore.engine.manifest import Manifest
from tallstore.engine.newfile import NewFile
from tallstore.engine.session import WriteSession
from tallstore.errors import (
    NewerFormatError,
    NotAStoreError,
    OptionError,
    StoreNotFoundError,
)


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


def test_a_newer_format_version(stored: Stored) -> None:
    def patch(items: dict[bytes, bytes]) -> None:
        value = bytearray(items[MANIFEST_KEY])
        assert value[8:12] == (2).to_bytes(4, "little")
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
