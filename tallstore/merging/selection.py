"""The exact k-th largest magnitude of any number of weights, in two passes of histograms.

For floats without a sign, integers order as the floats do: the first pass counts the high bits of
each magnitude, the second the low bits of those in the bin where the k-th lies. Counts are
integers, so their sum depends neither on how the weights are cut nor on which thread was first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.merging.rule import Floats

__all__ = ["Bits", "Counts", "Place", "count_high", "count_low", "find", "join", "magnitude_bits"]

Bits = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]
#: A bin, and a rank within it, counted from its top.
Place = tuple[int, int]

_HIGH_BINS: Final = 1 << 15  # the exponent and the top 7 bits of |x|
_LOW_BINS: Final = 1 << 16


def magnitude_bits(values: Floats) -> Bits:
    """|x| as an integer, uint32, the shape of `values`."""
    bits: Bits = np.ascontiguousarray(values).view(np.uint32) & np.uint32(0x7FFFFFFF)
    return bits


def count_high(rows: Bits) -> Counts:
    """For each row, how many weights have which high bits; shape (rows, 2**15)."""
    return np.stack([np.bincount(row >> 16, minlength=_HIGH_BINS) for row in rows])


def count_low(rows: Bits, bins: Sequence[int]) -> Counts:
    """For each row, how many weights of one bin have which low bits; shape (rows, 2**16)."""
    counts = []
    for row, high in zip(rows, bins, strict=True):
        inside = row[(row >> 16) == high] & 0xFFFF
        counts.append(np.bincount(inside, minlength=_LOW_BINS))
    return np.stack(counts)


def find(counts: Counts, rank: int) -> Place:
    """Where the `rank`-th largest entry lies, ranks from 1; the smallest where there are fewer."""
    above = np.cumsum(counts[::-1])
    index = min(int(np.searchsorted(above, rank)), counts.size - 1)
    before = int(above[index - 1]) if index else 0
    return counts.size - 1 - index, max(rank - before, 1)


def join(high: int, low: int) -> int:
    """The magnitude's bits from its two halves."""
    return (high << 16) | low
