"""Sparse and seeded codes on the CPU: only the touched weights are looked up, moved and rounded.

`tallstore.kernels.sparse_reference` and `seeded_reference` are the plain forms; these are tested to
give the same bits. They stay on the calling thread.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tallstore.kernels.seeded_reference import SeededCode, value_groups
from tallstore.kernels.sparse_reference import BLOCK, GROUP, SparseCode
from tallstore.seeding import support

__all__ = ["apply", "located", "restore", "switch"]

_Where = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]


def _where(code: SparseCode | SeededCode) -> _Where:
    """The touched weights."""
    if isinstance(code, SeededCode):
        parts = [support(tensor) + tensor.offset for tensor in code.tensors]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
    groups = np.arange(code.groups, dtype=np.int64) * GROUP
    at = np.repeat(groups, np.diff(code.starts.numpy()))
    at += code.entries.numpy().view(np.uint16) & np.uint16(GROUP - 1)
    return at


def _steps(code: SparseCode | SeededCode, at: _Where) -> _Floats:
    """The levels that are added to them."""
    if isinstance(code, SeededCode):
        return _seeded_steps(code)
    codes = code.entries.numpy().view(np.uint16) >> np.uint16(12)
    table = code.table.numpy()
    if code.rows is None:
        return np.take(table[0], codes)
    rows = code.rows.numpy()[at // BLOCK]
    found: _Floats = table[rows, codes]
    return found


def _seeded_steps(code: SeededCode) -> _Floats:
    table = code.table.numpy()
    parts = [np.take(table[row], _seeded_codes(code, row)) for row in range(len(code.tensors))]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _seeded_codes(code: SeededCode, number: int) -> npt.NDArray[np.uint8]:
    """Codes of the values of one of its tensors."""
    groups, start = code.tensors[number].groups, value_groups(code.tensors)[number]
    codes = np.zeros(groups, np.uint8)
    for k, plane in enumerate(code.planes.numpy()):
        codes |= np.unpackbits(plane[start // 8 :], count=groups, bitorder="little") << np.uint8(k)
    return codes


def located(code: SeededCode) -> SparseCode:
    """See `tallstore.ops.locate_seeded`; nothing is checked here."""
    order = sorted(range(len(code.tensors)), key=lambda n: code.tensors[n].offset)
    at, codes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint16)]
    rows = np.zeros(-(-code.weights // BLOCK), np.int32)
    for row, number in enumerate(order):
        tensor = code.tensors[number]
        at.append(support(tensor) + tensor.offset)
        codes.append(_seeded_codes(code, number).astype(np.uint16))
        rows[tensor.offset // BLOCK : -(-(tensor.offset + tensor.numel) // BLOCK)] = row
    places, values = np.concatenate(at), np.concatenate(codes)
    entries = (places & (GROUP - 1)).astype(np.uint16) | values << np.uint16(12)
    firsts = np.arange(-(-code.weights // GROUP) + 1) * GROUP
    return SparseCode(
        entries=torch.from_numpy(entries.view(np.int16)),
        starts=torch.from_numpy(np.searchsorted(places, firsts)),
        table=code.table[order],
        rows=None if len(order) == 1 else torch.from_numpy(rows),
        bits=code.bits,
        weights=code.weights,
    )


def _put(at: _Where, values: torch.Tensor, out: torch.Tensor) -> None:
    if out.dtype == torch.float32:
        out.numpy()[at] = values.numpy()
    else:
        out.index_copy_(0, torch.from_numpy(at), values.to(out.dtype))


def apply(code: SparseCode | SeededCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """See `tallstore.ops.apply_sparse`; nothing is checked here."""
    at = _where(code)
    values = base.index_select(0, torch.from_numpy(at)).float()
    values += torch.from_numpy(_steps(code, at))
    _put(at, values, out)


def restore(code: SparseCode | SeededCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """See `tallstore.ops.restore_sparse`; nothing is checked here."""
    at = _where(code)
    values = base.index_select(0, torch.from_numpy(at))
    _put(at, values.to(out.dtype), out)


def switch(
    old: SparseCode | SeededCode,
    new: SparseCode | SeededCode,
    base: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `tallstore.ops.switch_sparse`; nothing is checked here."""
    restore(old, base, out)
    apply(new, base, out)
