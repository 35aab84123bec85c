"""The CPU's compiled path: what `ops.jit` has, for torch's tensors. Needs numba, which is optional.

Importing numba takes about half a second, and compiling a loop as long, once a machine: it pays
where many weights are written, and where they are written often. So nobody imports it unasked:
`load` does, and from then on the CPU path is this one. float16 is left to `ops.cpu`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from tallstore.kernels.seeded_reference import SeededCode, value_groups
from tallstore.kernels.sparse_reference import SparseCode

__all__ = [
    "apply",
    "array",
    "like",
    "load",
    "loaded",
    "loops",
    "places",
    "reconstruct",
    "restore",
    "switch",
    "takes",
]

_JIT: Final = "tallstore.ops.jit"
_DTYPES: Final = (torch.float32, torch.bfloat16)
_LOW: Final = 0xFFFFFFFF
_NO_ROWS: Final = np.zeros(0, np.int32)
_NO_PLANE: Final = np.zeros(0, np.uint8)


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


def takes(*tensors: torch.Tensor | None) -> bool:
    """Whether there are loops for the dtypes of some weights."""
    return all(tensor is None or tensor.dtype in _DTYPES for tensor in tensors)


def loops() -> Any:
    """`ops.jit`, which must be loaded."""
    return importlib.import_module(_JIT)


def like(weights: torch.Tensor) -> npt.NDArray[Any]:
    """An array of no weights that has the dtype which loops know some by."""
    return array(weights.detach()[:0])


def array(weights: torch.Tensor) -> npt.NDArray[Any]:
    """Weights as loops take them."""
    if weights.dtype == torch.bfloat16:
        weights = weights.view(torch.uint16)
    return weights.numpy()


def reconstruct(
    base: torch.Tensor,
    planes: torch.Tensor | None,
    vector: torch.Tensor | None,
    levels: Sequence[float],
    out: torch.Tensor,
) -> None:
    """See `tallstore.ops.reconstruct`; nothing is checked here, and no thread is started."""
    if planes is None or not base.numel():
        out.copy_(base)
        return
    one, two = array(base), None if vector is None else array(vector)
    bits = [plane.numpy() for plane in planes]
    if len(bits) == 1:
        low, high = map(np.float32, levels)
        loops().one_plane(one, bits[0], two, low, high, array(out))
        return
    table = np.zeros(16, np.float32)
    table[: len(levels)] = levels
    if len(bits) == 2:
        loops().two_planes(one, *bits, two, table, array(out))
        return
    bits += [_NO_PLANE] * (4 - len(bits))
    loops().four_planes(one, *bits, two, table, array(out))


def apply(code: SparseCode | SeededCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """See `tallstore.ops.apply_sparse`; nothing is checked here."""
    _apply(code, array(base), array(out))


def restore(code: SparseCode | SeededCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """See `tallstore.ops.restore_sparse`; nothing is checked here."""
    if isinstance(code, SparseCode):
        loops().sparse_restore(*_entries(code), array(base), array(out))
        return
    for place in places(code):
        loops().seeded_restore(*place, array(base), array(out))


def switch(
    old: SparseCode | SeededCode,
    new: SparseCode | SeededCode,
    base: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `tallstore.ops.switch_sparse`; nothing is checked here."""
    # What is restored is the base: reading it where it is written spares reading it elsewhere.
    one, two = array(base), array(out)
    source = two if base.dtype == out.dtype else one
    if isinstance(old, SparseCode) and isinstance(new, SparseCode):
        loops().sparse_switch(*_entries(old), *_entries(new), *_levels(new), one, source, two)
        return
    if isinstance(old, SeededCode) and isinstance(new, SeededCode) and old.tensors == new.tensors:
        _apply(new, one, two)
        return
    restore(old, base, out)
    _apply(new, source, two)


def _apply(code: SparseCode | SeededCode, source: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    if isinstance(code, SparseCode):
        loops().sparse_apply(*_entries(code), *_levels(code), source, out)
        return
    planes, table = code.planes.numpy(), code.table.numpy()
    starts = value_groups(code.tensors)
    for place, start, levels in zip(places(code), starts, table, strict=False):
        loops().seeded_apply(*place, start, planes, levels, source, out)


def _entries(code: SparseCode) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
    return code.entries.numpy().view(np.uint16), code.starts.numpy()


def _levels(code: SparseCode) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    return code.table.numpy(), _NO_ROWS if code.rows is None else code.rows.numpy()


def places(code: SeededCode) -> Iterable[tuple[int, int, int, int, int]]:
    """Of each tensor: offset, numel, stride, key."""
    index = code.index.numpy()
    for tensor, both in zip(code.tensors, index[:, 4].tolist(), strict=True):
        yield tensor.offset, tensor.numel, tensor.stride, both & _LOW, both >> 32 & _LOW
