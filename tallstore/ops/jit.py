"""Loops over weights that numba compiles; imported only where numba is: see `tallstore.compiling`.

The same arithmetic as `tallstore.kernels.reference` and its neighbours, without a temporary: each
weight is read, computed in float32 and written, at the speed of memory. bfloat16 weights are their
bits, uint16. A product and a sum are rounded each, so no function has ``fastmath``.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numba import types
from numba.extending import overload

from tallstore.jit import array_at, compiled
from tallstore.ops.programs import PIECE, POSITIONS
from tallstore.ops.wide import LINE, WIDTH, draw, fence, fetch, write

__all__ = ["locate", "run_planes", "run_touches"]

#: Weights of a group of `SparseCode`, and (as a shift) of a block of its rows.
_GROUP: Final = 4096
_BLOCK: Final = 10
#: Of an entry of one: its place in the group, and (as a shift) its code.
_WITHIN: Final = np.uint16(_GROUP - 1)
_CODE: Final = np.uint16(12)
#: Words of a plane whose weights are on their way into the nearest cache: a part of it.
_FETCHED: Final = 32
#: Blocks of a group.
_BLOCKS: Final = _GROUP >> _BLOCK
#: Seeded values that are placed in one go.
_STEP: Final = 1024
#: What torch rounds a NaN to in bfloat16: it depends on the processor.
_NAN: Final = int(torch.full((64,), torch.nan).to(torch.bfloat16).view(torch.int16)[0]) & 0xFFFF


def _wide(weight: Any) -> Any:
    """The float32 that a weight is."""
    raise NotImplementedError


def _narrow(value: Any, like: Any) -> Any:
    """A float32, rounded to what an array of weights holds."""
    raise NotImplementedError


def _as(weight: Any, like: Any) -> Any:
    """A weight as an array of weights holds it."""
    raise NotImplementedError


def _times(level: Any, vector: Any, at: Any) -> Any:
    """A level times a weight of the shared vector, if there is one."""
    raise NotImplementedError


@overload(_wide, strict=False)
def _wide_of(weight: Any) -> Any:
    if isinstance(weight, types.Float):
        return lambda weight: weight
    return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)


@overload(_narrow, strict=False)
def _narrow_to(value: Any, like: Any) -> Any:
    if isinstance(like.dtype, types.Float):
        return lambda value, like: value

    def rounded(value: Any, like: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        near = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return near if value == value else np.uint16(_NAN)

    return rounded


@overload(_as, strict=False)
def _as_of(weight: Any, like: Any) -> Any:
    if weight == like.dtype:
        # With what a NaN carries.
        return lambda weight, like: weight
    return lambda weight, like: _narrow(_wide(weight), like)


@overload(_times, strict=False)
def _times_of(level: Any, vector: Any, at: Any) -> Any:
    if isinstance(vector, types.NoneType):
        return lambda level, vector, at: level
    return lambda level, vector, at: level * _wide(vector[at])


def _itemsize(vector: Any) -> Any:
    """Bytes of a weight of the shared vector, if there is one."""
    raise NotImplementedError


def _from(vector: Any, at: Any) -> Any:
    """Weights of the shared vector from one on, if there is one."""
    raise NotImplementedError


@overload(_itemsize, strict=False)
def _itemsize_of(vector: Any) -> Any:
    size = 0 if isinstance(vector, types.NoneType) else vector.dtype.bitwidth // 8
    return lambda vector: size


@overload(_from, strict=False)
def _from_of(vector: Any, at: Any) -> Any:
    if isinstance(vector, types.NoneType):
        return lambda vector, at: None
    return lambda vector, at: vector[at:]


@compiled
def _word(plane: Any, byte: Any) -> Any:
    """32 bits of a plane."""
    low = np.uint32(plane[byte]) | np.uint32(plane[byte + 1]) << np.uint32(8)
    high = np.uint32(plane[byte + 2]) | np.uint32(plane[byte + 3]) << np.uint32(8)
    return np.uint32(low | high << np.uint32(16))


@compiled
def _one_plane(
    base: Any, plane: Any, vector: Any, low: Any, high: Any, out: Any, there: Any
) -> Any:
    """Base + level * vector, of one plane. All of one length, the plane of its bytes.

    Weights are left alone whose bits are those of `there`, if that has any; gives how many.
    """
    left, whole = 0, out.size // 32
    for w in range(whole):
        bits, first = _word(plane, 4 * w), 32 * w
        if there.size and _word(there, 4 * w) == bits:
            left += 32
            continue
        for j in range(32):
            level = high if (bits >> np.uint32(j)) & np.uint32(1) else low
            step = _times(level, vector, first + j)
            out[first + j] = _narrow(_wide(base[first + j]) + step, out)
    for at in range(32 * whole, out.size):
        level = high if (plane[at >> 3] >> np.uint8(at & 7)) & 1 else low
        step = _times(level, vector, at)
        out[at] = _narrow(_wide(base[at]) + step, out)
    return left


@compiled
def _one_plane_wide(
    base: Any, plane: Any, vector: Any, low: Any, high: Any, out: Any, there: Any,
    base_like: Any, vector_like: Any, out_like: Any, words: Any,
) -> Any:  # fmt: skip
    """The same of whole words, by addresses, past the caches.

    Those that will be written are fetched ahead: of a table that few rows are written of, the
    processor by itself would fetch what lies between them.
    """
    size, step, far = _itemsize(base_like), _itemsize(vector_like), _itemsize(out_like)
    left, ahead, fetched = 0, 0, 0
    for w in range(words):
        bits = _word(plane, 4 * w)
        if there.size and _word(there, 4 * w) == bits:
            left += WIDTH
            continue
        while fetched < _FETCHED and ahead < words:
            if not there.size or _word(there, 4 * ahead) != _word(plane, 4 * ahead):
                for at in range(size * ahead * WIDTH, size * (ahead + 1) * WIDTH, LINE):
                    fetch(base + at)
                for at in range(step * ahead * WIDTH, step * (ahead + 1) * WIDTH, LINE):
                    fetch(vector + at)
                fetched += 1
            ahead += 1
        fetched -= 1
        n = WIDTH * w
        write(base + size * n, vector + step * n, bits, low, high, out + far * n,
              base_like, vector_like, out_like, np.uint16(_NAN))  # fmt: skip
    return left


@compiled
def _pick(by: Any, one: Any, zero: Any) -> Any:
    """A select, which is faster over many weights at once than a look into a table."""
    return one if by else zero


@compiled
def _bit(word: Any, j: Any) -> Any:
    return word >> np.uint32(j) & np.uint32(1)


@compiled
def _two_planes(base: Any, p0: Any, p1: Any, vector: Any, levels: Any, out: Any) -> None:
    """Base + levels[code] * vector, of two planes."""
    l0, l1, l2, l3 = levels[0], levels[1], levels[2], levels[3]
    whole = out.size // 32
    for w in range(whole):
        first = 32 * w
        w0, w1 = _word(p0, 4 * w), _word(p1, 4 * w)
        for j in range(32):
            b0, b1 = _bit(w0, j), _bit(w1, j)
            level = _pick(b1, _pick(b0, l3, l2), _pick(b0, l1, l0))
            step = _times(level, vector, first + j)
            out[first + j] = _narrow(_wide(base[first + j]) + step, out)
    for at in range(32 * whole, out.size):
        byte, j = at >> 3, at & 7
        code = _bit(p0[byte], j) | _bit(p1[byte], j) << 1
        step = _times(levels[code], vector, at)
        out[at] = _narrow(_wide(base[at]) + step, out)


@compiled
def _of_eight(b0: Any, b1: Any, b2: Any, levels: Any, first: Any) -> Any:
    low = _pick(b1, _pick(b0, levels[first + 3], levels[first + 2]),
                _pick(b0, levels[first + 1], levels[first]))  # fmt: skip
    high = _pick(b1, _pick(b0, levels[first + 7], levels[first + 6]),
                 _pick(b0, levels[first + 5], levels[first + 4]))  # fmt: skip
    return _pick(b2, high, low)


@compiled
def _four_planes(
    base: Any, p0: Any, p1: Any, p2: Any, p3: Any, vector: Any, levels: Any, out: Any
) -> None:
    """Base + levels[code] * vector, of four planes, or of three: the last is empty then."""
    whole = out.size // 32
    for w in range(whole):
        first = 32 * w
        w0, w1, w2 = _word(p0, 4 * w), _word(p1, 4 * w), _word(p2, 4 * w)
        w3 = _word(p3, 4 * w) if p3.size else np.uint32(0)
        for j in range(32):
            b0, b1, b2, b3 = _bit(w0, j), _bit(w1, j), _bit(w2, j), _bit(w3, j)
            low, high = _of_eight(b0, b1, b2, levels, 0), _of_eight(b0, b1, b2, levels, 8)
            step = _times(_pick(b3, high, low), vector, first + j)
            out[first + j] = _narrow(_wide(base[first + j]) + step, out)
    for at in range(32 * whole, out.size):
        byte, j = at >> 3, at & 7
        code = _bit(p0[byte], j) | _bit(p1[byte], j) << 1 | _bit(p2[byte], j) << 2
        if p3.size:
            code |= _bit(p3[byte], j) << 3
        step = _times(levels[code], vector, at)
        out[at] = _narrow(_wide(base[at]) + step, out)


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
            bits = _word(planes[k], (first // 32 + w) * 4)
            for j in range(32):
                values[32 * w + j] |= np.uint16(_bit(bits, j)) << np.uint16(_CODE + k)


@compiled
def locate(
    codes: Any, first: Any, stop: Any, lo: Any, hi: Any, octets: Any,
    entries: Any, starts: Any, rows: Any,
) -> Any:  # fmt: skip
    """Seeded values of weights lo .. hi - 1 as a `SparseCode` has them, places counted from `lo`.

    Parameters
    ----------
    codes, first, stop
        The rows of `ops.programs.Words`, in the order of their weights, and which ones.
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
        rows[(low + shift) >> _BLOCK : ((high + shift - 1) >> _BLOCK) + 1] = n - first
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
            while group * _GROUP <= at[many - 1]:
                starts[group] = count + np.searchsorted(at[:many], group * _GROUP)
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
            out[at[n] & _WITHIN] = _as(base[at[n] & _WITHIN], out)


