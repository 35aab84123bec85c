"""LMDB's pages, damaged one field at a time: what LMDB would follow is refused before it does.

What comes of damage to a whole store, and random damage of every kind: test_mutations.py.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np
import pytest
from zoo import fine_tune, make_base, run_child

import tallstore
from bench.mutations.stores import make_deep
from tallstore.engine.datafile import DataFile, check_data_file
from tallstore.engine.freepages import check_free_pages, check_runs
from tallstore.engine.tree import Tree, walk
from tallstore.errors import CorruptStoreError, NotAStoreError, TallstoreError, TruncatedStoreError
from tallstore.repairing import repair_store

PAGE = 4096


def look(path: Path) -> tuple[DataFile, Tree]:
    """Every check of a file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        file = check_data_file(descriptor, path)
        tree = walk(descriptor, file, file.main, path=path)
        assert check_runs(descriptor, file, tree, range(len(tree.keys))) == []
        check_free_pages(descriptor, file, tree, path=path)
        return file, tree
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def deep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of three levels."""
    path = tmp_path_factory.mktemp("deep") / "deep.tall"
    make_deep(path, 5)
    return path


@pytest.fixture
def deep(deep_file: Path, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "deep.tall"
    path.write_bytes(deep_file.read_bytes())
    yield path


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def word(path: Path, at: int) -> int:
    with path.open("rb") as file:
        file.seek(at)
        return int(struct.unpack("<H", file.read(2))[0])


def level(path: Path, flag: int) -> list[int]:
    """The pages in use with a flag: 1 branches, 2 leaves."""
    _, tree = look(path)
    return [int(page) for page in tree.pages if word(path, int(page) * PAGE + 10) == flag]


def holds_two(path: Path, leaf: int) -> bool:
    """Whether two values or more lie in a leaf itself."""
    count = (word(path, leaf + 12) - 16) // 2
    nodes = [leaf + word(path, leaf + 16 + 2 * number) for number in range(count)]
    return count > 1 and not any(word(path, node + 4) for node in nodes)


def test_the_walk_finds_what_lmdb_finds(deep: Path) -> None:
    file, tree = look(deep)
    assert file.main.depth == 3
    with lmdb.Environment(str(deep), subdir=False, lock=False, lib_version=0) as env:
        stat = env.stat()
        with env.begin(buffers=True) as txn:
            items = [(bytes(key), bytes(value)) for key, value in txn.cursor()]
    assert tree.keys.shape == (len(items), 3) == (stat["entries"], 3)
    assert tree.pages.size == stat["branch_pages"] + stat["leaf_pages"]
    assert tree.counts.sum() == stat["overflow_pages"]
    data = deep.read_bytes()
    columns = (tree.keys.tolist(), tree.places.tolist(), tree.sizes.tolist())
    for (high, low, length), place, size, (key, value) in zip(*columns, items, strict=True):
        assert (struct.pack(">QQ", high, low)[:length], data[place : place + size]) == (key, value)


def test_every_field_of_a_branch(deep: Path) -> None:
    branch = level(deep, 1)[-1] * PAGE
    node = branch + word(deep, branch + 16 + 2)  # the second: the first one's key is not looked at
    child = struct.unpack_from("<Q", deep.read_bytes(), node)[0] & 0xFFFF_FFFF_FFFF
    leaf = level(deep, 2)[0]
    for at, data, message in [
        (branch, b"\xff", "another page's number"),
        (branch + 10, b"\2", "flags other than 1"),
        (branch + 10, b"\4", "flags other than 1"),
        (branch + 12, b"\xff\xff", "bounds that cannot be"),
        (branch + 12, struct.pack("<H", 18), "bounds that cannot be"),  # one child alone
        (branch + 14, b"\0\0", "bounds that cannot be"),
        (branch + 16, b"\xfe\xff", "a node outside"),
        (branch + 18, b"\1\0", "a node outside"),
        (node, struct.pack("<IH", 2**31, 0), "leads out of the file"),
        (node + 4, b"\xff\xff", "leads out of the file"),
        (node, b"\1\0\0\0", "leads out of the file"),
        (node, struct.pack("<I", leaf), "its range|is used twice"),
        (node + 6, b"\xff\xff", "runs past its end"),
        (node + 6, b"\x40\0", "overlap|another length|runs past"),
        (node + 8, b"\xff" * 12, "out of order"),
        (node + 8, bytes(12), "out of order"),
    ]:
        before = deep.read_bytes()
        patch(deep, at, data)
        with pytest.raises(CorruptStoreError, match=message) as caught:
            look(deep)
        assert "is damaged" in str(caught.value) and str(deep) in str(caught.value)
        deep.write_bytes(before)
    assert child
    look(deep)


def test_every_field_of_a_leaf(deep: Path) -> None:
    leaf = next(p * PAGE for p in level(deep, 2) if holds_two(deep, p * PAGE))
    node = leaf + word(deep, leaf + 16)
    assert word(deep, node + 6) == 12
    other = leaf + word(deep, leaf + 18)
    for at, data, message in [
        (leaf + 4, b"\1", "another page's number"),
        (leaf + 10, b"\1", "flags other than 2"),
        (leaf + 10, b"\x22", "flags other than 2"),
        (leaf + 12, struct.pack("<H", 16), "bounds that cannot be"),
        (leaf + 12, struct.pack("<H", 17), "bounds that cannot be"),
        (leaf + 16, struct.pack("<H", word(deep, leaf + 18)), "overlap"),
        (node, b"\xff\xff", "page cannot hold"),
        (node + 2, b"\1", "page cannot hold"),
        (node, struct.pack("<H", 4000), "runs past its end|overlap"),
        (node + 4, b"\2", "unknown kind"),
        (node + 4, b"\4", "unknown kind"),
        (node + 4, b"\1", "outside of the file"),  # its value read as a page number
        (node + 6, b"\0\0", "another length"),
        (node + 6, b"\x11\0", "another length|runs past its end|overlap"),
        (node + 8, b"\xff" * 8, "out of order|above its range"),
        (node + 8, bytes(8), "below its range"),
        (other + 8, bytes(8), "out of order"),
    ]:
        before = deep.read_bytes()
        patch(deep, at, data)
        with pytest.raises(CorruptStoreError, match=message):
            look(deep)
        deep.write_bytes(before)


def test_a_value_that_leads_elsewhere(deep: Path) -> None:
    file, tree = look(deep)
    big = np.flatnonzero(tree.runs)
    one, two = int(big[0]), int(big[1])
    data = deep.read_bytes()
    needle = struct.pack("<Q", int(tree.runs[one]))
    key = struct.pack(">QI", int(tree.keys[one, 0]), 0)
    where = [page * PAGE for page in tree.pages.tolist()]
    at = next(data.index(key + needle, p) for p in where if key + needle in data[p : p + PAGE]) + 12
    for page, message in [
        (int(tree.runs[two]), "is used twice"),
        (int(tree.runs[two]) + 1, "is used twice"),
        (int(tree.pages[0]), "is used twice"),
        (file.pages - 1, "outside of the file"),
        (0, "outside of the file"),
        (2**64 - 1, "outside of the file"),
    ]:
        patch(deep, at, struct.pack("<Q", page))
        with pytest.raises(CorruptStoreError, match=message):
            look(deep)
    patch(deep, at - 12 - 8, b"\xff\xff\xff\x7f")  # its size
    with pytest.raises(CorruptStoreError, match="outside of the file"):
        look(deep)


def test_every_field_of_a_meta_page(deep: Path) -> None:
    for number in (0, 1):
        meta = number * PAGE + 16
        newest = look(deep)[0].transaction % 2 == number
        for at, data, kind in [
            (meta - 6, b"\2", CorruptStoreError),
            (meta - 16, b"\7", CorruptStoreError),
            (meta, b"\0", CorruptStoreError),
            (meta + 4, b"\2", CorruptStoreError),
            (meta + 25, b"\x20", CorruptStoreError),  # page size
            (meta + 28, b"\0", CorruptStoreError),  # flags of the list of free pages
            (meta + 73, b"\x10", CorruptStoreError),  # key size of the tree
            (meta + 76, b"\4", CorruptStoreError),  # flags of the tree
            (meta + 78, b"\0\0", CorruptStoreError),  # depth
            (meta + 78, b"\2" if newest else b"\0", CorruptStoreError),
            (meta + 128, b"\xff", CorruptStoreError),  # transaction
            (meta + 112, b"\xff" * 8, CorruptStoreError),  # root
        ]:
            before = deep.read_bytes()
            patch(deep, at, data)
            with pytest.raises(kind) as caught:
                look(deep)
            assert "damaged" in str(caught.value)
            deep.write_bytes(before)
        if newest:
            patch(deep, meta + 120, b"\xff\xff")  # last page
            with pytest.raises(TruncatedStoreError):
                look(deep)


def test_random_damage_to_the_tree_changes_nothing_unseen(deep: Path) -> None:
    """What the walk lets through leads to the same keys, in the same order, at sane places."""
    file, tree = look(deep)
    draw = random.Random(11)
    data = deep.read_bytes()
    pages = [int(page) for page in tree.pages]
    refused = 0
    for _ in range(400):
        page = draw.choice(pages[:10] if draw.random() < 0.5 else pages)
        at = page * PAGE + draw.choice((draw.randrange(64), draw.randrange(PAGE)))
        patch(deep, at, bytes([data[at] ^ 1 << draw.randrange(8)]))
        try:
            _, found = look(deep)
        except TallstoreError:
            refused += 1
        else:
            assert (found.places + found.sizes <= file.nbytes).all()
            assert np.array_equal(found.pages, tree.pages)
        patch(deep, at, data[at : at + 1])
    assert refused > 50


# -- writing ------------------------------------------------------------------------------


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A store with free pages."""
    path = tmp_path / "zoo.tall"
    base = make_base()
    tallstore.pack(path, base, {f"t{n}": fine_tune(base, n) for n in range(4)}, exact=True)
    with tallstore.open(path, "a") as store:
        store.remove("t1")
    return path


