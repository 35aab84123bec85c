"""Sparse and seeded codes by loops that numba compiles: `ops.touches.Touches`.

The same arithmetic as `tallstore.kernels.sparse_reference` and `seeded_reference`. Seeded values
become positions first, a piece of a tensor at a time, if they were not kept with their places.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tallstore.jit import array_at, compiled
from tallstore.kernels.sparse_reference import BLOCK, GROUP
from tallstore.ops.touches import PIECE, POSITIONS
from tallstore.ops.weightloops import as_in, bit, narrow, wide, word
from tallstore.ops.wide import LINE, draw, fetch

__all__ = ["locate", "run_touches"]

#: Of an entry: its place in the group, and (as a shift) its code.
_WITHIN: Final = np.uint16(GROUP - 1)
_CODE: Final = np.uint16(12)
#: A block of its rows, as a shift.
_SHIFT: Final = np.uint16(BLOCK.bit_length() - 1)
#: Blocks of a group.
_BLOCKS: Final = GROUP // BLOCK
#: Seeded values that are placed in one go.
_STEP: Final = 1024


@compiled
def _mix(x: Any) -> Any:
    x = np.uint32(x ^ x >> np.uint32(16))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ x >> np.uint32(15))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ x >> np.uint32(16))


@compiled
def _hash(low: Any, one: Any, two: Any) -> Any:
    return _mix(np.uint32(_mix(np.uint32(np.uint32(low) ^ one)) ^ two))


@compiled
def _within(h: Any, size: Any) -> Any:
    return np.int64(np.uint64(h) * np.uint64(size) >> np.uint64(32))


@compiled
def _place(row: Any, group: Any) -> Any:
    """Which weight of a seeded tensor has the value of a group."""
    stride, size = row[3], min(row[3], row[2] - group * row[3])
    h = _hash(group & 0xFFFFFFFF, np.uint32(row[4]), np.uint32(row[5] ^ group >> 32))
    return group * stride + _within(h, size)


@compiled
def _places(row: Any, low: Any, high: Any, shift: Any, hashes: Any, at: Any) -> None:
    """The same of groups low .. high - 1, plus `shift`.

    In loops of their own, which the processor works off many at a time.
    """
    stride, one = row[3], np.uint32(row[4])
    start = low
    while start < high:
        # The high half of a group's number is the same for 2**32 of them.
        stop = min(high, ((start >> 32) + 1) << 32)
        two, number = np.uint32(row[5] ^ start >> 32), np.uint32(start & 0xFFFFFFFF)
        for n in range(stop - start):
            hashes[start - low + n] = _hash(np.uint32(number + np.uint32(n)), one, two)
        start = stop
    first = low * stride + shift
    for n in range(high - low):
        at[n] = first + n * stride + _within(hashes[n], stride)
    if high * stride > row[2]:
        at[high - low - 1] = _place(row, high - 1) + shift


@compiled
def _values(row: Any, octets: Any, first: Any, count: Any, values: Any) -> None:
    """Codes of a row's values, as entries have them; values[0] is of one at a word's start."""
    planes = array_at(row[7], row[8] * row[9], octets).reshape((row[8], row[9]))
    values[:] = 0
    for k in range(planes.shape[0]):
        for w in range((first % 32 + count + 31) // 32):
            bits = word(planes[k], (first // 32 + w) * 4)
            for j in range(32):
                values[32 * w + j] |= np.uint16(bit(bits, j)) << np.uint16(_CODE + k)


@compiled
def locate(
    codes: Any, first: Any, stop: Any, lo: Any, hi: Any, octets: Any,
    entries: Any, starts: Any, rows: Any,
) -> Any:  # fmt: skip
    """Seeded values of weights lo .. hi - 1 as a `SparseCode` has them, places counted from `lo`.

    Parameters
    ----------
    codes, first, stop
        The rows of `ops.touches.Words`, in the order of their weights, and which ones.
    lo, hi
        A multiple of the weights of a group; the weight after the last.
    octets
        An empty array of uint8.
    entries, starts, rows
        Take the entries, the first of each group and after the last, and the row of the levels of
        each block, counted from `first`.

    Returns
    -------
    int
        How many values `codes` has before these.
    """
    hashes, at = np.empty(_STEP, np.uint32), np.empty(_STEP, np.int64)
    values = np.empty(_STEP + 32, np.uint16)
    before, count, group = -1, 0, 0
    rows[:] = 0
    for n in range(first, stop):
        row = codes[n]
        offset, stride = row[1], row[3]
        low, high = max(lo - offset, 0), min(hi - offset, row[2])
        if low >= high:
            continue
        shift = offset - lo
        rows[(low + shift) // BLOCK : ((high + shift - 1) // BLOCK) + 1] = n - first
        # A group at an end may have its value beyond it.
        start, end = low // stride, (high + stride - 1) // stride
        if _place(row, start) < low:
            start += 1
        if end > start and _place(row, end - 1) >= high:
            end -= 1
        if before < 0:
            before = row[11] + start
        for some in range(start, end, _STEP):
            many = min(some + _STEP, end) - some
            _places(row, some, some + many, shift, hashes, at)
            _values(row, octets, row[6] + some, many, values)
            lead = (row[6] + some) % 32
            for v in range(many):
                entries[count + v] = np.uint16(at[v]) & _WITHIN | values[lead + v]
            while group * GROUP <= at[many - 1]:
                starts[group] = count + np.searchsorted(at[:many], group * GROUP)
                group += 1
            count += many
    starts[group:] = count
    return max(before, 0)


@compiled
def _group(entries: Any, starts: Any, group: Any) -> Any:
    return entries[starts[group] : starts[group + 1]]


@compiled
def _put_back(at: Any, kept: Any, base: Any, out: Any) -> None:
    """What a group's entries touch becomes what was there before: as it was kept, or the base."""
    # Places are unsigned, and counted from where the group starts: numba takes others to be perhaps
    # counted from the end, which it looks at each time.
    if kept.size:
        for n in range(at.size):
            out[at[n] & _WITHIN] = kept[n]
    else:
        for n in range(at.size):
            out[at[n] & _WITHIN] = as_in(base[at[n] & _WITHIN], out)