@compiled
def _put(at: Any, kept: Any, table: Any, rows: Any, source: Any, out: Any) -> None:
    """What a group's entries touch becomes `source` + level; what was there before is kept."""
    if kept.size:
        for n in range(at.size):
            kept[n] = out[at[n] & _WITHIN]
    if rows.size:
        for n in range(at.size):
            place = at[n] & _WITHIN
            step = table[rows[place >> _BLOCK], at[n] >> _CODE]
            out[place] = _narrow(_wide(source[place]) + step, out)
    else:
        for n in range(at.size):
            place = at[n] & _WITHIN
            out[place] = _narrow(_wide(source[place]) + table[0, at[n] >> _CODE], out)


@compiled
def _fetch(address: Any, size: Any, one: Any, other: Any) -> None:
    """Have what the entries of a group touch on its way into the nearest cache."""
    if (one.size + other.size) * LINE >= _GROUP * size:
        # Of most lines there is something.
        for at in range(address, address + _GROUP * size, LINE):
            fetch(at)
        return
    for n in range(one.size):
        fetch(address + size * np.int64(one[n] & _WITHIN))
    for n in range(other.size):
        fetch(address + size * np.int64(other[n] & _WITHIN))


# -- many of them in one call: entering and leaving compiled code costs, between threads above all


