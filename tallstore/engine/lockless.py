"""Readers without a slot in LMDB's reader table, for want of permission or room for its file.

A writer does not see them there, and would use pages again that they still read. So each holds a
shared lock on one byte far behind the end of the data file, by ``F_OFD_SETLK``, which takes no
more than the right to read it; and a writer must have that byte for itself for a moment at its
start. What readers that come later see is kept by the writer's own snapshot until its end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tallstore.engine.waiting import attempts
from tallstore.errors import StoreLockedError

__all__ = ["LOCK_BYTE", "holding_off", "register"]

#: Which byte of the data file is locked **[contract]**.
LOCK_BYTE: Final = 1 << 62
_SETLK: Final = getattr(fcntl, "F_OFD_SETLK", None) if sys.platform == "linux" else None
_SETLKW: Final = getattr(fcntl, "F_OFD_SETLKW", None)
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid
_REFUSED: Final = frozenset({errno.EAGAIN, errno.EACCES})
#: File systems without such locks.
_NO_LOCKS: Final = frozenset({errno.EINVAL, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})


def _lock(descriptor: int, command: int, kind: int) -> bool:
    """Whether the byte was locked; True, too, where nobody can lock it."""
    wanted = struct.pack(_FLOCK, kind, os.SEEK_SET, LOCK_BYTE, 1, 0)
    try:
        fcntl.fcntl(descriptor, command, wanted)
    except OSError as exc:
        if exc.errno in _REFUSED:
            return False
        if exc.errno not in _NO_LOCKS:
            raise
    return True


def register(descriptor: int) -> None:
    """Have writers see this reader, for as long as the descriptor of the data file is open."""
    if _SETLKW is not None:
        _lock(descriptor, _SETLKW, fcntl.F_RDLCK)


@contextmanager
def holding_off(path: Path, *, timeout: float) -> Iterator[None]:
    """Keep such readers from coming; the caller takes its snapshot meanwhile.

    Raises
    ------
    StoreLockedError
        One was there, and still is after `timeout` seconds.
    """
    if _SETLK is None:
        yield
        return
    told = (
        f"{path}: in use by a reader that may not write {path.name}-lock beside it (another user, "
        "or a read-only mount)"
    )
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        tries = attempts(timeout, lambda: told)
        if not any(_lock(descriptor, _SETLK, fcntl.F_WRLCK) for _ in tries):
            raise StoreLockedError(
                f"{told}, so that pages it reads cannot be told from free ones; close it and try "
                f"again, or wait longer than {timeout:g} s (timeout=). Nothing was changed"
            )
        yield
    finally:
        os.close(descriptor)