def writes(path: Path) -> None:
    """Every write refuses, reads go on, and nothing changes."""
    before = path.read_bytes()
    base = make_base()
    for write in (
        lambda: tallstore.save(base, path, task="new"),
        lambda: tallstore.save(base, path, task="t0", overwrite=True),
        lambda: tallstore.compact(path),
    ):
        with pytest.raises(CorruptStoreError, match="verify --repair"):
            write()
        assert path.read_bytes() == before
    with tallstore.open(path) as store:
        for name in store.tasks:
            store.load(name)


def test_no_write_goes_by_a_list_of_free_pages_that_names_pages_in_use(used: Path) -> None:
    file, tree = look(used)
    leaf = file.free.root * PAGE
    node = leaf + word(used, leaf + 16)
    record = node + 8 + 8
    count = struct.unpack_from("<Q", used.read_bytes(), record)[0]
    assert count > 1
    taken = int(tree.pages[-1])
    patch(used, record + 8, struct.pack("<Q", max(taken, 2)))
    before = used.read_bytes()
    with pytest.raises(CorruptStoreError, match="the list of free pages is damaged"):
        tallstore.save(make_base(), used, task="new")
    assert used.read_bytes() == before
    with tallstore.open(used) as store:
        found = store.verify()
        assert not found.ok and not found.tasks
        assert "the list of free pages" in found.problems[0].message
        for name in store.tasks:
            store.load(name)


