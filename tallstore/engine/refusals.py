"""What LMDB and the operating system raise, turned into errors that say what to do."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import lmdb

from tallstore.engine.filesystem import free_room
from tallstore.errors import (
    CorruptStoreError,
    NotAStoreError,
    OptionError,
    StoreFullError,
    StoreIOError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
    TallstoreError,
)

__all__ = ["MAP_SIZE", "MAX_READERS", "check_path", "lmdb_errors", "system_refusal"]

#: Address space, not disk; LMDB maps the file into it and never past its end.
MAP_SIZE: Final = 1 << 40
MAX_READERS: Final = 510
#: Bytes that a file system may keep for itself of the room it says is free.
_MARGIN: Final = 1 << 20


def check_path(path: Path) -> None:
    """Raise OptionError for a path that py-lmdb cannot take."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise OptionError(
            f"{shown}: no UTF-8, as the path of a store has to be; rename the file or directory"
        ) from None


@contextmanager
def lmdb_errors(path: Path, *, doing: str, needed: int | None = None) -> Iterator[None]:
    """Turn what LMDB and the operating system raise into errors that say what to do.

    Parameters
    ----------
    path
        The store's file.
    doing
        What was going on: "open", "write".
    needed
        Bytes that were about to be written.
    """
    try:
        yield
    except TallstoreError:  # some are OSErrors too
        raise
    except lmdb.Error as exc:
        raise _translated(exc, path, doing, needed) from exc
    except OSError as exc:
        raise system_refusal(exc.errno, path, doing, needed, str(exc)) from exc


def _translated(exc: lmdb.Error, path: Path, doing: str, needed: int | None) -> Exception:
    if isinstance(exc, lmdb.PanicError):
        return StoreIOError(
            f"{path}: cannot {doing}, an earlier write to it from this process failed half-way "
            "through; close every handle on it and open it again. What was stored before is intact"
        )
    if isinstance(exc, (lmdb.CorruptedError, lmdb.PageNotFoundError)):
        return CorruptStoreError(f"{path}: cannot {doing}, LMDB's tree is damaged: {exc}")
    if isinstance(exc, (lmdb.InvalidError, lmdb.VersionMismatchError)):
        return NotAStoreError(f"{path}: cannot {doing}, not an LMDB file of this version: {exc}")
    if isinstance(exc, lmdb.ReadersFullError):
        return StoreLockedError(
            f"{path}: cannot {doing}, all {MAX_READERS} reader slots are taken; close readers"
        )
    if isinstance(exc, lmdb.ReadonlyError):
        return StoreReadOnlyError(f"{path}: cannot {doing}, it was opened read-only")
    if "already open in this process" in str(exc):
        return StoreLockedError(
            f"{path}: cannot {doing}, a file that was at this path before, and was deleted or "
            "moved, is still open in this process; close the handles on it first"
        )
    # py-lmdb puts LMDB's return code, an errno for system errors, at the end of the text only
    # for some classes; `code` is there from 2.0 on.
    code = getattr(exc, "code", 0)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO):
        if code == number or os.strerror(number) in str(exc):
            return system_refusal(number, path, doing, needed, str(exc))
    if isinstance(exc, lmdb.MapFullError):
        return StoreFullError(f"{path}: cannot {doing}, the map of {MAP_SIZE} bytes is full")
    return StoreIOError(f"{path}: cannot {doing}: {exc}")


def system_refusal(
    number: int | None, path: Path, doing: str, needed: int | None, text: str
) -> TallstoreError:
    """The refusal for an error number of the operating system; the rest as for `lmdb_errors`."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or _is_full(number, path, needed):
        return _full(number, path, doing, needed)
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return StoreReadOnlyError(f"{path}: cannot {doing}, no permission ({text})")
    if number == errno.ENOENT:
        return StoreNotFoundError(f"{path}: no such file or directory")
    return StoreIOError(f"{path}: cannot {doing}: {text}")


def _full(number: int | None, path: Path, doing: str, needed: int | None) -> StoreFullError:
    """What was full, how much room was wanted, and how much there was."""
    room = [f"about {needed} more bytes are needed"] if needed else []
    cause, cure = "no space left on the device", "Free some space and try again"
    free = free_room(path.parent)
    if number == errno.EDQUOT:
        cause = "the quota is used up"
    elif number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        cause, cure = "the file may not grow so long", "Raise the limit (ulimit -f) and try again"
        if limit != resource.RLIM_INFINITY:
            room.append(f"a file may have {limit}")
    elif free is not None:
        room.append(f"{free} are free")
    told = f" ({', '.join(room)})" if room else ""
    return StoreFullError(
        f"{path}: cannot {doing}, {cause}{told}; what was stored before is intact. {cure}"
    )


def _is_full(number: int | None, path: Path, needed: int | None) -> bool:
    """Whether an input/output error is a full disk: LMDB says so where a write came short."""
    if number != errno.EIO:
        return False
    free = free_room(path.parent)
    return free is not None and free < (needed or 0) + _MARGIN
