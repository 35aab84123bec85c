"""What levels are fitted from: a histogram of how far a tensor's weights moved."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Magnitudes"]

Floats = npt.NDArray[np.float32]
_Sums = npt.NDArray[np.float64]

#: A bin is a float's exponent and 7 bits of its mantissa: 0.8 % wide at most.
_SHIFT: Final = 16
_SMALLEST: Final = 127 - 44 << 7
_BINS: Final = 64 << 7
#: What a bin holds is summed in rows: float64 copies of a whole span would leave the cache.
_ROW: Final = 1 << 16


class Magnitudes:
    """How the weights of one tensor moved, in bins of ``|t| / v``; v is 1 without a shared vector.

    Parameters
    ----------
    weights
        How many there are.
    """

    def __init__(self, weights: int) -> None:
        self.weights = weights
        self.moved = 0.0
        """Squared norm of the task vector t."""
        self.start = 0.0
        """Squared norm of the base's weights."""
        self.finite = True
        self.same = True
        """Whether every weight is the base's, bit for bit."""
        self.count: npt.NDArray[np.int64] = np.zeros(_BINS, np.int64)
        self.weight: _Sums = np.zeros(_BINS)
        """Sum of v**2."""
        self.product: _Sums = np.zeros(_BINS)
        """Sum of |t| * v."""

    def add(self, moves: Floats, vector: Floats | None = None) -> None:
        """Take in task-vector elements, and the shared vector's.

        Parameters
        ----------
        moves, vector
            float32, shape (n,).
        """
        for start in range(0, moves.size, _ROW):
            some = slice(start, start + _ROW)
            self._add(moves[some], None if vector is None else vector[some])

    def _add(self, moves: Floats, vector: Floats | None) -> None:
        size = np.abs(moves)
        moved = float(np.einsum("i,i->", size, size, dtype=np.float64, casting="same_kind"))
        if not np.isfinite(moved):
            self.finite = False
            return
        self.moved += moved
        if vector is None:
            index = _bins(size)
            found = np.bincount(index, minlength=_BINS)
            self.count += found
            self.weight += found
            self.product += np.bincount(index, weights=size, minlength=_BINS)
            return
        step = np.abs(vector)
        usable = step > 0
        size, step = size[usable], step[usable]
        with np.errstate(over="ignore"):
            ratio: Floats = (size / step).astype(np.float32, copy=False)
        index = _bins(ratio)
        wide = step.astype(np.float64)
        self.count += np.bincount(index, minlength=_BINS)
        self.weight += np.bincount(index, weights=wide * wide, minlength=_BINS)
        self.product += np.bincount(index, weights=wide * size, minlength=_BINS)

    def merge(self, other: Magnitudes) -> None:
        """Take in the sums of another part of the tensor."""
        self.moved += other.moved
        self.start += other.start
        self.finite &= other.finite
        self.same &= other.same
        self.count += other.count
        self.weight += other.weight
        self.product += other.product

    def cut(self, density: float) -> float:
        """The least magnitude of the `density` * weights largest; weights that did not move never.

        A lower edge of a bin, so that the share is met to a few per cent of itself.
        """
        wanted = density * self.weights
        above = np.cumsum(self.count[::-1])[::-1]
        bins = np.flatnonzero(above[1:] <= wanted) + 1
        first = int(bins[0]) if bins.size else _BINS - 1
        if first > 1 and above[first - 1] - wanted < wanted - above[first]:
            first -= 1
        return edge(first)

    def touched(self, cut: float) -> tuple[int, float]:
        """How many magnitudes are at least `cut`, and their sum."""
        first = int(_bins(np.array([cut], np.float32))[0])
        return int(self.count[first:].sum()), float(self.product[first:].sum())


def _bins(size: Floats) -> npt.NDArray[np.int64]:
    """The bin of magnitudes; bin 0 takes what is too small, the last what is too large."""
    index = (size.view(np.uint32) >> np.uint32(_SHIFT)).astype(np.int64)
    index -= _SMALLEST
    return np.clip(index, 0, _BINS - 1, out=index)


def edge(index: int) -> float:
    """The least magnitude of a bin; of bin 0 the least above zero."""
    if index <= 0:
        return float(np.finfo(np.float32).smallest_subnormal)
    return float(np.array(index + _SMALLEST << _SHIFT, np.uint32).view(np.float32))
