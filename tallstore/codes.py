"""How a task's weights are coded: by tensor, and by stream. Part of a task's document.

A TALL mask is the code of one plane over the shared vector, whose levels are (0, 1); it needs no
`SegmentCode`. Every other code says by segment of the base which form it takes and its levels.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tallstore import strictjson
from tallstore.errors import CorruptStoreError
from tallstore.layout import BLOCK, Layout, Piece

__all__ = [
    "MAX_BITS",
    "MAX_STRIDE",
    "PLANES",
    "SEEDED",
    "SPARSE",
    "TALL_LEVELS",
    "ArenaCode",
    "SeededPiece",
    "SegmentCode",
    "SegmentStats",
    "code_from_json",
    "code_to_json",
    "level_rows",
    "levels_to_json",
    "seeded_capacity",
    "seeded_pieces",
    "segment_code_from_json",
    "stats_from_json",
    "stats_to_json",
]

#: The forms of a `SegmentCode`.
PLANES: Final = "planes"
SPARSE: Final = "sparse"
SEEDED: Final = "seeded"
_FORMS: Final = (PLANES, SPARSE, SEEDED)

#: Most planes of codes over the weights, and most bits of a seeded value.
MAX_BITS: Final = 4
#: The longest stride of seeded values.
MAX_STRIDE: Final = (1 << 31) - 1
#: Levels of a TALL mask: a weight takes the shared vector or leaves it.
TALL_LEVELS: Final = (0.0, 1.0)
#: Level of a weight that no value touches: x + -0.0 is x for every x, to the bit.
_UNTOUCHED: Final = -0.0
_SHARED, _OVER_BASE = 1, 2
_FLOAT: Final = struct.Struct("<f")
#: What rounds to float32's largest, and not to infinity.
_MAX_LEVEL: Final = float.fromhex("0x1.fffffefp+127")
_MAX_COUNT: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class SegmentCode:
    """How one of the base's segments is coded."""

    segment: int
    form: str
    """`PLANES`: every weight has a code of log2(len(levels)) bits. `SPARSE`: a weight is left, or
    moved by + or - the one level. `SEEDED`: one weight in `stride`, where a hash says, has a value,
    a code of log2(len(levels)) bits; the others are left."""
    levels: tuple[float, ...]
    """float32 numbers."""
    stride: int = 0
    """Of `SEEDED`; else 0."""

    @property
    def bits(self) -> int:
        """Bits of a code or value; of a sparse sign 2."""
        return 2 if self.form == SPARSE else (len(self.levels) - 1).bit_length()

    @property
    def planes(self) -> int:
        """Planes over the weights that its codes take once they are laid out."""
        return min(self.bits + 1, MAX_BITS) if self.form == SEEDED else self.bits

    def describe(self) -> str:
        """In a few words: ``"mask"``, ``"signs"``, ``"levels, 2 bits"``."""
        if self.form == SPARSE:
            return "signs"
        if self.form == SEEDED:
            return f"seeded 1/{self.stride}, {self.bits} bits"
        return "mask" if self.levels == TALL_LEVELS else f"levels, {self.bits} bits"

    def row(self, planes: int) -> list[float]:
        """The levels of the codes over the weights: 2**planes of them."""
        found = {
            PLANES: list(self.levels),
            SPARSE: [_UNTOUCHED, *self.levels, *(-level for level in self.levels)],
            SEEDED: [_UNTOUCHED, *self.levels],
        }[self.form][: 1 << planes]
        return found + [_UNTOUCHED] * ((1 << planes) - len(found))


