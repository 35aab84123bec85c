"""Ways to damage a file; each a function of a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench.mutations.regions import Regions
from bench.mutations.stores import Wanted

__all__ = ["Mutation", "Victim", "mutate"]

_PAGE: Final = 4096
#: Kinds of damage that are not to one kind of byte.
_WHOLE: Final = (
    "truncated at a page",
    "truncated anywhere",
    "garbage appended",
    "pages swapped",
    "page of another store",
    "chunk of another store",
)


@dataclass(frozen=True)
class Victim:
    """A store to damage, and another made in the same way."""

    name: str
    data: bytes
    regions: Regions
    twin: bytes
    twin_regions: Regions
    wanted: Wanted | None
    """What it holds, but for the engine's own."""


@dataclass(frozen=True)
class Mutation:
    """A damaged file, and what was done to it."""

    kind: str
    """What kind of byte was hit, or one of the kinds of damage to the whole."""
    how: str
    data: bytes


def _flip(data: bytearray, low: int, high: int, draw: random.Random) -> str:
    place, bit = draw.randrange(low, high), draw.randrange(8)
    data[place] ^= 1 << bit
    return f"bit {bit} of byte {place} flipped"


def _byte(data: bytearray, low: int, high: int, draw: random.Random) -> str:
    place = draw.randrange(low, high)
    data[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    return f"byte {place} set to {data[place]}"


def _noise(data: bytearray, low: int, high: int, draw: random.Random) -> str:
    start = draw.randrange(low, high)
    stop = min(high, start + draw.choice((2, 4, 8, 16, 64, 4096)))
    data[start:stop] = draw.randbytes(stop - start)
    return f"bytes {start} to {stop} random"


def _zeros(data: bytearray, low: int, high: int, draw: random.Random) -> str:
    start = draw.randrange(low, high)
    stop = min(high, start + draw.choice((2, 8, 64, 512, 4096)))
    data[start:stop] = bytes(stop - start)
    return f"bytes {start} to {stop} zeroed"


def _number(data: bytearray, low: int, high: int, draw: random.Random) -> str:
    """A field of two, four or eight bytes set to a number that could be meant."""
    width = draw.choice((2, 4, 8))
    place = min(draw.randrange(low, high) // 2 * 2, len(data) - width)
    pages = len(data) // _PAGE
    value = draw.choice(
        (draw.randrange(pages + 2), draw.randrange(_PAGE), 2**31, 2**63 - 1, 2**64 - 1, pages)
    )
    data[place : place + width] = (value % 256**width).to_bytes(width, "little")
    return f"{width} bytes at {place} set to {value % 256**width}"


def _page(data: bytearray, low: int, high: int, draw: random.Random) -> str:
    page = draw.randrange(low, high) // _PAGE
    noise = draw.random() < 0.5
    data[page * _PAGE : (page + 1) * _PAGE] = draw.randbytes(_PAGE) if noise else bytes(_PAGE)
    return f"page {page} {'random' if noise else 'zeroed'}"


_WAYS: Final[tuple[Callable[[bytearray, int, int, random.Random], str], ...]] = (
    *(_flip, _flip, _flip, _byte, _noise, _zeros, _number, _number, _page),
)


def _swap(victim: Victim, data: bytearray, draw: random.Random) -> str:
    one, two = draw.sample(range(len(data) // _PAGE), 2)
    low, high = slice(one * _PAGE, (one + 1) * _PAGE), slice(two * _PAGE, (two + 1) * _PAGE)
    data[low], data[high] = data[high], data[low]
    return f"pages {one} and {two} swapped"


def _foreign_page(victim: Victim, data: bytearray, draw: random.Random) -> str:
    source = draw.randrange(len(victim.twin) // _PAGE)
    kinds = [kind for kind in ("meta page", "branch page", "leaf page") if draw.random() < 0.5]
    if kinds:  # pages that fit in well: of the same number
        low, _ = draw.choice(victim.twin_regions[draw.choice(kinds)])
        source = low // _PAGE
    target = source if draw.random() < 0.7 else draw.randrange(len(data) // _PAGE)
    data[target * _PAGE : (target + 1) * _PAGE] = victim.twin[source * _PAGE : (source + 1) * _PAGE]
    return f"page {target} replaced by page {source} of another store"


def _foreign_chunk(victim: Victim, data: bytearray, draw: random.Random) -> str:
    kinds = [k for k in victim.regions if k.endswith(" payload") and k in victim.twin_regions]
    kind = draw.choice(kinds)
    low, high = draw.choice(victim.regions[kind])
    fits = [e for e in victim.twin_regions[kind] if e[1] - e[0] == high - low]
    other = draw.choice(fits or victim.twin_regions[kind])
    size = min(high - low, other[1] - other[0])
    data[low - 48 : low + size] = victim.twin[other[0] - 48 : other[0] + size]
    return f"the chunk at {low - 48} replaced by that at {other[0] - 48} of another store"


def _whole(kind: str, victim: Victim, data: bytearray, draw: random.Random) -> str:
    if kind == "truncated at a page":
        size = draw.randrange(len(data) // _PAGE) * _PAGE
        del data[size:]
        return f"cut to {size} bytes"
    if kind == "truncated anywhere":
        size = draw.choice((draw.randrange(len(data)), draw.randrange(300), len(data) - 1))
        del data[size:]
        return f"cut to {size} bytes"
    if kind == "garbage appended":
        data += draw.randbytes(draw.choice((1, 100, _PAGE, 3 * _PAGE + 5)))
        return f"grown to {len(data)} bytes"
    if kind == "pages swapped":
        return _swap(victim, data, draw)
    if kind == "page of another store":
        return _foreign_page(victim, data, draw)
    return _foreign_chunk(victim, data, draw)


def mutate(victim: Victim, seed: int) -> Mutation:
    """Damage a store in the way that `seed` says."""
    draw = random.Random(seed)
    kind = draw.choice([*victim.regions, *_WHOLE])
    data = bytearray(victim.data)
    if kind in _WHOLE:
        return Mutation(kind, _whole(kind, victim, data, draw), bytes(data))
    low, high = draw.choice(victim.regions[kind])
    return Mutation(kind, draw.choice(_WAYS)(data, low, high, draw), bytes(data))
