"""Telling the kernel that mapped pages are done with.

A page of the map that was read counts as the process's memory until it is let go, and a process
that reads a whole store would seem to hold all of it. The pages stay in the page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Final

import numpy as np

__all__ = ["release_pages"]

#: Below this a call costs more than it gives back.
_WORTHWHILE: Final = 1 << 18
_DONTNEED: Final = 4  # Linux


def release_pages(value: memoryview) -> None:
    """Let go of the pages of a value in LMDB's read-only map; they can still be read again."""
    if len(value) < _WORTHWHILE or sys.platform != "linux":
        return
    address = np.frombuffer(value, np.uint8).ctypes.data
    start = address - address % mmap.PAGESIZE
    # Advice: where the kernel does not take it, nothing is lost.
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(address + len(value) - start), _DONTNEED
    )