def first_free(path: Path) -> tuple[int, list[int]]:
    """Where the oldest record of the list of free pages is, and the pages that it names."""
    leaf = look(path)[0].free.root * PAGE
    record = leaf + word(path, leaf + 16) + 16
    data = path.read_bytes()
    (count,) = struct.unpack_from("<Q", data, record)
    return record, list(struct.unpack_from(f"<{count}Q", data, record + 8))


def test_no_write_goes_by_a_list_of_free_pages_of_another_size(used: Path) -> None:
    newest = look(used)[0].transaction % 2 * PAGE
    leaves = newest + 16 + 40
    (count,) = struct.unpack_from("<Q", used.read_bytes(), leaves)
    patch(used, leaves, struct.pack("<Q", count + 1))  # LMDB's copy counts with it
    writes(used)
    patch(used, leaves, struct.pack("<Q", count))
    record, numbers = first_free(used)
    patch(used, record, struct.pack("<Q", len(numbers) - 1))  # LMDB refuses to write
    writes(used)


def test_pages_neither_used_nor_free_are_told_before_lmdb_copies(used: Path) -> None:
    """As found by bench.mutations: LMDB's copy gives up then, and says nothing about it."""
    record, numbers = first_free(used)
    patch(used, record - 16, struct.pack("<H", 8 * len(numbers)))
    patch(used, record, struct.pack(f"<{len(numbers)}Q", len(numbers) - 1, *numbers[:-1]))
    before = used.read_bytes()
    with pytest.raises(CorruptStoreError, match=r"1 of \d+ pages are neither.*verify --repair"):
        tallstore.compact(used)
    assert used.read_bytes() == before
    tallstore.save(make_base(), used, task="new")
    with tallstore.open(used) as store:
        assert store.verify().ok
    assert repair_store(used).ok
    tallstore.compact(used)


