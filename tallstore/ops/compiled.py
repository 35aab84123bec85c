"""Where the compiled loops are, and what they know weights by. float16 is left to `ops.cpu`.

Whether the CPU's weights are written by them is said by `tallstore.compiling`; where they are, its
paths are `ops.programs` and `ops.touches`.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["like", "loops", "takes"]

#: What loops know weights by: bfloat16 ones are their bits.
_KNOWN: Final = {torch.float32: np.float32, torch.bfloat16: np.uint16}


def loops(name: str) -> Any:
    """A module of loops; `compiling` must be loaded."""
    return importlib.import_module(f"tallstore.ops.{name}")


def takes(*tensors: torch.Tensor | None) -> bool:
    """Whether there are loops for the dtypes of some weights."""
    return all(tensor is None or tensor.dtype in _KNOWN for tensor in tensors)


def like(weights: torch.Tensor) -> npt.NDArray[Any]:
    """An array of no weights that has the dtype which loops know some by."""
    return np.zeros(0, _KNOWN[weights.dtype])
