"""Whether loops that numba compiles are used; it is optional.

Importing numba takes a moment, and so does compiling a loop, once a machine: it pays where many
weights are read or written, and where that is done often. So nobody imports it unasked: `load`
does, and from then on whoever has compiled loops beside those of numpy or torch takes them.
"""

from __future__ import annotations

import importlib
import sys
from typing import Final

__all__ = ["load", "loaded"]

_JIT: Final = "tallstore.jit"


def load() -> bool:
    """Use compiled loops from now on, where numba is installed; whether it is."""
    try:
        importlib.import_module(_JIT)
    except ImportError:
        return False
    return True


def loaded() -> bool:
    """Whether `load` was called, with success."""
    return _JIT in sys.modules
