"""Compiled loops over many tensors in one call, for threads that share the work.

Between two calls a thread needs the interpreter, which all threads share: over a hundred tensors
the waiting took as long as the work. Here the calls are listed as rows of numbers, addresses among
them, and each thread works off rows in one call, one after the other, until none is left: so all
of them end at about the same time, whatever a row takes. One tensor is a list of one.

Addresses are only as good as what they are of: whoever makes a program holds on to its tensors,
which are contiguous, as `ops.checks` sees to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from tallstore.kernels.seeded_reference import SeededCode, value_groups
from tallstore.kernels.sparse_reference import BLOCK, GROUP, SparseCode
from tallstore.ops import compiled

__all__ = [
    "PIECE",
    "POSITIONS",
    "Applied",
    "Kept",
    "Planes",
    "Start",
    "Touches",
    "Words",
    "Work",
    "apply",
    "located",
    "reconstruct",
    "restore",
    "switch",
    "words",
]

#: Memory for what lies under sparse codes.
Kept = npt.NDArray[np.uint8]
#: Numbers of tensors in one program, and in another.
_Both = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]

#: What each of the threads calls that share some work: it does what is left until nothing is. The
#: work is done when all that called it have returned.
Work = Callable[[], int]

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
#: Weights of a tensor that a thread does at a time, of sparse codes: whole tiles of `ops.jit`.
PIECE: Final = 1 << 17
#: Columns of a row of `Planes`: what must be the same for weights to be, then what they are of.
_ALIKE: Final = [0, 1, 3, 4, 5]
_OUT: Final = 5
_PLANES: Final = 6
_THERE: Final = 10
#: Bytes from which on weights are written past the caches: no cache would hold them.
_PAST: Final = 1 << 25
_LOW: Final = 0xFFFFFFFF
_NO_CODE: Final = np.zeros((0, _CODE), np.int64)
_OCTETS: Final = np.zeros(0, np.uint8)
_SHORTS: Final = np.zeros(0, np.uint16)
_INTS: Final = np.zeros(0, np.int32)
_LONGS: Final = np.zeros(0, np.int64)
_FLOATS: Final = np.zeros(0, np.float32)


class Planes:
    """`reconstruct` of many tensors: base + levels[code] * vector.

    Parameters
    ----------
    parts
        (base, planes, vector, row of `levels`, out) of each; `compiled.takes` the weights, all of
        the same dtypes, planes uint8, shape (K, at least ceil(n / 8)). They are held on to.
    levels
        float32, shape (R, 2**K).
    """

    def __init__(
        self,
        parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, torch.Tensor]],
        levels: torch.Tensor,
    ) -> None:
        self._held = parts
        self._levels = np.zeros((levels.shape[0], 16), np.float32)
        self._levels[:, : levels.shape[1]] = levels.numpy()
        rows = np.zeros((len(parts), 11), np.int64)
        for row, (base, planes, vector, level, out) in zip(rows, parts, strict=True):
            count = planes.shape[0]
            row[:6] = (
                base.numel(), count, level, base.data_ptr(),
                0 if vector is None else vector.data_ptr(), out.data_ptr(),
            )  # fmt: skip
            row[_PLANES : _PLANES + count] = planes.data_ptr() + planes.stride(0) * np.arange(count)
        self._addresses = [part[-1].data_ptr for part in parts]
        self._outs: list[int] = rows[:, _OUT].tolist()
        self._rows = rows
        self._since: WeakKeyDictionary[Planes, npt.NDArray[np.int64]] = WeakKeyDictionary()
        self._past = sum(part[-1].nbytes for part in parts) >= _PAST
        base, _, vector, _, out = parts[0]
        self._like = (
            compiled.like(base),
            None if vector is None else compiled.like(vector),
            compiled.like(out),
        )

    def since(self, before: Planes | None) -> None:
        """From now on leave alone what another one wrote into the same weights, just as they are.

        Parameters
        ----------
        before
            What the weights are by; None: nobody knows.
        """
        if before is None:
            self._rows[:, _THERE] = 0
            return
        if before not in self._since:
            self._since[before] = self._shared(before)
        self._rows[:, _THERE] = self._since[before]

    def _shared(self, before: Planes) -> npt.NDArray[np.int64]:
        """By row the plane that `before` wrote the same weights by, or 0."""
        rows = self._rows
        order = np.argsort(before._rows[:, _OUT])
        at = np.searchsorted(before._rows[order, _OUT], rows[:, _OUT])
        other = before._rows[order[np.minimum(at, order.size - 1)]]
        # The same levels, bit for bit: -0.0 is another than 0.0.
        mine, its = (
            program._levels.view(np.int32)[number[:, 2]]
            for program, number in ((self, rows), (before, other))
        )
        same = (rows[:, _ALIKE] == other[:, _ALIKE]).all(1) & (mine == its).all(1)
        same &= rows[:, 1] == 1
        return np.where(same, other[:, _PLANES], 0)

    def valid(self) -> bool:
        """Whether all weights are where they were: `Tensor.share_memory_`, for one, moves them."""
        return self._outs == [address() for address in self._addresses]

    def start(self) -> Work:
        """The work of writing all parts; gives how many weights it left alone, see `since`."""
        run, tickets = compiled.loops().run_planes, _tickets()

        def work() -> int:
            found = run(self._rows, self._levels, *self._like, _OCTETS, self._past, tickets)
            return int(found)

        return work


def _tickets() -> npt.NDArray[np.int64]:
    """What threads draw: the number of the next row, which no other one gets."""
    return np.zeros(1, np.int64)


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
    compiled.loops().locate(
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
        self._numbers = {key: n for n, key in enumerate(map(tuple, tensors[:, _WHERE].tolist()))}
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
            at = [other._numbers.get(key, -1) for key in self._numbers]
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
        bare = [one.by for one in before if not len(one.by._rows)]
        if not len(self._rows) and sum(len(self._shared(by)[0]) for by in bare) == len(self._outs):
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
        run, tickets = compiled.loops().run_touches, _tickets()
        like = (_OCTETS, _SHORTS, _INTS, _LONGS, _FLOATS)

        def work() -> int:
            run(tensors, self._pieces, olds, self._rows, *self._like, *like, tickets)
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


# -- one tensor: the same operations as `ops.cpu` and `ops.cpu_sparse` have -------------------


def reconstruct(
    base: torch.Tensor,
    planes: torch.Tensor,
    vector: torch.Tensor | None,
    levels: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `tallstore.ops.reconstruct`, with one row of levels; nothing is checked here."""
    Planes([(base, planes, vector, 0, out)], levels).start()()


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
