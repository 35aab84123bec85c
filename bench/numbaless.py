"""Running something as if numba were not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tallstore import compiling

__all__ = ["without_numba"]


@contextmanager
def without_numba() -> Iterator[None]:
    """For the length of a block no compiled loop is loaded, or used."""
    kept = compiling.load, compiling.loaded
    compiling.load = compiling.loaded = lambda: False
    try:
        yield
    finally:
        compiling.load, compiling.loaded = kept
