"""The loops of `tallstore.codecs.guided`, for numba; imported only where it is: see `compiling`.

Two passes. The words of all groups are put together, one group after the other, as they are read.
Then each weight takes the next word of its context: nothing is sorted.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tallstore.codecs.orderedloops import ordered, unzigzag, zigzag
from tallstore.jit import array_at, compiled

__all__ = ["NUMBERS", "SLACK", "join", "place"]

#: A group as a row of numbers: of its head, the address of its symbols, and of up to 5 low parts.
CONTEXT, SIZE, SHIFT, WIDTH, SYMBOLS, LOWS = range(6)
NUMBERS: Final = 10
#: Weights placed between two looks at whether a context took more words than it has.
SLACK: Final = 1 << 13
#: Words put together at a time: those stay in the nearest cache. Whole bytes of symbols each.
_TILE: Final = 1 << 12
_BLOCK: Final = 128
_CONTEXTS: Final = 64
_TOP: Final = np.uint32(1 << 31)
_SPECIAL: Final = np.uint32(0x7F800000)


@compiled
def _symbol(part: Any, bits: Any, at: Any) -> Any:
    place = at * bits
    most = np.uint32((1 << bits) - 1)
    return np.uint32(part[place >> 3] >> np.uint8(place & 7)) & most


@compiled
def _put(part: Any, bits: Any, up: Any, keep: Any, out: Any) -> None:
    """Set the bits of words from `up` on to symbols; of those set before, `keep` are kept."""
    done = 0
    # A loop for each width, of which the compiler knows how many symbols a byte has.
    if bits == 8:
        for j in range(out.size):
            out[j] = (out[j] & keep) | np.uint32(part[j]) << up
        return
    if bits == 4:
        done = out.size // 2
        for byte in range(done):
            some = np.uint32(part[byte])
            for k in range(2):
                symbol = some >> np.uint32(4 * k) & np.uint32(15)
                out[2 * byte + k] = (out[2 * byte + k] & keep) | symbol << up
        done *= 2
    elif bits == 2:
        done = out.size // 4
        for byte in range(done):
            some = np.uint32(part[byte])
            for k in range(4):
                symbol = some >> np.uint32(2 * k) & np.uint32(3)
                out[4 * byte + k] = (out[4 * byte + k] & keep) | symbol << up
        done *= 4
    for j in range(done, out.size):
        out[j] = (out[j] & keep) | _symbol(part, bits, j) << up


@compiled
def _put_bits(part: Any, out: Any) -> None:
    """Words of symbols of one bit, which have no shift."""
    done = out.size // 8
    for byte in range(done):
        some = np.uint32(part[byte])
        for k in range(8):
            out[8 * byte + k] = some >> np.uint32(k) & np.uint32(1)
    for j in range(8 * done, out.size):
        out[j] = _symbol(part, 1, j)


@compiled
def _largest(part: Any, bits: Any, count: Any) -> Any:
    """How many of the symbols have all bits set."""
    found: Any = 0
    if bits == 8:
        for j in range(count):
            found += part[j] == np.uint8(255)
        return found
    whole = count * bits // 8
    if bits == 4:
        for byte in range(whole):
            some = part[byte]
            found += (some & np.uint8(15)) == np.uint8(15)
            found += some >= np.uint8(240)
    elif bits == 2:
        for byte in range(whole):
            some = np.int64(part[byte] & part[byte] >> np.uint8(1))
            found += (some & 1) + (some >> 2 & 1) + (some >> 4 & 1) + (some >> 6 & 1)
    else:
        for byte in range(whole):
            some = np.int64(part[byte])
            for k in range(8):
                found += some >> k & 1
    for j in range(whole * 8 // bits, count):
        found += _symbol(part, bits, j) == np.uint32((1 << bits) - 1)
    return found


@compiled
def _enlarge(part: Any, bits: Any, up: Any, large: Any, taken: Any, out: Any) -> Any:
    """Add the large values to the words that have one; how many are taken, at most all."""
    most, many = np.uint32((1 << bits) - 1), large.size // 4
    for j in range(out.size):
        if _symbol(part, bits, j) == most and taken < many:
            value = np.uint32(0)
            for plane in range(4):
                byte = np.uint32(large[taken + plane * many])
                value = np.uint32(value | byte << np.uint32(8 * plane))
            out[j] += value << up
            taken += 1
    return taken


@compiled
def join(rows: Any, large: Any, words: Any, octets: Any) -> Any:
    """Put the words of all groups into `words`, group after group; how many large values they want.

    Whoever calls has checked that the groups' sizes come to no more than `words` has, and that each
    part has the bytes that its symbols need. Large values that are not there are taken for 0.
    """
    start, wanted, taken = 0, 0, 0
    for group in range(rows.shape[0]):
        row = rows[group]
        shift, width = row[SHIFT], row[WIDTH]
        up = np.uint32(shift)
        symbols = array_at(row[SYMBOLS], (row[SIZE] * width + 7) // 8, octets)
        for first in range(0, row[SIZE], _TILE):
            count = min(_TILE, row[SIZE] - first)
            out = words[start + first : start + first + count]
            some = symbols[first * width // 8 :]
            if width == 1 and not shift:
                _put_bits(some, out)
            else:
                _put(some, width, up, np.uint32(0), out)
            largest = _largest(some, width, count)
            if largest:
                wanted += largest
                taken = _enlarge(some, width, up, large, taken, out)
            place, number = 0, LOWS
            while place < shift:
                left = shift - place
                bits = 8 if left >= 8 else 4 if left >= 4 else 2
                low = array_at(row[number], (row[SIZE] * bits + 7) // 8, octets)
                below = np.uint32(0xFFFFFFFF)
                _put(low[first * bits // 8 :], bits, np.uint32(place), below, out)
                place, number = place + bits, number + 1
        start += row[SIZE]
    return wanted


@compiled
def _contexts(known: Any, scale: Any, mantissa: Any, mask: Any, out: Any) -> None:
    """The contexts of words of a block whose class and the rest come to `scale`."""
    for j in range(known.size):
        exponent = np.int32(known[j] >> mantissa & mask)
        ratio = np.int32(scale - 2 * max(exponent, np.int32(1)))
        out[j] = np.uint8(min(max(ratio, np.int32(1)), np.int32(_CONTEXTS - 1)))


@compiled
def _take(contexts: Any, words: Any, cursors: Any, out: Any) -> None:
    for j in range(out.size):
        context = contexts[j]
        cursor = cursors[context]
        out[j] = words[cursor]
        cursors[context] = cursor + 1


@compiled
def _decayed(known: Any, factor: Any, out: Any) -> None:
    """Turn differences from known weights times a factor into those from the known ones."""
    for j in range(out.size):
        word = np.uint32(known[j])
        scaled = np.float32(word.view(np.float32) * factor).view(np.uint32)
        further = np.uint32(ordered(scaled, _TOP) - ordered(word, _TOP))
        special = (word & _SPECIAL) == _SPECIAL
        moved = unzigzag(np.uint32(out[j])) + (np.uint32(0) if special else further)
        out[j] = zigzag(np.uint32(moved), _TOP)


@compiled
def place(
    rows: Any, words: Any, classes: Any, first: Any, mantissa: Any, mask: Any, factor: Any,
    known_at: Any, out_at: Any, count: Any, like: Any,
) -> Any:  # fmt: skip
    """Give each weight the next word of its context; how many words too many there are.

    Less than 0: there are too few. `words` has room for `SLACK` more than the groups have, which
    what is taken too much may be read from.
    """
    known, out = array_at(known_at, count, like), array_at(out_at, count, like)
    cursors, ends = np.zeros(_CONTEXTS, np.int64), np.zeros(_CONTEXTS, np.int64)
    start = 0
    for group in range(rows.shape[0]):
        context = rows[group, CONTEXT]
        cursors[context] = start
        start += rows[group, SIZE]
        ends[context] = start
    contexts = np.empty(_BLOCK, np.uint8)
    for block in range(classes.size):
        low = _BLOCK * block
        here, there = out[low : low + _BLOCK], known[low : low + _BLOCK]
        if classes[block]:
            scale = np.int32(first + classes[block])
            _contexts(there, scale, mantissa, mask, contexts)
            _take(contexts, words, cursors, here)
        else:
            here[:] = 0
        if factor != np.float32(1):
            _decayed(there, factor, here)
        if low % SLACK == SLACK - _BLOCK and (cursors > ends).any():
            return -1
    if (cursors > ends).any():
        return -1
    return (ends - cursors).sum()
