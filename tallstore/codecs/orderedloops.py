"""Loops over differences of words, for numba; imported only where it is: see `compiling`.

The same as `tallstore.codecs.ordered` has, a word at a time: words of 16 or 32 bits, as uint32.
What is above a word's bits is left to be cut off where it is written.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tallstore.jit import array_at, compiled

__all__ = ["add", "ordered", "unordered", "unzigzag", "zigzag"]

_ONE: Final = np.uint32(1)
_ZERO: Final = np.uint32(0)
_ALL: Final = np.uint32(0xFFFFFFFF)


@compiled
def ordered(word: Any, top: Any) -> Any:
    """See `ordered.ordered`; `top` is the highest bit of a word."""
    return np.uint32(word ^ ((_ALL if word & top else _ZERO) | top))


@compiled
def unordered(word: Any, top: Any) -> Any:
    """The inverse of `ordered`."""
    return np.uint32(word ^ ((_ZERO if word & top else _ALL) | top))


@compiled
def zigzag(difference: Any, top: Any) -> Any:
    """See `ordered.zigzag`."""
    doubled = np.uint32(difference << _ONE)
    return np.uint32(doubled ^ (_ALL if difference & top else _ZERO))


@compiled
def unzigzag(word: Any) -> Any:
    """The inverse of `zigzag`, modulo the word."""
    return np.uint32(np.uint32(word >> _ONE) ^ (_ALL if word & _ONE else _ZERO))


@compiled
def _moved(word: Any, folded: Any, top: Any) -> Any:
    return unordered(np.uint32(ordered(np.uint32(word), top) + unzigzag(np.uint32(folded))), top)


@compiled
def add(known: Any, differences: Any, out: Any, count: Any, top: Any, like: Any) -> None:
    """Floats from words of `known` and zigzag differences: addresses, of the dtype of `like`.

    `known` may be `out`.
    """
    folded, to = array_at(differences, count, like), array_at(out, count, like)
    if known == out:
        # By one name: of two that overlap no compiler takes many words at once.
        for j in range(count):
            to[j] = _moved(to[j], folded[j], top)
        return
    words = array_at(known, count, like)
    for j in range(count):
        to[j] = _moved(words[j], folded[j], top)
