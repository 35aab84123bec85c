"""Telling the kernel what is coming, and asking it for room and pages.

Advice: where the kernel does not take it, nothing is lost. What it must answer for is asked
through it too: touching memory that has no page behind it kills the process.

A page of the map that was read counts as the process's memory until it is let go, and a process
that reads a whole store would seem to hold all of it. The pages stay in the page cache.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "fault_in",
    "prefer_huge_pages",
    "release_pages",
    "reserve",
    "start_writeback",
]

#: Below this a call costs more than it gives back.
_WORTHWHILE: Final = 1 << 15
#: From here on large pages are asked for.
_HUGE: Final = 1 << 22
_HUGE_PAGE: Final = 1 << 21
_HUGEPAGE: Final = 14  # MADV_HUGEPAGE on Linux
_DONTNEED: Final = 4  # MADV_DONTNEED on Linux
_POPULATE_READ: Final = 22  # MADV_POPULATE_READ on Linux, from 5.14 on
_WRITE: Final = 2  # SYNC_FILE_RANGE_WRITE
#: What madvise answers where a touch would raise SIGBUS: past the end of the file, an unreadable
#: device, failed memory.
_UNREADABLE: Final = frozenset({errno.EFAULT, errno.EIO, 133})  # EHWPOISON


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def release_pages(value: npt.NDArray[np.uint8]) -> None:
    """Let go of the pages of a value in LMDB's read-only map; they can still be read again."""
    if value.size < _WORTHWHILE or sys.platform != "linux":
        return
    address = value.ctypes.data
    start = address - address % mmap.PAGESIZE
    _libc().madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(address + value.size - start), _DONTNEED
    )


def fault_in(value: memoryview) -> None:
    """Have the pages of a value in LMDB's map read, so that touching them is safe.

    Raises
    ------
    OSError
        EIO: the device does not give them, or the file ends before them.
    """
    if sys.platform != "linux" or not value.nbytes:
        return
    address = np.frombuffer(value, np.uint8).ctypes.data
    start = address - address % mmap.PAGESIZE
    size = ctypes.c_size_t(address + value.nbytes - start)
    refused = _libc().madvise(ctypes.c_void_p(start), size, _POPULATE_READ)
    if refused and ctypes.get_errno() in _UNREADABLE:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def reserve(descriptor: int, size: int) -> None:
    """Have the file system set `size` bytes of a file aside; it is made that long if it is shorter.

    Raises
    ------
    OSError
        There is no room. Nothing is raised where the file system cannot set room aside.
    """
    if sys.platform != "linux":
        return
    fallocate = _libc().fallocate
    if fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(number, os.strerror(number))


def start_writeback(descriptor: int) -> None:
    """Have the disk begin on what was written to a file, so that the sync at the end is short."""
    if sys.platform == "linux":
        whole = ctypes.c_int64(0)
        _libc().sync_file_range(descriptor, whole, whole, ctypes.c_uint(_WRITE))


def prefer_huge_pages(memory: npt.NDArray[np.uint8]) -> None:
    """Have fresh memory come in large pages: touching it small page by small page costs more."""
    if memory.size >= _HUGE and sys.platform == "linux":
        start = -(-memory.ctypes.data // _HUGE_PAGE) * _HUGE_PAGE
        size = (memory.ctypes.data + memory.size - start) // _HUGE_PAGE * _HUGE_PAGE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _HUGEPAGE)
