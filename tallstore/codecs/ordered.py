"""Floats as integers of the same order, and signed differences as small unsigned ones."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Words", "ordered", "unordered", "unzigzag", "zigzag"]

#: Unsigned integers of one size.
Words = npt.NDArray[Any]

_SIGNED: Final = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def _top(words: Words) -> Words:
    """All bits set where the highest one is."""
    shift = np.int8(8 * words.itemsize - 1)
    top: Words = (words.view(_SIGNED[words.itemsize]) >> shift).view(words.dtype)
    return top


def _sign(words: Words) -> Any:
    return words.dtype.type(1 << 8 * words.itemsize - 1)


def ordered(words: Words) -> Words:
    """Float bit patterns as unsigned integers that order as the floats do."""
    result: Words = words ^ (_top(words) | _sign(words))
    return result


def unordered(words: Words) -> Words:
    """The inverse of `ordered`."""
    # The top bit is set where the float was positive: those got the sign bit flipped alone.
    result: Words = words ^ (~_top(words) | _sign(words))
    return result


def zigzag(difference: Words) -> Words:
    """``(d << 1) ^ (d >> all)``, d being signed: 0, -1, 1, -2 become 0, 1, 2, 3."""
    result: Words = (difference << difference.dtype.type(1)) ^ _top(difference)
    return result


def unzigzag(words: Words) -> Words:
    """The inverse of `zigzag`, modulo the word."""
    one = words.dtype.type(1)
    result: Words = (words >> one) ^ (words.dtype.type(0) - (words & one))
    return result
