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
from tallstore.ops.programs import APPLY, RESTORE, RESTORE_SEEDED, SWITCH
from tallstore.ops.wide import LINE, WIDTH, draw, fence, fetch, write

__all__ = ["run_planes", "run_touches"]

#: Weights of a group of `SparseCode`, and (as a shift) of a block of its rows.
_GROUP: Final = 4096
_BLOCK: Final = 10
#: Words of a plane whose weights are on their way into the nearest cache: a part of it.
_FETCHED: Final = 32
#: Values of a seeded tensor that are placed in one go.
_STEP: Final = 1024
#: What torch rounds a NaN to in bfloat16: it depends on the processor.
_NAN: Final = int(torch.full((64,), torch.nan).to(torch.bfloat16).view(torch.int16)[0]) & 0xFFFF


def _wide(weight: Any) -> Any:
    """The float32 that a weight is."""
    raise NotImplementedError


def _narrow(value: Any, like: Any) -> Any:
    """A float32, rounded to what an array of weights holds."""
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
def _apply_group(
    group: Any, entries: Any, starts: Any, table: Any, rows: Any, source: Any, out: Any
) -> None:
    first = group * _GROUP
    for n in range(starts[group], starts[group + 1]):
        entry = np.int64(entries[n])
        at = first + (entry & (_GROUP - 1))
        row = rows[at >> _BLOCK] if rows.size else 0
        out[at] = _narrow(_wide(source[at]) + table[row, entry >> 12], out)


@compiled
def _restore_group(group: Any, entries: Any, starts: Any, base: Any, out: Any) -> None:
    first = group * _GROUP
    for n in range(starts[group], starts[group + 1]):
        at = first + (np.int64(entries[n]) & (_GROUP - 1))
        out[at] = _narrow(_wide(base[at]), out)


@compiled
def _sparse_apply(entries: Any, starts: Any, table: Any, rows: Any, source: Any, out: Any) -> None:
    """The touched weights become what `source` has there + level."""
    for group in range(starts.size - 1):
        _apply_group(group, entries, starts, table, rows, source, out)


@compiled
def _sparse_restore(entries: Any, starts: Any, base: Any, out: Any) -> None:
    """The touched weights become the base."""
    for group in range(starts.size - 1):
        _restore_group(group, entries, starts, base, out)


@compiled
def _sparse_switch(
    old: Any, old_starts: Any,
    entries: Any, starts: Any, table: Any, rows: Any, base: Any, source: Any, out: Any,
) -> None:  # fmt: skip
    """Both, a group at a time: what the first touched is still in the cache for the second."""
    for group in range(starts.size - 1):
        _restore_group(group, old, old_starts, base, out)
        _apply_group(group, entries, starts, table, rows, source, out)


@compiled
def _mix(x: Any) -> Any:
    x = np.uint32(x ^ x >> np.uint32(16))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ x >> np.uint32(15))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ x >> np.uint32(16))


@compiled
def _positions(low: Any, high: Any, stride: Any, numel: Any, one: Any, two: Any, at: Any) -> None:
    """Which weights of a tensor have the values of groups low .. high - 1.

    In a loop of its own, which the processor works off many at a time: reads and writes that wait
    for a hash each would wait for memory one after the other.
    """
    for group in range(low, high):
        number = np.uint64(group)
        h = _mix(np.uint32(np.uint32(number) ^ np.uint32(one)))
        h = _mix(np.uint32(h ^ np.uint32(two) ^ np.uint32(number >> np.uint64(32))))
        size = min(stride, numel - group * stride)
        within = np.int64(np.uint64(h) * np.uint64(size) >> np.uint64(32))
        at[group - low] = group * stride + within


