"""Compiled loops over many tensors in one call, for threads that share the work.

Between two calls a thread needs the interpreter, which all threads share: over a hundred tensors
the waiting took as long as the work. Here the calls are listed as rows of numbers, addresses among
them, and each thread works off rows in one call, one after the other, until none is left: so all
of them end at about the same time, whatever a row takes. One tensor is a list of one.

Addresses are only as good as what they are of: whoever makes a program holds on to its tensors,
which are contiguous, as `ops.checks` sees to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from tallstore.kernels.seeded_reference import SeededCode, value_groups
from tallstore.kernels.sparse_reference import SparseCode
from tallstore.ops import compiled

__all__ = [
    "APPLY",
    "APPLY_SEEDED",
    "RESTORE",
    "RESTORE_SEEDED",
    "SWITCH",
    "Planes",
    "Touches",
    "Words",
    "Work",
    "apply",
    "reconstruct",
    "restore",
    "switch",
    "words",
]

#: A code as rows of numbers: one of a sparse code, one a tensor of a seeded one.
Words = tuple[tuple[int, ...], ...]

#: What each of the threads calls that share some work: it does what is left until nothing is. The
#: work is done when all that called it have returned.
Work = Callable[[], int]

#: What a row of `Touches` asks for.
RESTORE, APPLY, SWITCH, RESTORE_SEEDED, APPLY_SEEDED = range(5)
#: Numbers of a sparse code, and of a tensor of a seeded one.
_POSITIONS: Final = 9
_SEEDED: Final = 10
#: Numbers of a row of `Touches`.
_WIDTH: Final = 23
#: Columns of a row of `Planes`: what must be the same for weights to be, then what they are of.
_ALIKE: Final = [0, 1, 3, 4, 5]
_OUT: Final = 5
_PLANES: Final = 6
_THERE: Final = 10
#: Bytes from which on weights are written past the caches: no cache would hold them.
_PAST: Final = 1 << 25
_LOW: Final = 0xFFFFFFFF
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


def words(code: SparseCode | SeededCode) -> Words:
    """What `Touches` takes of a code, worked out once; the code must be held on to."""
    if isinstance(code, SparseCode):
        rows = _INTS if code.rows is None else code.rows
        return ((
            code.entries.data_ptr(), code.entries.numel(),
            code.starts.data_ptr(), code.starts.numel(),
            code.table.data_ptr(), *code.table.shape,
            0 if code.rows is None else code.rows.data_ptr(), len(rows),
        ),)  # fmt: skip
    planes, table = code.planes, code.table
    starts = value_groups(code.tensors)
    return tuple(
        (*place, start, planes.data_ptr(), *planes.shape, levels.data_ptr())
        for place, start, levels in zip(_places(code), starts, table, strict=False)
    )


class Touches:
    """Restoring, applying and switching sparse codes of many tensors."""

    def __init__(self) -> None:
        self._ends: list[int] = [0]
        self._rows: list[tuple[int, ...]] = []
        self._like: tuple[Any, ...] = ()

    def add(
        self, old: Words | None, new: Words | None, base: torch.Tensor, out: torch.Tensor
    ) -> None:
        """One tensor: take back `old`, if there is one, then apply `new`, if there is one.

        The weights have the dtypes of those added first. What the words were made from, and the
        tensors, must be held on to by the caller.
        """
        self._like = self._like or (compiled.like(base), compiled.like(out))
        there = base.numel(), base.data_ptr(), base.data_ptr(), out.data_ptr()
        # What was restored is the base: reading it where it is written spares reading the other.
        again = there if base.dtype != out.dtype else (*there[:2], *there[3:], *there[3:])
        if old is not None and new is not None and _is_sparse(old) and _is_sparse(new):
            self._row(SWITCH, again, (*old[0], *new[0]))
        else:
            moved = old is not None and (new is None or not _same_places(old, new))
            for row in old if old is not None and moved else ():
                self._row(RESTORE if _is_positions(row) else RESTORE_SEEDED, there, row)
            for row in new or ():
                kind = APPLY if _is_positions(row) else APPLY_SEEDED
                self._row(kind, again if moved else there, row)
        self._ends.append(len(self._rows))

    def _row(self, kind: int, where: tuple[int, ...], rest: tuple[int, ...]) -> None:
        row = (kind, *where, *rest)
        self._rows.append(row + (0,) * (_WIDTH - len(row)))

    def start(self) -> Work | None:
        """The work of doing all of them; None if there is none."""
        if not self._rows:
            return None
        rows, ends = np.array(self._rows, np.int64), np.array(self._ends, np.int64)
        run, tickets = compiled.loops().run_touches, _tickets()
        like = (_OCTETS, _SHORTS, _INTS, _LONGS, _FLOATS)

        def work() -> int:
            run(rows, ends, *self._like, *like, tickets)
            return 0

        return work


def _is_positions(row: tuple[int, ...]) -> bool:
    return len(row) == _POSITIONS


def _is_sparse(code: Words) -> bool:
    return len(code) == 1 and _is_positions(code[0])


def _same_places(old: Words, new: Words) -> bool:
    """Whether two seeded codes touch the same weights."""
    return len(old) == len(new) and all(
        len(a) == len(b) == _SEEDED and a[:5] == b[:5] for a, b in zip(old, new, strict=True)
    )


def _places(code: SeededCode) -> Iterator[tuple[int, int, int, int, int]]:
    """Of each tensor: offset, numel, stride, key."""
    for tensor, both in zip(code.tensors, code.index[:, 4].tolist(), strict=True):
        yield tensor.offset, tensor.numel, tensor.stride, both & _LOW, both >> 32 & _LOW


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
    _touch(None, code, base, out)


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
    old: SparseCode | SeededCode | None,
    new: SparseCode | SeededCode | None,
    base: torch.Tensor,
    out: torch.Tensor,
) -> None:
    touches = Touches()
    before, after = (None if code is None else words(code) for code in (old, new))
    touches.add(before, after, base, out)
    work = touches.start()
    if work is not None:
        work()
