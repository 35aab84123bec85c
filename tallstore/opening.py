"""Opening whatever a user calls a checkpoint, stores included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tallstore.catalog import BaseRecord, Catalog
from tallstore.errors import OptionError
from tallstore.externalbase import place_of
from tallstore.loading import Loader
from tallstore.sources.opening import is_lmdb_file, open_source
from tallstore.sources.source import Source
from tallstore.store import open_snapshot
from tallstore.storesource import StoreSource

__all__ = ["open_base_of", "open_checkpoint"]


def open_checkpoint(what: Any) -> Source:
    """A source for a path, ``STORE``, ``STORE::TASK``, a state dict, a module or a nest of them.

    Parameters
    ----------
    what
        A store's path stands for its base.

    Raises
    ------
    CheckpointError, UnsafePickleError, UnsupportedObjectError
    """
    if isinstance(what, (str, os.PathLike)):
        text = os.fspath(what)
        if Path(text).is_file() and is_lmdb_file(text):
            return _from_store(Path(text), None)
        path, _, task = text.rpartition("::")  # a task's name has no "::", a path may
        if path and not Path(text).exists() and Path(path).is_file() and is_lmdb_file(path):
            return _from_store(Path(path), task or None)
    return open_source(what)


def _from_store(path: Path, task: str | None) -> Source:
    return _open_store(path, task)[0]


def open_base_of(path: Path) -> tuple[StoreSource, BaseRecord]:
    """The base of the store at `path`, as a source, and its record.

    Raises
    ------
    OptionError
        It has its base from another store itself.
    StoreNotFoundError, NotAStoreError, CorruptStoreError
        It is no store.
    """
    source, catalog = _open_store(path, None)
    record = catalog.base
    if record is None or record.external is not None:
        source.close()
        other = None if record is None else place_of(source.store, record.external or "")
        raise OptionError(f"{path}: it has its base from another store; give that one: {other}")
    return source, record


def _open_store(path: Path, task: str | None) -> tuple[StoreSource, Catalog]:
    snapshot = open_snapshot(Path(os.path.realpath(path)))
    try:
        catalog = Catalog.from_json(snapshot.manifest.body, what=str(path))
        loader = Loader(snapshot, catalog, task=task)
    except BaseException:
        snapshot.close()
        raise
    label = str(path) if task is None else f"{path}::{task}"
    return StoreSource(loader, label=label, owned=snapshot), catalog
