"""Telling the kernel what is coming.

Advice: where the kernel does not take it, nothing is lost.

A page of the map that was read counts as the process's memory until it is let go, and a process
that reads a whole store would seem to hold all of it. The pages stay in the page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["prefer_huge_pages", "release_pages", "start_writeback"]

#: Below this a call costs more than it gives back.
_WORTHWHILE: Final = 1 << 15
#: From here on large pages are asked for.
_HUGE: Final = 1 << 22
_HUGE_PAGE: Final = 1 << 21
_HUGEPAGE: Final = 14  # MADV_HUGEPAGE on Linux
_DONTNEED: Final = 4  # MADV_DONTNEED on Linux
_WRITE: Final = 2  # SYNC_FILE_RANGE_WRITE


def release_pages(value: npt.NDArray[np.uint8]) -> None:
    """Let go of the pages of a value in LMDB's read-only map; they can still be read again."""
    if value.size < _WORTHWHILE or sys.platform != "linux":
        return
    address = value.ctypes.data
    start = address - address % mmap.PAGESIZE
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(address + value.size - start), _DONTNEED
    )


def start_writeback(descriptor: int) -> None:
    """Have the disk begin on what was written to a file, so that the sync at the end is short."""
    if sys.platform == "linux":
        whole = ctypes.c_int64(0)
        ctypes.CDLL(None).sync_file_range(descriptor, whole, whole, ctypes.c_uint(_WRITE))


def prefer_huge_pages(memory: npt.NDArray[np.uint8]) -> None:
    """Have fresh memory come in large pages: touching it small page by small page costs more."""
    if memory.size >= _HUGE and sys.platform == "linux":
        start = -(-memory.ctypes.data // _HUGE_PAGE) * _HUGE_PAGE
        size = (memory.ctypes.data + memory.size - start) // _HUGE_PAGE * _HUGE_PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _HUGEPAGE)
