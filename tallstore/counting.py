"""Counting ones over several packed masks at once, without ever unpacking them.

The masks of a span are LSB-first bit planes (see `tallstore.bits`), taken 64 weights a word; how
many masks use a weight is counted in bit-sliced numbers (see `tallstore.bitsliced`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tallstore.bitsliced import BitSlicedCount, Words, exactly
from tallstore.errors import MismatchError, OptionError
from tallstore.scratch import Scratch

__all__ = ["Tally", "at_least", "exclusive", "overlaps", "tally", "use_histogram"]

Plane = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

#: Weights a word.
_WORD: Final = 64
#: Words of each mask in a piece. Shorter pieces would stay in a core's own cache, but a thread
#: waits for the interpreter's lock after every operation: long ones lose less to that (measured).
_PIECE: Final = 1 << 14


@dataclass(frozen=True, slots=True)
class Tally:
    """What `tally` counts, for each of R runs of weights."""

    ones: Counts
    """Shape (T, R): the ones of each mask."""
    exclusive: Counts
    """Shape (T, R): the ones of each mask that no other mask has."""
    used_by: Counts
    """Shape (T, R): row c - 1 has the number of weights that exactly c masks use."""


def overlaps(masks: Sequence[Plane], *, scratch: Scratch | None = None) -> Counts:
    """How many weights each pair of masks uses in common.

    Parameters
    ----------
    masks
        T planes, uint8, of one size. Bits of padding count, so they are to be zero.
    scratch
        Buffers to use again; worth giving where this is called often.

    Returns
    -------
    numpy.ndarray
        int64, shape (T, T), symmetric; the diagonal has the ones of each mask.

    Raises
    ------
    OptionError, MismatchError
        There are no masks, or their shapes or dtypes differ.
    """
    size = _size(masks)
    count = len(masks)
    scratch = Scratch() if scratch is None else scratch
    found = np.zeros((count, count), np.int64)
    for _, block in _blocks(masks, 8 * size, scratch):
        both, ones = _room(scratch, block.shape)
        for i in range(count):
            rest = count - i
            np.bitwise_and(block[i:], block[i], out=both[:rest])
            np.bitwise_count(both[:rest], out=ones[:rest])
            found[i, i:] += ones[:rest].sum(axis=1, dtype=np.uint32)
    upper: Counts = np.triu(found)
    return upper + np.triu(found, 1).T


def tally(
    masks: Sequence[Plane], starts: Sequence[int], weights: int, *, scratch: Scratch | None = None
) -> Tally:
    """Ones, ones of one mask alone, and use by exactly c masks, for each run of weights.

    Parameters
    ----------
    masks
        T planes, uint8, of one size.
    starts
        First weight of each of R runs: 0, then ascending multiples of 64. A run reaches to the
        next one's start, the last to `weights`.
    weights
        Bits that count; those behind them are not looked at.
    scratch
        Buffers to use again; worth giving where this is called often.

    Raises
    ------
    OptionError, MismatchError
        There are no masks, their shapes or dtypes differ, `weights` are more than they hold, or
        `starts` are not as described.
    """
    size = _size(masks)
    _check_weights(weights, size)
    first = np.asarray(starts, np.int64)
    if first.ndim != 1 or not first.size or first[0] != 0 or (np.diff(first) <= 0).any():
        raise OptionError("starts: 0 and then ascending numbers are needed")
    if (first % _WORD).any():
        raise OptionError(f"starts: multiples of {_WORD} are needed")
    first //= _WORD
    count = len(masks)
    scratch = Scratch() if scratch is None else scratch
    total = Tally(*(np.zeros((count, first.size), np.int64) for _ in range(3)))
    for at, block in _blocks(masks, weights, scratch):
        low = int(np.searchsorted(first, at, "right")) - 1
        high = int(np.searchsorted(first, at + block.shape[1], "left"))
        _tally_block(block, np.maximum(first[low:high] - at, 0), slice(low, high), total, scratch)
    return total


def use_histogram(
    masks: Sequence[Plane], weights: int, *, scratch: Scratch | None = None
) -> Counts:
    """How many of the first `weights` weights exactly c masks use, for c = 0 .. T.

    Returns
    -------
    numpy.ndarray
        int64, shape (T + 1,); the sum is `weights`.

    Raises
    ------
    OptionError, MismatchError
        As `tally` does.
    """
    used = tally(masks, [0], weights, scratch=scratch).used_by[:, 0]
    return np.concatenate(([weights - used.sum()], used))


def exclusive(masks: Sequence[Plane], *, scratch: Scratch | None = None) -> Counts:
    """How many ones of each mask no other mask has: int64, shape (T,).

    Bits of padding count, so they are to be zero.

    Raises
    ------
    OptionError, MismatchError
        As `overlaps` does.
    """
    return tally(masks, [0], 8 * _size(masks), scratch=scratch).exclusive[:, 0]


def at_least(
    masks: Sequence[Plane],
    k: int,
    *,
    out: Plane | None = None,
    scratch: Scratch | None = None,
) -> Plane:
    """The weights that at least `k` masks use, as a packed plane.

    The mask of Consensus Merging (arXiv 2405.07813, section 4).

    Parameters
    ----------
    masks
        T planes, uint8, of one size.
    k
        0 gives ones throughout, padding included; more than T gives zeros.
    out
        Where to, of the masks' size; it may be one of them.

    Returns
    -------
    numpy.ndarray
        uint8, of the masks' size.

    Raises
    ------
    OptionError, MismatchError
        As `overlaps` does; or `k` is negative, or `out` of another shape or dtype.
    """
    size = _size(masks)
    if k < 0:
        raise OptionError(f"k={k}: a number of masks, 0 or more, is needed")
    if out is None:
        out = np.empty(size, np.uint8)
    elif out.shape != (size,) or out.dtype != np.uint8:
        raise MismatchError(f"out: {out.dtype}{out.shape}; uint8 of {size} bytes is needed")
    if k == 0 or k > len(masks):
        out.fill(0 if k else 0xFF)
        return out
    scratch = Scratch() if scratch is None else scratch
    for at, block in _blocks(masks, 8 * size, scratch):
        planes = BitSlicedCount(block, scratch).planes
        # From the lowest bit up: is what was seen of the count at least what was seen of k?
        reached = scratch.take("counting: reached", block[0].nbytes).view(np.uint64)
        reached.fill(np.iinfo(np.uint64).max)
        for level, plane in enumerate(planes):
            combine = np.bitwise_and if k >> level & 1 else np.bitwise_or
            combine(plane, reached, out=reached)
        low = 8 * at
        stop = min(low + reached.nbytes, size)
        out[low:stop] = reached.view(np.uint8)[: stop - low]
    return out


# -- pieces -------------------------------------------------------------------------------


def _size(masks: Sequence[Plane]) -> int:
    """Bytes of each mask."""
    if not len(masks):
        raise OptionError("there are no masks to count")
    for mask in masks:
        if mask.ndim != 1 or mask.dtype != np.uint8 or mask.shape != masks[0].shape:
            raise MismatchError(
                f"masks: {mask.dtype}{mask.shape} beside {masks[0].dtype}{masks[0].shape}; flat "
                "uint8 planes of one size are needed"
            )
    return int(masks[0].size)


def _check_weights(weights: int, size: int) -> None:
    if not 0 <= weights <= 8 * size:
        raise OptionError(f"weights={weights}: masks of {size} bytes hold 0 to {8 * size}")


def _blocks(masks: Sequence[Plane], weights: int, scratch: Scratch) -> Iterator[tuple[int, Words]]:
    """(first word, words of all masks, shape (T, n)) of each piece; bits past `weights` are 0.

    The block is a copy, since a mask need not be aligned nor a whole number of words.
    """
    nbytes = (weights + 7) // 8
    for low in range(0, nbytes, 8 * _PIECE):
        count = min(8 * _PIECE, nbytes - low)
        words = (count + 7) // 8
        block = scratch.take("counting: block", 8 * words * len(masks)).reshape(len(masks), -1)
        for row, mask in zip(block, masks, strict=True):
            row[:count] = mask[low : low + count]
        block[:, count:] = 0
        if low + count == nbytes and weights % 8:
            block[:, count - 1] &= (1 << weights % 8) - 1
        yield low // 8, block.view(np.uint64)


def _room(scratch: Scratch, shape: tuple[int, ...]) -> tuple[Words, npt.NDArray[np.uint8]]:
    """Memory for words of that shape, and for their numbers of ones."""
    rows, words = shape
    both = scratch.take("counting: words", 8 * rows * words).view(np.uint64)
    ones = scratch.take("counting: ones", rows * words)
    return both.reshape(rows, words), ones.reshape(rows, words)


# -- counts -------------------------------------------------------------------------------


def _tally_block(
    block: Words,
    starts: npt.NDArray[Any],
    runs: slice,
    total: Tally,
    scratch: Scratch,
) -> None:
    both, ones = _room(scratch, block.shape)
    total.ones[:, runs] += _sums(block, ones, starts)
    planes = BitSlicedCount(block, scratch).planes
    words = block.shape[1]
    raw = scratch.take("counting: exactly", 16 * words * len(planes)).view(np.uint64)
    for count, plane in exactly(planes, raw.reshape(len(planes), 2, words), len(block)):
        total.used_by[count - 1, runs] += _sums(plane[None], ones[:1], starts)[0]
        if count == 1:
            np.bitwise_and(block, plane, out=both)
            total.exclusive[:, runs] += _sums(both, ones, starts)


def _sums(words: Words, ones: npt.NDArray[np.uint8], starts: npt.NDArray[Any]) -> Counts:
    """The ones of each row between `starts`."""
    np.bitwise_count(words, out=ones)
    found: Counts = np.add.reduceat(ones, starts, axis=1, dtype=np.int64)
    return found