@dataclass(frozen=True, slots=True)
class ArenaCode:
    """A task's streams over one arena of the base; each has a chunk a span."""

    arena: int
    dtype: str
    """Of the task's weights there."""
    planes: int | None
    """Stream of packed planes; None: nothing has such a code."""
    exact: int | None
    """Stream of the residual; None where none is kept."""
    sparse: int | None = None
    """Stream of sparse signs: two planes a span, of what is moved by + and by -."""
    seeded: int | None = None
    """Stream of seeded values: as many planes as the widest has bits."""
    bits: int = 1
    """Planes of the stream `planes`."""
    value_bits: int = 0
    """Planes of the stream `seeded`."""
    shared: bool = True
    """Whether the codes are over the shared vector; else it counts as 1."""
    over_base: bool = False
    """Whether the residual is of the base, grouped by its exponents; else of what codes predict."""

    @property
    def coded(self) -> bool:
        """Whether there is any code beside the exact tier."""
        return any(n is not None for n in (self.planes, self.sparse, self.seeded))

    @property
    def streams(self) -> tuple[int, ...]:
        """All its streams."""
        found = (self.planes, self.sparse, self.seeded, self.exact)
        return tuple(number for number in found if number is not None)


@dataclass(frozen=True, slots=True)
class SegmentStats:
    """What coding did to one of the base's segments."""

    segment: int
    density: float
    """Fraction of ones of a mask, of touched weights of a sparse or seeded code; 1 for levels."""
    relative_error: float
    """Norm of the error over that of the task vector, before weights are rounded to their dtype."""
    moved: float
    """Norm of the task vector."""
    projection: float | None = None
    """Inner product of the coded task vector with the task vector; None for masks."""

    @property
    def gain(self) -> float | None:
        """Projection over the task vector's squared norm: 1 is unbiased."""
        if self.projection is None or not self.moved:
            return None
        return self.projection / self.moved**2

    @property
    def cosine(self) -> float | None:
        """Cosine between the coded task vector and the task vector."""
        if self.projection is None or not self.moved:
            return None
        # |a - b|^2 = |a|^2 - 2 a.b + |b|^2, and the error is relative to |b|.
        squared = ((self.relative_error**2 - 1) * self.moved**2) + 2 * self.projection
        return self.projection / (math.sqrt(squared) * self.moved) if squared > 0 else None


def level_rows(
    codes: Mapping[int, SegmentCode], planes: int
) -> tuple[dict[int, int], list[list[float]]]:
    """The row of each segment, and the rows: 2**planes levels each, one at least."""
    rows = {segment: row for row, segment in enumerate(codes)}
    return rows, [code.row(planes) for code in codes.values()] or [[_UNTOUCHED] * (1 << planes)]