@compiled
def _put(at: Any, kept: Any, table: Any, rows: Any, source: Any, out: Any) -> None:
    """What a group's entries touch becomes `source` + level; what was there before is kept."""
    if kept.size:
        for n in range(at.size):
            kept[n] = out[at[n] & _WITHIN]
    if rows.size:
        for n in range(at.size):
            place = at[n] & _WITHIN
            step = table[rows[place >> _SHIFT], at[n] >> _CODE]
            out[place] = narrow(wide(source[place]) + step, out)
    else:
        for n in range(at.size):
            place = at[n] & _WITHIN
            out[place] = narrow(wide(source[place]) + table[0, at[n] >> _CODE], out)


@compiled
def _fetch(address: Any, size: Any, one: Any, other: Any) -> None:
    """Have what the entries of a group touch on its way into the nearest cache."""
    if (one.size + other.size) * LINE >= GROUP * size:
        # Of most lines there is something.
        for at in range(address, address + GROUP * size, LINE):
            fetch(at)
        return
    for n in range(one.size):
        fetch(address + size * np.int64(one[n] & _WITHIN))
    for n in range(other.size):
        fetch(address + size * np.int64(other[n] & _WITHIN))


@compiled
def _found(
    codes: Any, first: Any, stop: Any, lo: Any, hi: Any,
    entries: Any, starts: Any, rows: Any, octets: Any, shorts: Any, ints: Any, longs: Any,
) -> Any:  # fmt: skip
    """A code of weights lo .. hi - 1: entries, starts, entries that are not there, rows of levels.

    Positions as they are; seeded values in the arrays that are given.
    """
    if first < stop and codes[first, 0] == POSITIONS:
        row = codes[first]
        begins = array_at(row[3], row[4], longs)[lo // GROUP :]
        by = array_at(row[5], row[6], ints)
        some = by[lo // BLOCK :] if by.size else by
        return array_at(row[1], row[2], shorts), begins, 0, some
    before = locate(codes, first, stop, lo, hi, octets, entries, starts, rows)
    return entries, starts, before, rows if stop - first > 1 else rows[:0]


@compiled
def _table(codes: Any, first: Any, stop: Any, floats: Any) -> Any:
    """The levels of a code: a row a tensor, or a kind of block."""
    high, wide, address = 0, 1, 0
    if first < stop:
        row = codes[first]
        high, address = row[7] if row[0] == POSITIONS else stop - first, row[10]
        wide = row[8] if row[0] == POSITIONS else 1 << row[8]
    return array_at(address, high * wide, floats).reshape((high, wide))


@compiled
def run_touches(
    tensors: Any, firsts: Any, olds: Any, news: Any, base: Any, out: Any,
    octets: Any, shorts: Any, ints: Any, longs: Any, floats: Any, tickets: Any,
) -> None:  # fmt: skip
    """Pieces of `tensors` that no other thread does: see `ops.touches.Touches`.

    While a group is written, what is touched of the next is on its way: which lines those are, the
    processor cannot know by itself.
    """
    seeded = (olds[:, 0] != POSITIONS).any(), (news[:, 0] != POSITIONS).any()
    entries_old = np.empty(PIECE if seeded[0] else 0, np.uint16)
    entries_new = np.empty(PIECE if seeded[1] else 0, np.uint16)
    starts = np.empty((2, PIECE // GROUP + 1), np.int64)
    rows = np.empty((2, PIECE // BLOCK), np.int32)
    while True:
        piece = draw(tickets.ctypes.data)
        if piece >= firsts[-1]:
            break
        number = np.searchsorted(firsts, piece, side="right") - 1
        row = tensors[number]
        lo = (piece - firsts[number]) * PIECE
        hi, size = min(lo + PIECE, row[0]), out.itemsize
        one, source = array_at(row[1], row[0], base)[lo:hi], array_at(row[2], row[0], base)[lo:hi]
        to = array_at(row[3], row[0], out)[lo:hi]
        before, after = array_at(row[9], row[10], out), array_at(row[11], row[12], out)
        old, old_starts, less, _ = _found(olds, row[5], row[6], lo, hi, entries_old, starts[0],
                                          rows[0], octets, shorts, ints, longs)  # fmt: skip
        new, new_starts, fewer, by = _found(news, row[7], row[8], lo, hi, entries_new, starts[1],
                                            rows[1], octets, shorts, ints, longs)  # fmt: skip
        table = _table(news, row[7], row[8], floats)
        groups = (hi - lo + GROUP - 1) // GROUP
        for ahead in range(groups + 1):
            if ahead < groups:
                address = row[3] + size * (lo + ahead * GROUP)
                _fetch(address, size, _group(old, old_starts, ahead),
                       _group(new, new_starts, ahead))  # fmt: skip
            group = ahead - 1
            if group < 0:
                continue
            at = group * GROUP
            if row[4]:
                for n in range(at, min(at + GROUP, hi - lo)):
                    to[n] = as_in(one[n], to)
            at_old, at_new = _group(old, old_starts, group), _group(new, new_starts, group)
            _put_back(at_old, before[old_starts[group] + less :], one[at:], to[at:])
            _put(at_new, after[new_starts[group] + fewer :], table, by[group * _BLOCKS :],
                 source[at:], to[at:])  # fmt: skip
