"""Differences from words that the reader has: what a difference is likely to be, they tell.

The raw bytes are zigzag differences of float bit patterns from those of `side`, as
`tallstore.coding.residual` makes them. How large one is follows from two things: how far its
neighbours moved, stored as a class for every block of 128; and the exponent of its word of `side`,
whose last place is the unit that it is counted in. Their ratio, in half octaves, is the context of
a difference. Differences are sorted by context, stably, and those of one context written together:
the lowest `shift` bits, which are noise, as they are; what is left as symbols of 1, 2, 4 or 8 bits,
Huffman-coded a byte at a time.

Of float32, weights that no gradient reached have often decayed: all by one factor, which each
difference would tell again. So differences are taken from ``side * factor`` instead, rounded.

Payload: see FORMAT.md. `parameter` is the dtype: 1 bfloat16, 2 float16, 3 float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tallstore import compiling
from tallstore.codecs import zstd
from tallstore.codecs.bodies import BodyWriter
from tallstore.codecs.codec import Bytes
from tallstore.codecs.guidedpayload import (
    BLOCK,
    CONTEXTS,
    GROUP,
    HEAD,
    Payload,
    low_parts,
    take_apart,
)
from tallstore.codecs.ordered import Words, ordered, unordered, unzigzag, zigzag
from tallstore.errors import CorruptStoreError
from tallstore.scratch import Scratch

__all__ = ["DTYPES", "GuidedCodec"]

#: Weights that are looked at, or sorted, at a time: few enough for the cache, which makes it up to
#: ten times faster.
_PIECE: Final = 1 << 15
#: Context of a mean difference of one last place.
_ONE: Final = 10
#: A mean of so much is as large as symbols of a byte should be: few reach 255.
_LARGE: Final = 48

_SCRATCH: Final = Scratch()
#: Of no bytes: what loops know them by.
_OCTETS: Final = np.zeros(0, np.uint8)


@dataclass(frozen=True, slots=True)
class _Float:
    """Where a float's exponent is."""

    word: type[np.unsignedinteger[Any]]
    mantissa: int
    exponent: int

    @property
    def unit(self) -> int:
        """A float of biased exponent e has a last place of ``2 ** (e - unit)``."""
        return self.mantissa + (1 << self.exponent - 1) - 1

    def floats(self, words: Words) -> npt.NDArray[np.float64]:
        """Their values."""
        if self.mantissa == 7:
            return (words.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        floats: Any = np.float16 if self.mantissa == 10 else np.float32
        values: npt.NDArray[np.float64] = words.view(floats).astype(np.float64)
        return values

    def exponents(self, words: Words) -> Words:
        """Biased exponents; subnormals have the unit of the least normal number."""
        found: Words = words >> self.word(self.mantissa) & self.word((1 << self.exponent) - 1)
        np.maximum(found, self.word(1), out=found)
        return found


#: `parameter` by dtype.
DTYPES: Final = MappingProxyType({"bfloat16": 1, "float16": 2, "float32": 3})

_FLOATS: Final = {
    1: _Float(np.uint16, 7, 8),
    2: _Float(np.uint16, 10, 5),
    3: _Float(np.uint32, 23, 8),
}


class GuidedCodec:
    """Differences from words that the reader has; see the module's text."""

    number: Final[int] = 4

    def encode(
        self, data: Bytes, *, parameter: int, min_gain: float, side: Bytes | None = None
    ) -> bytes | None:
        """Class, sort, write group by group; None too where there is no `side` of that size."""
        if side is None or side.size != data.size or not data.size:
            return None
        kind = _FLOATS[parameter]
        words, known = data.view(kind.word), side.view(kind.word)
        factor = np.float32(1)
        if parameter == 3:
            factor = _factor(words, known)
            if factor != 1:
                start, words = words, np.empty_like(words)
                for at in _cut(words.size):
                    words[at] = zigzag(unzigzag(start[at]) - _decay(known[at], factor))
        first, classes = _classes(kind, words, known, factor)
        groups: list[list[Words]] = [[] for _ in range(CONTEXTS)]
        for at, order, counts in _pieces(kind, known, first, classes):
            ends = np.cumsum(counts)
            for context, part in enumerate(np.split(words[at][order], ends[:-1])):
                groups[context].append(part)
        bodies = BodyWriter()
        bodies.add(classes)
        heads, overflows = [], []
        for context, parts in enumerate(groups[1:], 1):
            group = np.concatenate(parts)
            if group.size:
                shift, width, over = _write(group, bodies)
                overflows.append(over)
                heads.append(GROUP.pack(context, shift, width, 0, group.size))
        over = np.concatenate([np.zeros(0, np.uint32), *overflows])
        bodies.add(np.ascontiguousarray(over.view(np.uint8).reshape(-1, 4).T).ravel())
        head = HEAD.pack(words.size, factor, first, len(heads), over.size)
        payload = head + b"".join(heads) + bodies.to_bytes()
        return payload if len(payload) <= (1 - min_gain) * data.size else None

    def decode(
        self, payload: memoryview, out: Bytes, *, parameter: int, side: Bytes | None = None
    ) -> None:
        """Read the groups, and put each difference in its place."""
        kind = _FLOATS.get(parameter)
        if kind is None:
            raise CorruptStoreError(f"differences of dtype {parameter} do not exist")
        if side is None or side.size != out.size or out.size % kind.word().itemsize:
            raise CorruptStoreError("differences without the words that they are from")
        words, known = out.view(kind.word), side.view(kind.word)
        parts = take_apart(payload, words.size, words.itemsize)
        if compiling.loaded() and words.flags.aligned and known.flags.aligned:
            left = _place_compiled(parts, kind, known, words)
        else:
            left = _place(parts, kind, known, words)
        if left:
            raise CorruptStoreError(
                f"groups of differences are too {'long' if left > 0 else 'short'}"
            )


def _place(payload: Payload, kind: _Float, known: Words, words: Words) -> int:
    """Fill `words`; how many are left over, less than 0 where there are too few."""
    groups, factor = _words(payload, kind), payload.factor
    taken = [0] * CONTEXTS
    for at, order, counts in _pieces(kind, known, payload.first, payload.classes):
        parts = [np.zeros(counts[0], kind.word)]
        for context in np.flatnonzero(counts[1:]) + 1:
            start = taken[context]
            taken[context] = stop = start + int(counts[context])
            parts.append(groups[context][start:stop])
        found = np.concatenate(parts)
        if found.size != order.size:
            return -1
        here = words[at]
        here[order] = found
        if factor != 1:
            here[:] = zigzag(unzigzag(here) + _decay(known[at], factor))
    return sum(group.size for group in groups) - sum(taken)


def _place_compiled(payload: Payload, kind: _Float, known: Words, words: Words) -> int:
    """The same by the loops of `guidedloops`, a few times as fast."""
    from tallstore.codecs import guidedloops as loops

    numbers = []
    for group in payload.groups:
        parts = [_address(part) for part in (group.symbols, *group.low)]
        head = group.context, group.size, group.shift, group.width
        numbers.append((*head, *parts, *[0] * (loops.NUMBERS - len(head) - len(parts))))
    rows = np.array(numbers, np.int64).reshape(-1, loops.NUMBERS)
    room = _SCRATCH.take("words", (words.size + loops.SLACK) * words.itemsize).view(kind.word)
    wanted = loops.join(rows, payload.large.copy(), room, _OCTETS)
    _check_large(wanted, payload.large.size // 4)
    left: int = loops.place(
        rows, room, payload.classes.copy(), payload.first + 2 * kind.unit + _ONE,
        np.uint32(kind.mantissa), np.uint32((1 << kind.exponent) - 1), payload.factor,
        _address(known), _address(words), words.size, room[:0],
    )  # fmt: skip
    return left


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _pieces(
    kind: _Float, known: Words, first: int, classes: Bytes
) -> Iterator[tuple[slice, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """For each piece: where it is, its order by context, and how many words each context has."""
    # Half octaves of the mean difference, counted in the last places of each word.
    scale = (classes.astype(np.int16) + np.int16(first + 2 * kind.unit + _ONE))[:, None]
    for at in _cut(known.size):
        blocks = slice(at.start // BLOCK, -(-at.stop // BLOCK))
        some = np.zeros(-(-(at.stop - at.start) // BLOCK) * BLOCK, np.int16)
        np.copyto(some[: at.stop - at.start], kind.exponents(known[at]), casting="unsafe")
        ratio = scale[blocks] - (some.reshape(-1, BLOCK) << np.int16(1))
        np.clip(ratio, 1, CONTEXTS - 1, out=ratio)
        np.copyto(ratio, 0, where=(classes[blocks] == 0)[:, None])
        contexts = ratio.ravel()[: at.stop - at.start].astype(np.uint8)
        yield at, np.argsort(contexts, kind="stable"), np.bincount(contexts, minlength=CONTEXTS)


def _classes(kind: _Float, words: Words, known: Words, factor: np.float32) -> tuple[int, Bytes]:
    """The class before the first one, and one for each block; 0 where nothing differs.

    By how far floats moved, not by the differences: those across zero are huge.
    """
    blocks = -(-words.size // BLOCK)
    mean, classes = np.empty(blocks), np.empty(blocks, np.uint8)
    for at in _cut(words.size):
        rows = slice(at.start // BLOCK, -(-at.stop // BLOCK))
        mean[rows] = _by_block(_far(kind, words[at], known[at], factor)).mean(axis=1)
        classes[rows] = _by_block(words[at]).any(axis=1)
    moved = mean > 0
    if not moved.any():
        return 0, classes
    octaves = np.rint(2 * np.log2(mean[moved])).astype(np.int64)
    first = max(int(octaves.min()) - 1, int(octaves.max()) - 255)
    classes[moved] = np.maximum(octaves - first, 1)
    return first, classes


def _far(kind: _Float, words: Words, known: Words, factor: np.float32) -> npt.NDArray[np.float64]:
    """How far floats moved; 0 where that is not finite."""
    start = known if factor == 1 else unordered(ordered(known) + _decay(known, factor))
    with np.errstate(all="ignore"):
        far = np.abs(kind.floats(unordered(ordered(start) + unzigzag(words))) - kind.floats(start))
    np.copyto(far, 0, where=~np.isfinite(far))
    return far


def _cut(count: int) -> Iterator[slice]:
    """Pieces that fit the cache, of whole blocks but for the last."""
    for start in range(0, count, _PIECE):
        yield slice(start, min(start + _PIECE, count))


def _by_block(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)


def _factor(words: Words, known: Words) -> np.float32:
    """What weights that have merely decayed were multiplied by; 1 where few have."""
    blocks = known.size // BLOCK
    ratio, decayed = np.empty(blocks), np.empty(blocks, np.bool_)
    for at in _cut(blocks * BLOCK):
        rows = slice(at.start // BLOCK, at.stop // BLOCK)
        ratio[rows], decayed[rows] = _decays(words[at], known[at])
    if np.count_nonzero(decayed) * 64 <= decayed.size:
        return np.float32(1)
    return np.float32(np.median(ratio[decayed]))


def _decays(words: Words, known: Words) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """By what each block would have decayed, and whether it has."""
    with np.errstate(all="ignore"):
        actual = unordered(ordered(known) + unzigzag(words)).view(np.float32)
        one = known.view(np.float32).reshape(-1, BLOCK).astype(np.float64)
        other = actual.reshape(-1, BLOCK).astype(np.float64)
        square, moved = (one * one).sum(axis=1), np.square(other - one).sum(axis=1)
        ratio = (one * other).sum(axis=1) / square
        left = np.square(other - ratio[:, None] * one).sum(axis=1)
        decayed = (left < 0.01 * moved) & (np.abs(ratio - 1) < 0.1)
    return ratio, decayed


def _decay(known: Words, factor: np.float32) -> Words:
    """``known * factor`` in places after `known`, whatever is not finite left as it is."""
    with np.errstate(all="ignore"):
        scaled = (known.view(np.float32) * factor).view(np.uint32)
    difference = ordered(scaled) - ordered(known)
    special = known & np.uint32(0x7F800000) == np.uint32(0x7F800000)
    np.copyto(difference, 0, where=special)
    return difference


def _write(group: Words, bodies: BodyWriter) -> tuple[int, int, npt.NDArray[np.uint32]]:
    """Add the bodies of a group; its shift, its width, and what its symbols could not hold."""
    mean = float(group.mean(dtype=np.float64))
    shift = 0
    while mean > _LARGE << shift and shift < 8 * group.itemsize - 8:
        shift += 2
    high = group >> group.dtype.type(shift)
    widths = [8]
    if not shift:
        widths += [w for w, most in ((4, 6.0), (2, 1.5), (1, 0.2)) if mean < most]
    best: tuple[int, int, Bytes] | None = None
    for width in widths:
        most = (1 << width) - 1
        symbols = _join(np.minimum(high, group.dtype.type(most)).astype(np.uint8), width)
        frame = zstd.literals(symbols)
        cost = min(len(frame), symbols.size) + 2 * int(np.count_nonzero(high >= most))
        if best is None or cost < best[0]:
            best = cost, width, symbols
    assert best is not None
    _, width, symbols = best
    most = (1 << width) - 1
    bodies.add(symbols)
    for place, bits in low_parts(shift):
        low = (group >> group.dtype.type(place)).astype(np.uint8) & np.uint8((1 << bits) - 1)
        bodies.add(_join(low, bits))
    over = high[high >= most].astype(np.uint32) - np.uint32(most)
    return shift, width, over


def _words(payload: Payload, kind: _Float) -> list[Words]:
    """The words of each context."""
    found: list[Words] = [np.zeros(0, kind.word)] * CONTEXTS
    large = np.ascontiguousarray(payload.large.reshape(4, -1).T).view("<u4").ravel()
    held, wanted = [], 0
    for group in payload.groups:
        symbols = _part(group.symbols, group.width, group.size)
        over = np.flatnonzero(symbols == (1 << group.width) - 1)
        held.append((symbols.astype(kind.word), over))
        wanted += over.size
    _check_large(wanted, large.size)
    taken = 0
    for group, (words, over) in zip(payload.groups, held, strict=True):
        words[over] += large[taken : taken + over.size].astype(kind.word)
        taken += over.size
        if group.shift:
            np.left_shift(words, kind.word(group.shift), out=words)
        for (place, bits), low in zip(low_parts(group.shift), group.low, strict=True):
            words |= _part(low, bits, group.size).astype(kind.word) << kind.word(place)
        found[group.context] = words
    return found


def _check_large(wanted: int, there: int) -> None:
    if wanted != there:
        raise CorruptStoreError("differences too large for their symbols: another number of them")


def _join(symbols: Bytes, width: int) -> Bytes:
    """Symbols of `width` bits in bytes, the first in the lowest bits."""
    if width == 8:
        return symbols
    if width == 1:
        return np.packbits(symbols, bitorder="little")
    rows = np.pad(symbols, (0, -symbols.size % (8 // width))).reshape(-1, 8 // width)
    joined = rows[:, 0].copy()
    for place in range(1, 8 // width):
        joined |= rows[:, place] << np.uint8(width * place)
    return joined


def _part(joined: Bytes, width: int, count: int) -> Bytes:
    """The inverse of `_join`."""
    if width == 8:
        return joined
    if width == 1:
        return np.unpackbits(joined, count=count, bitorder="little")
    # All symbols of a byte at once, as the bytes of a little-endian word.
    if width == 4:
        wide: Words = joined.astype("<u2")
        wide |= wide << np.uint16(4)
        wide &= np.uint16(0x0F0F)
    else:
        wide = joined.astype("<u4")
        wide |= wide << np.uint32(12)
        wide |= wide << np.uint32(6)
        wide &= np.uint32(0x03030303)
    parts: Bytes = wide.view(np.uint8)[:count]
    return parts
