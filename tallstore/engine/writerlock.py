"""One writer at a time, for the whole of a write and not only for one LMDB transaction."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType

from tallstore.engine.environment import lmdb_errors
from tallstore.engine.filesystem import warn_of_network
from tallstore.engine.waiting import attempts
from tallstore.errors import OptionError, StoreLockedError

__all__ = ["WriterLock"]


class WriterLock:
    """An exclusive ``flock`` on ``NAME-writer`` beside the store, held while a write is under way.

    The kernel drops it with the process, so a killed writer locks nobody out; the empty file that
    it leaves is taken over by the next one and removed at its end.

    Parameters
    ----------
    path
        The store's file.
    timeout
        Seconds to wait for another writer.
    """

    def __init__(self, path: Path, *, timeout: float) -> None:
        if not timeout >= 0:
            raise OptionError(f"timeout={timeout}: seconds to wait, not negative")
        self._path = path.with_name(path.name + "-writer")
        self._store = path
        self._timeout = timeout
        self._descriptor = -1

    def __enter__(self) -> WriterLock:
        with lmdb_errors(self._store, doing="lock it for writing"):
            if not any(self._try() for _ in attempts(self._timeout, self._in_the_way)):
                raise StoreLockedError(
                    f"{self._in_the_way()}; waited {self._timeout:g} s. "
                    "Try again, or wait longer (timeout=)"
                )
        try:
            warn_of_network(self._store)
        except BaseException:  # a warning made an error
            self.__exit__(None, None, None)
            raise
        return self

    def _try(self) -> bool:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file at its end: a lock on a removed file locks nothing.
            if os.path.samestat(os.fstat(descriptor), self._path.stat()):
                with contextlib.suppress(OSError):  # for people; a full disk does without
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                self._descriptor = descriptor
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return False

    def _in_the_way(self) -> str:
        return f"{self._store}: another process{self._holder()} is writing to it"

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return f" (pid {int(self._path.read_bytes()[:20])})"
        return ""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1
