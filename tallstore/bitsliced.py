"""Numbers kept bit by bit: plane l holds bit l of the numbers of all weights, 64 in a word.

Masks are added by full adders made of bitwise operations (carry-save): about five of them a mask,
for 64 weights at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tallstore.scratch import Scratch

__all__ = ["BitSlicedCount", "Words", "exactly"]

Words = npt.NDArray[np.uint64]


class BitSlicedCount:
    """The bit-sliced number of masks that use each weight; `planes` from the lowest bit up."""

    def __init__(self, block: Words, scratch: Scratch) -> None:
        count, words = block.shape
        levels = count.bit_length()
        # Two carries may be under way at each level, one waiting and one on its way up.
        raw = scratch.take("counting: planes", 8 * words * (3 * levels + 2))
        rows = raw.view(np.uint64).reshape(-1, words)
        self.planes: list[Words] = list(rows[:levels])
        self._carries: list[tuple[Words, Words]] = [
            (rows[levels + n], rows[2 * levels + n]) for n in range(levels)
        ]
        self._flip: Words = rows[3 * levels]
        self._spare: Words = rows[3 * levels + 1]
        self._waiting: list[Words | None] = [None] * levels
        self._used = [False] * levels
        for mask in block:
            self._push(0, mask)
        for level in range(levels):
            held, self._waiting[level] = self._waiting[level], None
            if held is not None:
                self._half(level, held)
            elif not self._used[level]:
                self.planes[level].fill(0)

    def _push(self, level: int, plane: Words) -> None:
        """Add a plane of weight 2**level; it waits until there are two to add at once."""
        if not self._used[level]:
            np.copyto(self.planes[level], plane)
            self._used[level] = True
            return
        held, self._waiting[level] = self._waiting[level], None
        if held is None:
            self._waiting[level] = plane
            return
        own, flip, both = self.planes[level], self._flip, self._spare
        np.bitwise_xor(own, held, out=flip)
        np.bitwise_and(own, held, out=both)
        np.bitwise_xor(flip, plane, out=own)
        np.bitwise_and(flip, plane, out=flip)
        self._carry(level, np.bitwise_or(flip, both, out=self._free(level + 1)))

    def _half(self, level: int, plane: Words) -> None:
        own = self.planes[level]
        np.bitwise_and(own, plane, out=self._spare)
        np.bitwise_xor(own, plane, out=own)
        if level + 1 < len(self.planes):  # counts of T masks have no higher bit
            np.copyto(self._free(level + 1), self._spare)
            self._carry(level, self._free(level + 1))

    def _free(self, level: int) -> Words:
        """Memory for a carry into `level`: of its two, the one that does not wait."""
        if level == len(self.planes):
            return self._spare
        one, other = self._carries[level]
        return other if self._waiting[level] is one else one

    def _carry(self, level: int, carry: Words) -> None:
        if level + 1 < len(self.planes):
            self._push(level + 1, carry)


def exactly(
    planes: Sequence[Words],
    room: Words,
    most: int,
    count: int = 0,
    among: Words | None = None,
) -> Iterator[tuple[int, Words]]:
    """(c, the weights whose count is c) for c = 1 .. `most`, by halving on one bit after another.

    Parameters
    ----------
    planes
        The bits of the counts that are still to be looked at, the highest last.
    room
        Shape (levels, 2, words).
    count, among
        The bits seen so far, and the weights that have them; None: all.
    """
    if not planes:
        if count and among is not None:
            yield count, among
        return
    level = len(planes) - 1
    ones, zeros = room[level]
    plane = planes[level]
    if among is None:
        ones = plane
        np.invert(plane, out=zeros)
    else:
        np.bitwise_and(among, plane, out=ones)
        np.bitwise_xor(among, ones, out=zeros)
    if count + (1 << level) <= most:
        yield from exactly(planes[:level], room, most, count + (1 << level), ones)
    yield from exactly(planes[:level], room, most, count, zeros)
