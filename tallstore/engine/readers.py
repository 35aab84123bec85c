"""Who reads a store: the slots of LMDB's reader table, looked at before anybody clears them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from tallstore.engine.datafile import check_data_file
from tallstore.engine.environment import is_open_here, lmdb_errors, lock_file
from tallstore.engine.refusals import check_path

__all__ = ["Readers", "readers"]


@dataclass(frozen=True, slots=True)
class Readers:
    """The reader table of a store."""

    processes: tuple[int, ...]
    """Of the live readers, each process once."""
    stale: int
    """Slots of readers that were killed; they were cleared by looking."""


def readers(path: Path) -> Readers | None:
    """Look at the reader table of the store at `path`, and clear what killed readers left in it.

    Returns
    -------
    Readers or None
        None where it cannot be told: without write access to the table, or where this process has
        the store open itself.

    Raises
    ------
    NotAStoreError, TruncatedStoreError, OptionError
    """
    check_path(path)
    lock = lock_file(path)
    if not lock.exists():
        return Readers((), 0)
    if not os.access(lock, os.W_OK) or is_open_here(path):
        return None
    with lmdb_errors(path, doing="look at its readers"):
        with path.open("rb") as file:
            check_data_file(file.fileno(), path)
        with contextlib.suppress(lmdb.Error):
            options: dict[str, Any] = {
                "subdir": False,
                "readonly": True,
                "create": False,
                "max_readers": 510,
            }
            try:
                opened = lmdb.Environment(str(path), lib_version=0, **options)
            except TypeError:
                opened = lmdb.Environment(str(path), **options)
            try:
                stale = opened.reader_check()
                return Readers(_processes(opened.readers()), stale)
            finally:
                opened.close()
    return None


def _processes(table: str) -> tuple[int, ...]:
    """The processes of LMDB's listing: a title, then a line a slot, its process first."""
    rows = [line.split() for line in table.splitlines()]
    found = {int(row[0]) for row in rows if len(row) == 3 and row[0].isdigit()}
    return tuple(sorted(found))