# -- seeded values ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeededPiece:
    """The part of a seeded segment in one span, with values of its own."""

    piece: Piece
    code: SegmentCode
    first: int
    """Its first group among the span's values."""

    @property
    def groups(self) -> int:
        """Values that it has; the last group may be short."""
        return -(-self.piece.count // self.code.stride)


def seeded_pieces(
    layout: Layout, codes: Mapping[int, SegmentCode], arena: int, span: int
) -> list[SeededPiece]:
    """The seeded pieces of a span, in order; the values of each start at a whole `BLOCK`."""
    found, first = [], 0
    for piece in layout.pieces(arena, span):
        code = codes.get(piece.segment)
        if code is not None and code.form == SEEDED:
            seeded = SeededPiece(piece, code, first)
            found.append(seeded)
            first += -(-seeded.groups // BLOCK) * BLOCK
    return found


def seeded_capacity(layout: Layout, codes: Mapping[int, SegmentCode], arena: int) -> int:
    """Values that every chunk of an arena's seeded stream has room for."""
    most = 0
    for span in range(layout.arenas[arena].spans):
        pieces = seeded_pieces(layout, codes, arena, span)
        if pieces:
            most = max(most, pieces[-1].first + -(-pieces[-1].groups // BLOCK) * BLOCK)
    return most


# -- JSON ---------------------------------------------------------------------------------


def code_to_json(code: ArenaCode, *, plain: bool) -> list[Any]:
    """As it stands in a document; `plain`: as format version 1 has it."""
    if plain:
        return [code.arena, code.dtype, code.planes, code.exact]
    flags = _SHARED * code.shared + _OVER_BASE * code.over_base
    return [
        code.arena,
        code.dtype,
        code.planes,
        code.exact,
        code.sparse,
        code.seeded,
        code.bits,
        code.value_bits,
        flags,
    ]


def _count(value: object, most: int, what: str) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise CorruptStoreError(f"{what}: {str(value)[:80]} where a number is expected")
    return value


def _is_number(value: object, most: float) -> bool:
    """Whether it is a number of at most that magnitude."""
    return isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= most


def code_from_json(record: Sequence[Any], *, plain: bool, what: str) -> ArenaCode:
    """Read the items of what `code_to_json` wrote; arena and dtype were checked."""
    arena, dtype, planes, exact = record[:4]
    for stream in (planes, exact):
        if stream is not None:
            _count(stream, _MAX_COUNT, what)
    if plain:
        return ArenaCode(arena, dtype, planes, exact)
    sparse, seeded, bits, value_bits, flags = record[4:]
    for stream in (sparse, seeded):
        if stream is not None:
            _count(stream, _MAX_COUNT, what)
    if _count(flags, _MAX_COUNT, what) > (_SHARED | _OVER_BASE):
        raise strictjson.newer(what, f"flags {flags} of a code", ["1, 2"])
    for count, stream in ((bits, planes), (value_bits, seeded)):
        if not (stream is not None) <= _count(count, _MAX_COUNT, what):
            raise CorruptStoreError(f"{what}: codes of no bits")
        if count > MAX_BITS:
            raise strictjson.newer(what, f"codes of {count} bits", [f"at most {MAX_BITS}"])
    return ArenaCode(
        arena,
        dtype,
        planes,
        exact,
        sparse,
        seeded,
        bits,
        value_bits,
        bool(flags & _SHARED),
        bool(flags & _OVER_BASE),
    )


def segment_code_from_json(record: Sequence[Any], segments: int, what: str) -> SegmentCode:
    """Read ``[segment, form, levels, stride]``."""
    segment, form, levels, stride = record
    if _count(segment, _MAX_COUNT, what) >= segments:
        raise CorruptStoreError(f"{what}: a code for segment {segment}, which the base lacks")
    if type(form) is not str:
        raise CorruptStoreError(f"{what}: the form of a code is no text")
    if form not in _FORMS:
        raise strictjson.newer(what, f"a code of form {form[:80]!r}", _FORMS)
    numbers = isinstance(levels, list) and all(_is_number(n, _MAX_LEVEL) for n in levels)
    counts = (1,) if form == SPARSE else (2, 4, 8, 16)
    if not numbers or len(levels) not in counts:
        raise CorruptStoreError(f"{what}: segment {segment} has no levels of its code")
    _count(stride, MAX_STRIDE, what)
    if (stride > 0) != (form == SEEDED):
        raise CorruptStoreError(f"{what}: segment {segment} has a stride of {stride}")
    return SegmentCode(segment, form, tuple(_float32(float(n)) for n in levels), stride)


def stats_to_json(stats: Iterable[SegmentStats], *, plain: bool) -> list[list[Any]]:
    """As they stand in a document: to six digits, since they are for people, and take room."""
    return [
        [s.segment, *map(_six, (s.density, s.relative_error, s.moved))]
        + ([] if plain else [None if s.projection is None else _six(s.projection)])
        for s in stats
    ]


def _six(number: float) -> float:
    return float(f"{number:.6g}")


def levels_to_json(levels: Iterable[float]) -> list[float]:
    """float32 numbers in as few digits as name them; `segment_code_from_json` rounds them back."""
    return [_shortest(level) for level in levels]


def _shortest(level: float) -> float:
    tried = (float(f"{level:.{digits}g}") for digits in range(1, 10))
    return next((n for n in tried if abs(n) <= _MAX_LEVEL and _float32(n) == level), level)


def _float32(number: float) -> float:
    """The nearest float32 number."""
    rounded: float = _FLOAT.unpack(_FLOAT.pack(number))[0]
    return rounded


def stats_from_json(record: Sequence[Any], what: str) -> SegmentStats:
    """Read one of what `stats_to_json` wrote."""
    segment, *numbers = record
    _count(segment, _MAX_COUNT, what)
    projection = numbers[3] if len(numbers) == 4 else None
    plain = numbers[:3] + ([] if projection is None else [projection])
    if not all(_is_number(n, sys.float_info.max) for n in plain):
        raise CorruptStoreError(f"{what}: statistics that are no numbers")
    found = [float(n) for n in plain]
    return SegmentStats(segment, *found)