@compiled
def _steps(planes: Any, levels: Any, first: Any, count: Any, codes: Any, steps: Any) -> None:
    """The levels of some values in a row, from a whole byte of the planes on."""
    codes[:] = 0
    for k in range(planes.shape[0]):
        for byte in range((count + 7) // 8):
            bits = planes[k, first // 8 + byte]
            for j in range(8):
                codes[8 * byte + j] |= (bits >> np.uint8(j) & np.uint8(1)) << np.uint8(k)
    for n in range(count):
        steps[n] = levels[codes[n]]


@compiled
def _seeded_apply(
    offset: Any, numel: Any, stride: Any, one: Any, two: Any, start: Any,
    planes: Any, levels: Any, source: Any, out: Any,
) -> None:  # fmt: skip
    """The weights of one seeded tensor that have a value become what `source` has + level."""
    groups = (numel + stride - 1) // stride
    where, codes = np.empty(_STEP, np.int64), np.empty(_STEP, np.uint8)
    steps = np.empty(_STEP, np.float32)
    for low in range(0, groups, _STEP):
        high = min(low + _STEP, groups)
        _positions(low, high, stride, numel, one, two, where)
        _steps(planes, levels, start + low, high - low, codes, steps)
        for n in range(high - low):
            at = offset + where[n]
            out[at] = _narrow(_wide(source[at]) + steps[n], out)


@compiled
def _seeded_restore(
    offset: Any, numel: Any, stride: Any, one: Any, two: Any, base: Any, out: Any
) -> None:
    """The weights of one seeded tensor that have a value become the base."""
    groups = (numel + stride - 1) // stride
    where = np.empty(_STEP, np.int64)
    for low in range(0, groups, _STEP):
        high = min(low + _STEP, groups)
        _positions(low, high, stride, numel, one, two, where)
        for n in range(high - low):
            at = offset + where[n]
            out[at] = _narrow(_wide(base[at]), out)


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
def _touch(
    row: Any, base: Any, out: Any, octets: Any, shorts: Any, ints: Any, longs: Any, floats: Any
) -> None:
    """A row of `ops.programs.Touches`."""
    kind, count, job = row[0], row[1], row[5:]
    one, source = array_at(row[2], count, base), array_at(row[3], count, base)
    to = array_at(row[4], count, out)
    if kind == RESTORE:
        _sparse_restore(array_at(job[0], job[1], shorts), array_at(job[2], job[3], longs), one, to)
    elif kind == APPLY:
        table = array_at(job[4], job[5] * job[6], floats).reshape((job[5], job[6]))
        rows = array_at(job[7], job[8], ints)
        entries, starts = array_at(job[0], job[1], shorts), array_at(job[2], job[3], longs)
        _sparse_apply(entries, starts, table, rows, source, to)
    elif kind == SWITCH:
        old, new = job, job[9:]
        table = array_at(new[4], new[5] * new[6], floats).reshape((new[5], new[6]))
        rows = array_at(new[7], new[8], ints)
        entries, starts = array_at(new[0], new[1], shorts), array_at(new[2], new[3], longs)
        before, old_starts = array_at(old[0], old[1], shorts), array_at(old[2], old[3], longs)
        _sparse_switch(before, old_starts, entries, starts, table, rows, one, source, to)
    elif kind == RESTORE_SEEDED:
        _seeded_restore(job[0], job[1], job[2], job[3], job[4], one, to)
    else:
        planes = array_at(job[6], job[7] * job[8], octets).reshape((job[7], job[8]))
        steps = array_at(job[9], 1 << job[7], floats)
        _seeded_apply(job[0], job[1], job[2], job[3], job[4], job[5], planes, steps, source, to)


@compiled
def run_touches(
    jobs: Any, ends: Any, base: Any, out: Any,
    octets: Any, shorts: Any, ints: Any, longs: Any, floats: Any, tickets: Any,
) -> None:  # fmt: skip
    """Tensors that no other thread does: rows ends[n] .. ends[n + 1] - 1 of `jobs` are of one.

    It is one thread's, since its rows come one after the other. See `ops.programs.Touches`.
    """
    while True:
        n = draw(tickets.ctypes.data)
        if n >= ends.size - 1:
            break
        for row in range(ends[n], ends[n + 1]):
            _touch(jobs[row], base, out, octets, shorts, ints, longs, floats)