def _vector_at(address: Any, count: Any, like: Any) -> Any:
    """An array as `array_at` gives it, or None if there is no such array."""
    raise NotImplementedError


@overload(_vector_at, strict=False)
def _vector_of(address: Any, count: Any, like: Any) -> Any:
    if isinstance(like, types.NoneType):
        return lambda address, count, like: None
    return lambda address, count, like: array_at(address, count, like)


@compiled
def run_planes(
    jobs: Any, levels: Any, base: Any, vector: Any, out: Any, octets: Any, past: Any, tickets: Any
) -> Any:  # fmt: skip
    """Rows of `jobs` that no other thread does: see `ops.programs.Planes`.

    Arrays of weights give their dtypes alone. `past`: one plane is written past the caches. Gives
    how many weights were left alone.
    """
    left = 0
    while True:
        n = draw(tickets.ctypes.data)
        if n >= jobs.shape[0]:
            break
        count, planes, row = jobs[n, 0], jobs[n, 1], levels[jobs[n, 2]]
        one, to = array_at(jobs[n, 3], count, base), array_at(jobs[n, 5], count, out)
        step = _vector_at(jobs[n, 4], count, vector)
        size = (count + 7) // 8
        p0 = array_at(jobs[n, 6], size, octets)
        if planes == 1:
            there = array_at(jobs[n, 10], size if jobs[n, 10] else 0, octets)
            words = count // WIDTH if past and jobs[n, 5] % LINE == 0 else 0
            left += _one_plane_wide(
                jobs[n, 3], p0, jobs[n, 4], row[0], row[1], jobs[n, 5], there, base, vector, out,
                words,
            )  # fmt: skip
            at = WIDTH * words
            left += _one_plane(
                one[at:], p0[at // 8 :], _from(step, at), row[0], row[1], to[at:],
                there[at // 8 :],
            )  # fmt: skip
            continue
        p1 = array_at(jobs[n, 7], size, octets)
        if planes == 2:
            _two_planes(one, p0, p1, step, row, to)
            continue
        p2 = array_at(jobs[n, 8], size, octets)
        p3 = array_at(jobs[n, 9], size if planes == 4 else 0, octets)
        _four_planes(one, p0, p1, p2, p3, step, row, to)
    if past:
        fence()
    return left


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
        begins = array_at(row[3], row[4], longs)[lo // _GROUP :]
        by = array_at(row[5], row[6], ints)
        some = by[lo >> _BLOCK :] if by.size else by
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
    """Pieces of `tensors` that no other thread does: see `ops.programs.Touches`.

    While a group is written, what is touched of the next is on its way: which lines those are, the
    processor cannot know by itself.
    """
    seeded = (olds[:, 0] != POSITIONS).any(), (news[:, 0] != POSITIONS).any()
    entries_old = np.empty(PIECE if seeded[0] else 0, np.uint16)
    entries_new = np.empty(PIECE if seeded[1] else 0, np.uint16)
    starts = np.empty((2, PIECE // _GROUP + 1), np.int64)
    rows = np.empty((2, PIECE >> _BLOCK), np.int32)
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
        groups = (hi - lo + _GROUP - 1) // _GROUP
        for ahead in range(groups + 1):
            if ahead < groups:
                address = row[3] + size * (lo + ahead * _GROUP)
                _fetch(address, size, _group(old, old_starts, ahead),
                       _group(new, new_starts, ahead))  # fmt: skip
            group = ahead - 1
            if group < 0:
                continue
            at = group * _GROUP
            if row[4]:
                for n in range(at, min(at + _GROUP, hi - lo)):
                    to[n] = _as(one[n], to)
            at_old, at_new = _group(old, old_starts, group), _group(new, new_starts, group)
            _put_back(at_old, before[old_starts[group] + less :], one[at:], to[at:])
            _put(at_new, after[new_starts[group] + fewer :], table, by[group * _BLOCKS :],
                 source[at:], to[at:])  # fmt: skip
