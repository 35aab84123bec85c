"""A store built beside its final place and moved there when it is whole and on disk."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import os
import re
import secrets
import stat
import time
from pathlib import Path

from tallstore.engine.environment import (
    Environment,
    create_environment,
    lmdb_errors,
    lock_file,
    open_environment,
)
from tallstore.engine.filesystem import sync_directory
from tallstore.engine.guard import check_before_copying
from tallstore.engine.session import commit_again
from tallstore.engine.snapshot import Snapshot
from tallstore.engine.temporary import remove_stale
from tallstore.errors import NotAStoreError, StoreLockedError, StoreNotFoundError

__all__ = ["NewFile"]


def _lock(descriptor: int, path: Path, *, timeout: float) -> None:
    """Wait until nobody has a data file open, and hold others off."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise StoreLockedError(
                    f"{path}: in use by a reader; close it and try again, or wait longer than "
                    f"{timeout:g} s (timeout=). Nothing was changed"
                ) from None
        time.sleep(0.05)


def _link_beside(path: Path) -> Path:
    """Give a file a second name that is free: ``NAME.damaged``, ``NAME.damaged-2``, ..."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))
        with contextlib.suppress(FileExistsError):
            os.link(path, kept)
            break
    return kept


class NewFile:
    """A temporary LMDB file in the directory of `path`, hidden until `publish`.

    The caller holds the `WriterLock` of `path`.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise NotAStoreError(f"{path}: a directory is in the way; name a file")
        if not path.parent.is_dir():
            raise StoreNotFoundError(f"{path.parent}: no such directory; make it first")
        self.path = path
        self._remove_stale()
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        try:
            self.environment: Environment = create_environment(self._temporary, destination=path)
        except BaseException:
            for left in (self._temporary, lock_file(self._temporary)):
                with contextlib.suppress(OSError):
                    left.unlink()
            raise

    def _remove_stale(self) -> None:
        """Remove what killed writers left: the caller has the lock, so they are no more."""
        name = re.escape(self.path.name)
        remove_stale(self.path.parent, rf"\.{name}\.[0-9a-f]{{12}}\.tmp")
        for lock in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp-lock"):
            if not lock.with_name(lock.name.removesuffix("-lock")).exists():
                lock.unlink(missing_ok=True)

    def copy_of(self, environment: Environment) -> None:
        """Become a compacted copy of another environment, read back chunk by chunk."""
        with lmdb_errors(environment.shown, doing="check its pages"):
            check_before_copying(environment)
        descriptor = os.open(self._temporary, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.environment.lmdb.close()
            os.truncate(descriptor, 0)
            environment.lmdb.copyfd(descriptor, compact=True)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.environment.close()
        self.environment = create_environment(self._temporary, destination=self.path)
        commit_again(self.environment)  # LMDB leaves the other meta page empty
        self.environment.handles += 1
        snapshot = Snapshot(self.environment)
        try:
            for stream in snapshot.manifest.streams.values():
                for chunk in range(stream.chunks):
                    snapshot.read_chunk(stream, chunk, None)
        finally:
            snapshot.close()

    def publish(self, *, timeout: float) -> None:
        """Move the file to its place, over the store that is there, if any; all or nothing."""
        with lmdb_errors(self.path, doing="write"):
            os.fsync(self.environment.presence)
            self.environment.close()
            if self.path.exists():
                self._temporary.chmod(stat.S_IMODE(self.path.stat().st_mode))
                open_environment(self.path).replace_with(self._temporary, timeout=timeout)
            else:
                # The lock file of a store that was deleted by hand: its transaction numbers must
                # not be taken for this one's.
                lock_file(self.path).unlink(missing_ok=True)
                self._temporary.rename(self.path)
            sync_directory(self.path.parent)

    def publish_beside(self, *, timeout: float) -> Path:
        """Move the file to the place of a damaged one, which is kept under another name.

        LMDB never opens the damaged file here. At every moment there is a file at the path.

        Returns
        -------
        Path
            Where the damaged file is now.

        Raises
        ------
        StoreLockedError
            Others have it open; nothing was changed.
        """
        with lmdb_errors(self.path, doing="replace"):
            os.fsync(self.environment.presence)
            self.environment.close()
            self._temporary.chmod(stat.S_IMODE(self.path.stat().st_mode))
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _lock(descriptor, self.path, timeout=timeout)
                kept = _link_beside(self.path)
                lock_file(self.path).unlink(missing_ok=True)
                os.replace(self._temporary, self.path)
            finally:
                os.close(descriptor)
            sync_directory(self.path.parent)
        return kept

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        if self.environment.handles:
            self.environment.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()
