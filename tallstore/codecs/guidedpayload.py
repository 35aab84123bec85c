"""The payload of `tallstore.codecs.guided`, taken apart, and checked as far as it can be."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from tallstore.codecs.bodies import BodyReader
from tallstore.codecs.codec import Bytes
from tallstore.errors import CorruptStoreError

__all__ = ["BLOCK", "CONTEXTS", "GROUP", "HEAD", "Group", "Payload", "low_parts", "take_apart"]

#: Weights a block, all of one class.
BLOCK: Final = 128
#: Contexts; 0 is a block without a difference, of which nothing is stored.
CONTEXTS: Final = 64
#: No class is as far from 1 as this.
_FARTHEST: Final = 1024

# words, factor, first class, groups, overflows
HEAD: Final = struct.Struct("<IfhHI")
# context, shift, width, zero, words
GROUP: Final = struct.Struct("<BBBBI")


@dataclass(frozen=True, slots=True)
class Group:
    """The words of one context."""

    context: int
    size: int
    shift: int
    width: int
    symbols: Bytes
    """Of `width` bits each, packed."""
    low: list[Bytes]
    """Packed as well, for each of `low_parts`."""


@dataclass(frozen=True, slots=True)
class Payload:
    """Everything that a payload has; whether its words are as many as wanted remains to be seen."""

    factor: np.float32
    first: int
    """The class before the first one."""
    classes: Bytes
    groups: list[Group]
    """At most as many words as are expected; contexts ascend."""
    large: Bytes
    """4 byte planes of what symbols could not hold."""


def take_apart(payload: memoryview, count: int, itemsize: int) -> Payload:
    """The parts of the payload of so many words of so many bytes.

    Raises
    ------
    CorruptStoreError
        There is no such payload.
    """
    if len(payload) < HEAD.size:
        raise CorruptStoreError("a payload of differences ends within its head")
    words, factor, first, groups, overflows = HEAD.unpack_from(payload)
    if words != count or groups >= CONTEXTS or overflows > count:
        raise CorruptStoreError(
            f"{words} differences in {groups} groups where {count} are expected"
        )
    start = HEAD.size + groups * GROUP.size
    if not -_FARTHEST <= first <= _FARTHEST:
        raise CorruptStoreError(f"differences of a size that no float has: class {first}")
    if len(payload) < start:
        raise CorruptStoreError("a payload of differences ends within its groups")
    if itemsize != 4 and factor != 1:
        raise CorruptStoreError(f"a factor of {factor} where there is none")
    bodies = BodyReader(payload[start:])
    classes = bodies.take(-(-count // BLOCK))
    found: list[Group] = []
    before, total = 0, 0
    for number in range(groups):
        head = GROUP.unpack_from(payload, HEAD.size + number * GROUP.size)
        context, shift, width, zero, size = head
        total += size
        known = width in (1, 2, 4, 8) and shift % 2 == 0 and shift < 8 * itemsize
        if not before < context < CONTEXTS or zero or not known or not size or total > count:
            raise CorruptStoreError(f"a group of differences that cannot be: {head}")
        before = context
        symbols = bodies.take(-(-size * width // 8))
        low = [bodies.take(-(-size * bits // 8)) for _, bits in low_parts(shift)]
        found.append(Group(context, size, shift, width, symbols, low))
    large = bodies.take(4 * overflows)
    bodies.finish()
    return Payload(np.float32(factor), first, classes, found, large)


def low_parts(shift: int) -> list[tuple[int, int]]:
    """How the lowest bits are cut: (place, bits) of each part."""
    parts, place = [], 0
    for bits in (8, 4, 2):
        while shift - place >= bits:
            parts.append((place, bits))
            place += bits
    return parts
