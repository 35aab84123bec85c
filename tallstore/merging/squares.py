"""Sums of squares without rounding, as integers: the same for every order of adding up.

A float32 is an integer of 24 bits times a power of two, its square one of 48 bits. The squares are
added up for each exponent, in two halves that stay exact in float64.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.merging.rule import Floats
from tallstore.merging.selection import magnitude_bits

__all__ = ["shares", "square_sums"]

_EXPONENTS: Final = 256
_HALF: Final = 24


def square_sums(vectors: Floats) -> npt.NDArray[np.int64]:
    """The sum of squares of each row.

    Parameters
    ----------
    vectors
        Float32, finite, shape (rows, weights), at most 2**29 weights.

    Returns
    -------
    numpy.ndarray
        int64, shape (rows, 2, 256): by biased exponent, the high and low halves of the squared
        integers. Arrays of several stretches may be added.
    """
    bits = magnitude_bits(vectors)
    exponents = bits >> np.uint32(23)
    wide = (bits & np.uint32(0x7FFFFF)).astype(np.uint64)
    wide |= (exponents > 0).astype(np.uint64) << np.uint64(23)
    np.multiply(wide, wide, out=wide)
    found = np.empty((len(vectors), 2, _EXPONENTS), np.int64)
    for row, exponent, square in zip(found, exponents, wide, strict=True):
        for half, part in enumerate((square >> np.uint64(_HALF), square & np.uint64(0xFFFFFF))):
            row[half] = np.bincount(exponent, weights=part, minlength=_EXPONENTS)
    return found


def shares(sums: npt.NDArray[np.int64]) -> tuple[float, ...]:
    """Each row's share of all rows' squares; equal shares where every square is zero."""
    totals = [_total(row) for row in sums.tolist()]
    whole = sum(totals)
    if not whole:
        return (1 / len(totals),) * len(totals)
    return tuple(total / whole for total in totals)  # of integers: rounded once


def _total(halves: list[list[int]]) -> int:
    """The sum of squares, times 2**300."""
    return sum(
        ((high << _HALF) + low) << (2 * max(exponent, 1))
        for exponent, (high, low) in enumerate(zip(*halves, strict=True))
    )
