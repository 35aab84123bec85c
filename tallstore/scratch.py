"""Buffers that are used again and again."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

__all__ = ["Scratch"]


class Scratch(threading.local):
    """Buffers that each thread keeps: fresh memory costs more than the copy into it."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}

    def take(self, name: str, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes of the calling thread's buffer called `name`, content undefined.

        Whoever takes the same name on the same thread gets the same memory.
        """
        found = self._buffers.get(name)
        if found is None or found.size < size:
            found = self._buffers[name] = np.empty(size, np.uint8)
        return found[:size]
