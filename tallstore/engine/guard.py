"""When LMDB's pages are checked: before a reader looks anything up, before a writer writes.

How and why: `tallstore.engine.tree`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import numpy as np

from tallstore.engine.datafile import CURE, DataFile, check_data_file, read_metas
from tallstore.engine.environment import Environment
from tallstore.engine.freepages import check_free_pages, check_runs
from tallstore.engine.tree import Tree, walk
from tallstore.errors import CorruptStoreError, StoreLockedError

__all__ = ["begin_reading", "check_before_copying", "check_before_writing", "damaged_runs"]

_ATTEMPTS: Final = 100
_CHUNK_KEY: Final = 12


def begin_reading(environment: Environment) -> tuple[Any, DataFile]:
    """A read transaction with buffers whose whole tree was checked, and its meta page.

    Raises
    ------
    CorruptStoreError
        LMDB could not be trusted with it.
    """
    for _ in range(_ATTEMPTS):
        transaction = environment.lmdb.begin(buffers=True)
        try:
            file = _walked(environment, transaction.id())
            if file is not None:
                return transaction, file
        except BaseException:
            transaction.abort()
            raise
        transaction.abort()
    raise StoreLockedError(
        f"{environment.shown}: it is written to faster than it can be opened; try again"
    )


def _walked(environment: Environment, number: int) -> DataFile | None:
    """Check the tree of one transaction; None where its meta page is overwritten already."""
    known = environment.walked
    if known is not None and known.transaction == number:
        return known
    for file in read_metas(environment.presence, environment.shown):
        if file.transaction == number:
            _main(environment, file)
            environment.walked = file
            return file
    return None


def _main(environment: Environment, file: DataFile) -> Tree:
    return walk(environment.presence, file, file.main, path=environment.shown)


def _newest(environment: Environment) -> tuple[DataFile, Tree]:
    file = check_data_file(environment.presence, environment.shown)
    return file, _main(environment, file)


def check_before_writing(environment: Environment, kept: Collection[int]) -> None:
    """Check all that LMDB goes by in a write; the caller holds the store's `WriterLock`.

    Parameters
    ----------
    kept
        Streams whose chunks the write leaves alone; all others it may remove.

    Raises
    ------
    CorruptStoreError
        A write could do harm; nothing was written.
    """
    file, tree = _newest(environment)
    check_free_pages(environment.presence, file, tree, path=environment.shown)
    streams = np.fromiter(kept, np.uint64, len(kept))
    chunks = tree.keys[:, 2] == _CHUNK_KEY
    _refuse(environment, tree, file, ~(chunks & np.isin(tree.keys[:, 0], streams)))


def check_before_copying(environment: Environment) -> None:
    """Check all that LMDB goes by when it copies a file page by page; raises CorruptStoreError."""
    file, tree = _newest(environment)
    _refuse(environment, tree, file, np.ones(tree.runs.size, np.bool_))


def _refuse(environment: Environment, tree: Tree, file: DataFile, chosen: Any) -> None:
    for row in check_runs(environment.presence, file, tree, chosen):
        raise CorruptStoreError(
            f"{environment.shown}: page {int(tree.runs[row])} is damaged, the header of "
            f"{_owner(tree, row)}: nothing was written; {CURE}"
        )


def _owner(tree: Tree, row: int) -> str:
    stream, chunk, length = (int(part) for part in tree.keys[row])
    return f"stream {stream}, chunk {chunk >> 32}" if length == _CHUNK_KEY else "the manifest"


def damaged_runs(environment: Environment, file: DataFile) -> list[tuple[int | None, str]]:
    """What a reader does not mind, but a writer would: damage to headers and to the free list.

    Parameters
    ----------
    file
        The meta page of a transaction that is still open.

    Returns
    -------
    list of (int or None, str)
        The stream that it concerns (None: only writers), and what is wrong.
    """
    tree = _main(environment, file)
    found: list[tuple[int | None, str]] = []
    for row in check_runs(environment.presence, file, tree):
        stream = int(tree.keys[row, 0]) if tree.keys[row, 2] == _CHUNK_KEY else None
        page = int(tree.runs[row])
        found.append((stream, f"page {page} is damaged, the header of {_owner(tree, row)}"))
    try:
        check_free_pages(environment.presence, file, tree, path=environment.shown)
    except CorruptStoreError as exc:
        found.append((None, str(exc).removeprefix(f"{environment.shown}: ")))
    return found
