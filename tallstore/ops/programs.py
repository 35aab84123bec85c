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
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from tallstore.ops import compiled

__all__ = [
    "Planes",
    "Work",
    "reconstruct",
    "tickets",
]

#: What each of the threads calls that share some work: it does what is left until nothing is. The
#: work is done when all that called it have returned.
Work = Callable[[], int]

#: Columns of a row of `Planes`: what must be the same for weights to be, then what they are of.
_ALIKE: Final = [0, 1, 3, 4, 5]
_OUT: Final = 5
_PLANES: Final = 6
_THERE: Final = 10
#: Bytes from which on weights are written past the caches: no cache would hold them.
_PAST: Final = 1 << 25
_OCTETS: Final = np.zeros(0, np.uint8)


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
        run, drawn = compiled.loops("planeloops").run_planes, tickets()

        def work() -> int:
            found = run(self._rows, self._levels, *self._like, _OCTETS, self._past, drawn)
            return int(found)

        return work


def tickets() -> npt.NDArray[np.int64]:
    """What threads draw: the number of the next row, which no other one gets."""
    return np.zeros(1, np.int64)


def reconstruct(
    base: torch.Tensor,
    planes: torch.Tensor,
    vector: torch.Tensor | None,
    levels: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `tallstore.ops.reconstruct`, with one row of levels; nothing is checked here."""
    Planes([(base, planes, vector, 0, out)], levels).start()()
