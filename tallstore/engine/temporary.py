"""Temporary names: claimed by a flock, so that what killed writers left can be told and removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path

__all__ = ["claimed", "remove_stale"]


def claimed(path: Path) -> int | None:
    """Claim a file or directory just made; the descriptor that holds the claim until it is closed.

    Returns
    -------
    int or None
        None if another process took it for stale in between, and it is gone: make another.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Where there are no locks nothing is ever taken for stale, either.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def remove_stale(directory: Path, pattern: str) -> None:
    """Remove the files and directories of these names that nobody has claimed.

    Parameters
    ----------
    directory
        Where they are.
    pattern
        A regular expression for the whole name.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            if re.fullmatch(pattern, name):
                _remove(directory / name)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        finally:
            os.close(descriptor)
