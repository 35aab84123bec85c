"""Whether the CPU's weights are written by loops that numba compiles (`ops.jit`); it is optional.

Importing numba takes a moment, and so does compiling a loop, once a machine: it pays where many
weights are written, and where they are written often. So nobody imports it unasked: `load` does,
and from then on the CPU path is `ops.programs`. float16 is left to `ops.cpu`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["like", "load", "loaded", "loops", "takes"]

_JIT: Final = "tallstore.ops.jit"
#: What loops know weights by: bfloat16 ones are their bits.
_KNOWN: Final = {torch.float32: np.float32, torch.bfloat16: np.uint16}


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


def loops() -> Any:
    """`ops.jit`, which must be loaded."""
    return importlib.import_module(_JIT)


def takes(*tensors: torch.Tensor | None) -> bool:
    """Whether there are loops for the dtypes of some weights."""
    return all(tensor is None or tensor.dtype in _KNOWN for tensor in tensors)


def like(weights: torch.Tensor) -> npt.NDArray[Any]:
    """An array of no weights that has the dtype which loops know some by."""
    return np.zeros(0, _KNOWN[weights.dtype])
