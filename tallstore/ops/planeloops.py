"""Reconstruction from planes by loops that numba compiles: `ops.programs.Planes`.

The same arithmetic as `tallstore.kernels.reference`, without a temporary: each weight is read,
computed in float32 and written, at the speed of memory.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload

from tallstore.jit import array_at, compiled
from tallstore.ops.weightloops import NAN, bit, narrow, wide, word
from tallstore.ops.wide import LINE, WIDTH, draw, fence, fetch, write

__all__ = ["run_planes"]

#: Words of a plane whose weights are on their way into the nearest cache: a part of it.
_FETCHED: Final = 32


def _times(level: Any, vector: Any, at: Any) -> Any:
    """A level times a weight of the shared vector, if there is one."""
    raise NotImplementedError


@overload(_times, strict=False)
def _times_of(level: Any, vector: Any, at: Any) -> Any:
    if isinstance(vector, types.NoneType):
        return lambda level, vector, at: level
    return lambda level, vector, at: level * wide(vector[at])


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
def _one_plane(
    base: Any, plane: Any, vector: Any, low: Any, high: Any, out: Any, there: Any
) -> Any:
    """Base + level * vector, of one plane. All of one length, the plane of its bytes.

    Weights are left alone whose bits are those of `there`, if that has any; gives how many.
    """
    left, whole = 0, out.size // 32
    for w in range(whole):
        bits, first = word(plane, 4 * w), 32 * w
        if there.size and word(there, 4 * w) == bits:
            left += 32
            continue
        for j in range(32):
            level = high if (bits >> np.uint32(j)) & np.uint32(1) else low
            step = _times(level, vector, first + j)
            out[first + j] = narrow(wide(base[first + j]) + step, out)
    for at in range(32 * whole, out.size):
        level = high if (plane[at >> 3] >> np.uint8(at & 7)) & 1 else low
        step = _times(level, vector, at)
        out[at] = narrow(wide(base[at]) + step, out)
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
        bits = word(plane, 4 * w)
        if there.size and word(there, 4 * w) == bits:
            left += WIDTH
            continue
        while fetched < _FETCHED and ahead < words:
            if not there.size or word(there, 4 * ahead) != word(plane, 4 * ahead):
                for at in range(size * ahead * WIDTH, size * (ahead + 1) * WIDTH, LINE):
                    fetch(base + at)
                for at in range(step * ahead * WIDTH, step * (ahead + 1) * WIDTH, LINE):
                    fetch(vector + at)
                fetched += 1
            ahead += 1
        fetched -= 1
        n = WIDTH * w
        write(base + size * n, vector + step * n, bits, low, high, out + far * n,
              base_like, vector_like, out_like, np.uint16(NAN))  # fmt: skip
    return left


@compiled
def _pick(by: Any, one: Any, zero: Any) -> Any:
    """A select, which is faster over many weights at once than a look into a table."""
    return one if by else zero


@compiled
def _two_planes(base: Any, p0: Any, p1: Any, vector: Any, levels: Any, out: Any) -> None:
    """Base + levels[code] * vector, of two planes."""
    l0, l1, l2, l3 = levels[0], levels[1], levels[2], levels[3]
    whole = out.size // 32
    for w in range(whole):
        first = 32 * w
        w0, w1 = word(p0, 4 * w), word(p1, 4 * w)
        for j in range(32):
            b0, b1 = bit(w0, j), bit(w1, j)
            level = _pick(b1, _pick(b0, l3, l2), _pick(b0, l1, l0))
            step = _times(level, vector, first + j)
            out[first + j] = narrow(wide(base[first + j]) + step, out)
    for at in range(32 * whole, out.size):
        byte, j = at >> 3, at & 7
        code = bit(p0[byte], j) | bit(p1[byte], j) << 1
        step = _times(levels[code], vector, at)
        out[at] = narrow(wide(base[at]) + step, out)


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
        w0, w1, w2 = word(p0, 4 * w), word(p1, 4 * w), word(p2, 4 * w)
        w3 = word(p3, 4 * w) if p3.size else np.uint32(0)
        for j in range(32):
            b0, b1, b2, b3 = bit(w0, j), bit(w1, j), bit(w2, j), bit(w3, j)
            low, high = _of_eight(b0, b1, b2, levels, 0), _of_eight(b0, b1, b2, levels, 8)
            step = _times(_pick(b3, high, low), vector, first + j)
            out[first + j] = narrow(wide(base[first + j]) + step, out)
    for at in range(32 * whole, out.size):
        byte, j = at >> 3, at & 7
        code = bit(p0[byte], j) | bit(p1[byte], j) << 1 | bit(p2[byte], j) << 2
        if p3.size:
            code |= bit(p3[byte], j) << 3
        step = _times(levels[code], vector, at)
        out[at] = narrow(wide(base[at]) + step, out)


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
