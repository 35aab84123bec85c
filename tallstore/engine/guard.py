"""When LMDB's pages are checked: before a reader looks anything up, before a writer writes.

How and why: `tallstore.engine.tree`.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tallstore.engine.datafile import CURE, DataFile, check_data_file, read_metas
from tallstore.engine.environment import Environment
from tallstore.engine.freepages import check_free_pages, check_runs
from tallstore.engine.tree import Tree, walk
from tallstore.errors import CorruptStoreError, StoreLockedError

__all__ = [
    "Walked",
    "begin_reading",
    "check_before_copying",
    "check_before_writing",
    "page_damage",
    "stray_keys",
]

_ATTEMPTS: Final = 100
_CHUNK_KEY: Final = 12
_KEY: Final = struct.Struct(">QQ")


@dataclass(frozen=True, slots=True)
class Walked:
    """A commit whose tree was checked."""

    file: DataFile
    tree: Tree

    def check_run(self, descriptor: int, key: bytes, *, what: str) -> None:
        """Check the header of a value's pages, if it has some.

        LMDB looks at it when it gives a value; if it is wrong, nothing more can be read in that
        transaction.

        Raises
        ------
        CorruptStoreError
            LMDB must not be asked for this value.
        """
        row = self.tree.row(key)
        if row is not None and check_runs(descriptor, self.file, self.tree, [row]):
            run = int(self.tree.runs[row])
            raise CorruptStoreError(f"{what}: page {run}, where it begins, is damaged; {CURE}")


def begin_reading(environment: Environment) -> tuple[Any, Walked]:
    """A read transaction with buffers, after its whole tree was checked.

    Raises
    ------
    CorruptStoreError
        LMDB could not be trusted with it.
    """
    for _ in range(_ATTEMPTS):
        transaction = environment.lmdb.begin(buffers=True)
        try:
            walked = _walked(environment, transaction.id())
            if walked is not None:
                return transaction, walked
        except BaseException:
            transaction.abort()
            raise
        transaction.abort()
    raise StoreLockedError(
        f"{environment.shown}: it is written to faster than it can be opened; try again"
    )


def _walked(environment: Environment, number: int) -> Walked | None:
    """Check the tree of one transaction; None where its meta page is overwritten already."""
    known = environment.walked
    if isinstance(known, Walked) and known.file.transaction == number:
        return known
    for file in read_metas(environment.presence, environment.shown):
        if file.transaction == number:
            walked = Walked(file, _main(environment, file))
            environment.walked = walked
            return walked
    return None


def _main(environment: Environment, file: DataFile) -> Tree:
    return walk(environment.presence, file, file.main, path=environment.shown)


def _newest(environment: Environment) -> tuple[DataFile, Tree]:
    file = check_data_file(environment.presence, environment.shown)
    return file, _main(environment, file)


def stray_keys(tree: Tree, live: Collection[int]) -> list[bytes]:
    """Keys of chunks whose stream is not in `live`: what an interrupted write left behind."""
    keys = tree.keys[_stray(tree, live)]
    return [_KEY.pack(int(high), int(low))[:_CHUNK_KEY] for high, low, _ in keys]


def _stray(tree: Tree, live: Collection[int]) -> NDArray[np.bool_]:
    streams = np.fromiter(live, np.uint64, len(live))
    chunks: NDArray[np.bool_] = tree.keys[:, 2] == _CHUNK_KEY
    return chunks & ~np.isin(tree.keys[:, 0], streams)


def check_before_writing(environment: Environment, kept: Collection[int]) -> list[bytes]:
    """Check all that LMDB goes by in a write; the caller holds the store's `WriterLock`.

    Parameters
    ----------
    kept
        Streams whose chunks the write leaves alone; all others it may remove.

    Returns
    -------
    list of bytes
        The keys of those others.

    Raises
    ------
    CorruptStoreError
        A write could do harm; nothing was written.
    """
    file, tree = _newest(environment)
    check_free_pages(environment.presence, file, tree, path=environment.shown)
    _refuse(environment, tree, file, _stray(tree, kept) | (tree.keys[:, 2] != _CHUNK_KEY))
    return stray_keys(tree, kept)


def check_before_copying(environment: Environment) -> None:
    """Check all that LMDB goes by when it copies a file page by page; raises CorruptStoreError.

    It takes what is not free for used, counts, and gives up if the count is another one.
    """
    file, tree = _newest(environment)
    lost = check_free_pages(environment.presence, file, tree, path=environment.shown)
    if lost:
        raise CorruptStoreError(
            f"{environment.shown}: the list of free pages is damaged: {lost} of {file.pages} pages "
            "are neither in use nor free. The store can be read and written to, but not compacted; "
            "`tallstore verify --repair` makes a whole one of it"
        )
    _refuse(environment, tree, file, np.ones(tree.runs.size, np.bool_))


def _refuse(
    environment: Environment, tree: Tree, file: DataFile, chosen: NDArray[np.bool_]
) -> None:
    for row in check_runs(environment.presence, file, tree, np.flatnonzero(chosen)):
        raise CorruptStoreError(
            f"{environment.shown}: page {int(tree.runs[row])} is damaged, the header of "
            f"{_owner(tree, row)}: nothing was written; {CURE}"
        )


def _owner(tree: Tree, row: int) -> str:
    stream, chunk, length = (int(part) for part in tree.keys[row])
    return f"stream {stream}, chunk {chunk >> 32}" if length == _CHUNK_KEY else "the manifest"


def page_damage(environment: Environment, walked: Walked) -> list[str]:
    """What is wrong with the list of free pages, of which readers make no use.

    Parameters
    ----------
    walked
        Of a transaction that is still open.
    """
    try:
        check_free_pages(environment.presence, walked.file, walked.tree, path=environment.shown)
    except CorruptStoreError as exc:
        return [str(exc)]
    return []