def test_no_write_goes_by_a_damaged_header_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    base = {"w": np.arange(50_000, dtype=np.float32)}
    tallstore.save(base, path)
    _, tree = look(path)
    run = int(tree.runs[np.flatnonzero(tree.runs)[0]])
    patch(path, run * PAGE + 12, struct.pack("<I", 2))
    before = path.read_bytes()
    with pytest.raises(CorruptStoreError, match=f"page {run} is damaged, the header of stream"):
        tallstore.compact(path)
    assert path.read_bytes() == before
    with pytest.raises(CorruptStoreError, match=f"page {run}, where it begins, is damaged"):
        tallstore.load(path)
    with tallstore.open(path) as store:
        (problem,) = store.verify().problems
    assert problem.owners == ("base",) and f"page {run}" in problem.message


def test_both_meta_pages_lead_to_the_last_commit(used: Path) -> None:
    """Were the newest one taken for the older by damage, the same tasks must be there."""
    for write in (
        lambda: tallstore.save(fine_tune(make_base(), 9), used, task="t9"),
        lambda: tallstore.compact(used),
    ):
        write()
        with tallstore.open(used) as store:
            wanted = list(store.tasks)
        newest = look(used)[0].transaction
        assert newest > 1
        code = """
import sys, lmdb, tallstore
from pathlib import Path
path, newest = Path(sys.argv[1]), int(sys.argv[2])
data = bytearray(path.read_bytes())
at = newest % 2 * 4096 + 16 + 128
data[at : at + 8] = (newest - 2).to_bytes(8, "little")
older = path.with_name("older.tall")
older.write_bytes(data)
with tallstore.open(older) as store:
    for name in store.tasks:
        store.load(name)
    print(*store.tasks)
"""
        done = run_child(code, used, newest)
        assert done.stdout.split() == wanted


def test_a_foreign_tree_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "f.tall"
    with lmdb.Environment(
        str(path), subdir=False, lock=False, map_size=1 << 26, max_dbs=3, lib_version=0
    ) as env:
        inner = env.open_db(b"inner", dupsort=True)
        with env.begin(write=True) as txn:
            txn.put(b"a", b"b", db=inner)
            txn.put(b"k" * 300, b"v")
    with pytest.raises((NotAStoreError, CorruptStoreError)):
        tallstore.load(path)


def test_readers_open_while_another_process_commits(used: Path) -> None:
    """The walk is of the very commit that the reader holds, whatever is written meanwhile."""
    code = """
import sys, tallstore
sys.path.insert(0, "tests")
from zoo import fine_tune, make_base
for n in range(12):
    tallstore.save(fine_tune(make_base(), n), sys.argv[1], task="moving", overwrite=n > 0)
"""
    import threading

    failures: list[BaseException] = []

    def write() -> None:
        try:
            run_child(code, used)
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=write)
    thread.start()
    opened = 0
    while thread.is_alive():
        with tallstore.open(used) as store:
            assert store.verify().ok
            store.load("t0")
        opened += 1
    thread.join()
    assert not failures, failures
    assert opened > 3
