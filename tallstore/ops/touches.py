"""Sparse codes over the base, of many tensors in one call: see `ops.programs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from tallstore.kernels.seeded_reference import SeededCode, value_groups
from tallstore.kernels.sparse_reference import BLOCK, GROUP, SparseCode
from tallstore.ops import compiled
from tallstore.ops.programs import Work, tickets

__all__ = [
    "PIECE",
    "POSITIONS",
    "Applied",
    "Kept",
    "Start",
    "Touches",
    "Words",
    "apply",
    "located",
    "restore",
    "switch",
    "words",
]

#: Memory for what lies under sparse codes.
Kept = npt.NDArray[np.uint8]
#: Numbers of tensors in one program, and in another.
_Both = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]

#: What the first number of a code's row says: a sparse code, or a tensor of a seeded one.
POSITIONS, VALUES = range(2)
#: Numbers of a code's row, and of a tensor's.
_CODE: Final = 12
_TENSOR: Final = 13
#: Of a tensor's: what tells which it is; whether all of it is written first; the rows of the code
#: before, and of its own; address and weights of what lies under either.
_WHERE: Final = [0, 1, 3]
_COPIED: Final = 4
_OLD: Final = 5
_FIRST, _STOP = 7, 8
_BEFORE: Final = 9
_UNDER: Final = 11
#: Weights of a tensor that a thread does at a time, of sparse codes: whole groups.
PIECE: Final = 1 << 17
_LOW: Final = 0xFFFFFFFF
_NO_CODE: Final = np.zeros((0, _CODE), np.int64)
#: What gives the loops dtypes.
_OCTETS: Final = np.zeros(0, np.uint8)
_SHORTS: Final = np.zeros(0, np.uint16)
_INTS: Final = np.zeros(0, np.int32)
_LONGS: Final = np.zeros(0, np.int64)
_FLOATS: Final = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """A sparse or seeded code as the loops take it; the code must be held on to."""

    rows: npt.NDArray[np.int64]
    """A row of a sparse code, one a tensor of a seeded one, in the order of their weights."""
    touched: int
    """Weights."""
    levels: torch.Tensor
    """Of the rows; held on to."""


def words(code: SparseCode | SeededCode) -> Words:
    """What `Touches` takes of a code; worked out once, since to ask over again takes a while."""
    if isinstance(code, SparseCode):
        rows, table = _INTS if code.rows is None else code.rows, code.table
        row = (
            POSITIONS, code.entries.data_ptr(), code.entries.numel(),
            code.starts.data_ptr(), code.starts.numel(),
            0 if code.rows is None else code.rows.data_ptr(), len(rows),
            *table.shape, 0, table.data_ptr(), 0,
        )  # fmt: skip
        return Words(np.array([row], np.int64), code.entries.numel(), table)
    order = sorted(range(len(code.tensors)), key=lambda n: code.tensors[n].offset)
    starts, keys, planes = value_groups(code.tensors), code.index[:, 4].tolist(), code.planes
    table, touched, found = code.table[order], 0, []
    for n in order:
        tensor, both = code.tensors[n], keys[n]
        found.append((
            VALUES, tensor.offset, tensor.numel, tensor.stride, both & _LOW, both >> 32 & _LOW,
            starts[n], planes.data_ptr(), *planes.shape, table.data_ptr(), touched,
        ))  # fmt: skip
        touched += tensor.groups
    return Words(np.array(found, np.int64).reshape(-1, _CODE), touched, table)


def located(code: SeededCode) -> SparseCode:
    """See `tallstore.ops.locate_seeded`; nothing is checked here."""
    mine = words(code)
    entries = np.empty(mine.touched, np.uint16)
    starts = np.empty(-(-code.weights // GROUP) + 1, np.int64)
    rows = np.empty(-(-code.weights // BLOCK), np.int32)
    compiled.loops("touchloops").locate(
        mine.rows, 0, len(mine.rows), 0, code.weights, _OCTETS, entries, starts, rows
    )
    return SparseCode(
        entries=torch.from_numpy(entries.view(np.int16)),
        starts=torch.from_numpy(starts),
        table=mine.levels,
        rows=None if len(mine.levels) == 1 else torch.from_numpy(rows),
        bits=code.bits,
        weights=code.weights,
    )


class Touches:
    """Sparse codes over the base, of many tensors: applied, whatever of that kind was there before.

    Parameters
    ----------
    parts
        (code, or None for the base itself; base; out) of each, as `ops.apply_sparse` has them;
        `compiled.takes` the weights, all of the same dtypes. They are held on to.
    """

    def __init__(
        self, parts: Sequence[tuple[SparseCode | SeededCode | None, torch.Tensor, torch.Tensor]]
    ) -> None:
        codes = [None if code is None else words(code) for code, _, _ in parts]
        self._held = parts, codes
        self._rows = np.concatenate([_NO_CODE, *(c.rows for c in codes if c is not None)])
        tensors = np.zeros((len(parts), _TENSOR), np.int64)
        first = touched = 0
        for row, mine, (_, base, out) in zip(tensors, codes, parts, strict=True):
            at, to = base.data_ptr(), out.data_ptr()
            # The base may be read where it is written, which spares reading it elsewhere.
            row[:4] = base.numel(), at, to if base.dtype == out.dtype else at, to
            row[_FIRST : _STOP + 1] = first, first if mine is None else first + len(mine.rows)
            row[_UNDER + 1] = 0 if mine is None else mine.touched
            first, touched = row[_STOP], touched + row[_UNDER + 1]
        self._tensors = tensors
        self._addresses = [part[-1].data_ptr for part in parts]
        self._outs: list[int] = tensors[:, 3].tolist()
        # Tensors of no weights have one key in common.
        self._keys = list(map(tuple, tensors[:, _WHERE].tolist()))
        self._numbers = {key: n for n, key in enumerate(self._keys)}
        self._pieces = np.zeros(len(parts) + 1, np.int64)
        np.cumsum(-(-tensors[:, 0] // PIECE), out=self._pieces[1:])
        self._size = parts[0][-1].element_size()
        self._places = np.cumsum(tensors[:, _UNDER + 1]) - tensors[:, _UNDER + 1]
        self._from: WeakKeyDictionary[Touches, _Both] = WeakKeyDictionary()
        self._like = compiled.like(parts[0][1]), compiled.like(parts[0][2])
        #: Bytes of what lies under the codes.
        self.under = int(touched) * self._size
        # Read and written; of codes, what is kept of the weights too.
        self._all = tensors[:, 0] * sum(tensor.element_size() for tensor in parts[0][1:])
        self._some = 2 * tensors[:, _UNDER + 1] * self._size
        for n, (code, _, _) in enumerate(parts):
            self._some[n] += 0 if code is None else code.nbytes

    def valid(self) -> bool:
        """Whether all weights are where they were: `Tensor.share_memory_`, for one, moves them."""
        return self._outs == [address() for address in self._addresses]

    def _shared(self, other: Touches) -> _Both:
        """Which tensors are tensors of another one, and which ones there."""
        if other not in self._from:
            at = [other._numbers.get(key, -1) for key in self._keys]
            mine = np.flatnonzero(np.array(at) >= 0)
            self._from[other] = mine, np.array(at)[mine]
        return self._from[other]

    def start(self, before: Sequence[Applied] = (), kept: Kept | None = None) -> Start | None:
        """The work of writing all parts; None where there is nothing to do.

        Parameters
        ----------
        before
            What is in the tensors. Those that it says nothing of are written whole.
        kept
            Takes what lies under the codes, so that it need not be looked up in the base when they
            are taken back: `under` bytes. None: it is not kept.
        """
        if not len(self._rows):
            there = self._tensors[:, 0] == 0
            for one in before:
                if not len(one.by._rows):
                    there[self._shared(one.by)[0]] = True
            if there.all():
                return None
        tensors = self._tensors.copy()
        tensors[:, _COPIED] = 1
        olds, first, moved = [_NO_CODE], 0, int(self._some.sum())
        for one in before:
            mine, its = self._shared(one.by)
            tensors[mine, _COPIED] = 0
            there = one.by._tensors[its]
            tensors[mine, _OLD : _OLD + 2] = first + there[:, _FIRST : _STOP + 1]
            if one.kept is not None:
                tensors[mine, _BEFORE : _BEFORE + 2] = one.by._under(one.kept)[its]
            olds.append(one.by._rows)
            first, moved = first + len(one.by._rows), moved + int(one.by._some[its].sum())
        moved += int(self._all[tensors[:, _COPIED] == 1].sum())
        if kept is not None:
            tensors[:, _UNDER : _UNDER + 2] = self._under(kept)
        else:
            tensors[:, _UNDER : _UNDER + 2] = 0
        return Start(self._work(tensors, np.concatenate(olds)), moved)

    def alone(self) -> Work:
        """The work of applying the codes and leaving all else as it is, whatever that is."""
        tensors = self._tensors.copy()
        tensors[:, 2], tensors[:, _UNDER : _UNDER + 2] = tensors[:, 1], 0
        return self._work(tensors, _NO_CODE)

    def _under(self, kept: Kept) -> npt.NDArray[np.int64]:
        """Address and weights of what lies under the codes of each tensor."""
        counts = self._tensors[:, _UNDER + 1]
        return np.stack((kept.ctypes.data + self._places * self._size, counts), axis=1)

    def _work(self, tensors: npt.NDArray[np.int64], olds: npt.NDArray[np.int64]) -> Work:
        run, drawn = compiled.loops("touchloops").run_touches, tickets()
        like = (_OCTETS, _SHORTS, _INTS, _LONGS, _FLOATS)

        def work() -> int:
            run(tensors, self._pieces, olds, self._rows, *self._like, *like, drawn)
            return 0

        return work


@dataclass(frozen=True, slots=True)
class Applied:
    """What is in some tensors."""

    by: Touches
    kept: Kept | None = None
    """What lies under its codes; see `Touches.start`."""


@dataclass(frozen=True, slots=True)
class Start:
    """Some work."""

    work: Work
    moved: int
    """Bytes that it reads and writes."""


# -- one tensor: the same operations as `ops.cpu_sparse` has ----------------------------------


def apply(code: SparseCode | SeededCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """See `tallstore.ops.apply_sparse`; nothing is checked here."""
    Touches([(code, base, out)]).alone()()


def restore(code: SparseCode | SeededCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """See `tallstore.ops.restore_sparse`; nothing is checked here."""
    _touch(code, None, base, out)


def switch(
    old: SparseCode | SeededCode,
    new: SparseCode | SeededCode,
    base: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `tallstore.ops.switch_sparse`; nothing is checked here."""
    _touch(old, new, base, out)


def _touch(
    old: SparseCode | SeededCode,
    new: SparseCode | SeededCode | None,
    base: torch.Tensor,
    out: torch.Tensor,
) -> None:
    before = Applied(Touches([(old, base, out)]))
    start = Touches([(new, base, out)]).start([before])
    if start is not None:
        start.work()
