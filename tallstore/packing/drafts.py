"""What is to become of a tensor, before its levels are known; and its codes over one span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.bits import pack_bits
from tallstore.codecs import Bytes
from tallstore.codes import PLANES, SEEDED, SPARSE, SeededPiece, SegmentCode
from tallstore.coding import CodeStats, Floats
from tallstore.fitting import gain_factor, signed_levels
from tallstore.seeding import seeded_tensor, support
from tallstore.spancodes import pack_values

__all__ = ["Draft", "SpanCodes", "settle"]

#: Seeded values are made longer by about their stride; by more than so many times that none are.
_LONGEST: Final = 2.0

_Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Draft:
    """How a segment is going to be coded; its levels still lack the gain."""

    segment: int
    form: str
    """Of `tallstore.codes`."""
    magnitudes: tuple[float, ...] = (1.0,)
    """Ascending, float32; of `SPARSE` the one that is given to whatever is touched."""
    bits: int = 1
    """Of a code or value; of `SPARSE` it does not matter."""
    cut: float = 0.0
    """Of `SPARSE`: the least |t| that is touched."""
    stride: int = 0
    """Of `SEEDED`."""
    corrected: bool = False
    """Whether it is of other weights than the checkpoint's, which are as long as they must be."""
    left: bool = False
    """Whether the tensor is left as the base has it: `SPARSE`, and nothing is touched."""

    def code(self, factor: float) -> SegmentCode | None:
        """The finished code; None where a level would leave float32."""
        levels: tuple[float, ...]
        if self.form == SPARSE:
            levels = signed_levels(self.magnitudes, 1, factor)[:1]
        else:
            levels = signed_levels(self.magnitudes, self.bits, factor)
        if not all(np.isfinite(levels)):
            return None
        return SegmentCode(self.segment, self.form, levels, self.stride)


def settle(draft: Draft, stats: CodeStats, gain: str) -> SegmentCode | None:
    """The code of a segment whose sums are complete, and its error; None: it has to be kept.

    Parameters
    ----------
    stats
        Sums of the unscaled codes; the error and projection of the scaled ones are put in.
    """
    if draft.left:
        stats.error = stats.moved
        return SegmentCode(draft.segment, SPARSE, (-0.0,))
    if not stats.moved:  # other bits of the same numbers: the base's will do
        levels = (-0.0,) * (1 if draft.form == SPARSE else 1 << draft.bits)
        return SegmentCode(draft.segment, draft.form, levels, draft.stride)
    # Levels that were fitted to corrected weights are right as they are.
    factor = (
        1.0
        if draft.corrected
        else gain_factor(gain, moved=stats.moved, projection=stats.projection, norm=stats.norm)
    )
    if factor is not None and draft.form == SEEDED:
        # A seed that picks few of the weights that moved most would have the others be as much.
        factor = min(factor, _LONGEST * draft.stride)
    code = None if factor is None else draft.code(factor)
    if code is None and draft.form == SEEDED:
        # Its values are on the disk already, and the next ones' places hang on them.
        factor, code = 1.0, draft.code(1.0)
    if code is None or factor is None:
        return None
    if draft.corrected:
        # From here on what is told of the codes is told of the checkpoint itself.
        stats.moved, stats.projection = stats.own_moved, stats.own_projection
    stats.error = max(
        factor**2 * stats.norm - 2 * factor * stats.projection + stats.moved,
        0.0,
    )
    stats.projection *= factor
    stats.norm *= factor**2
    return code


def _nearest(size: Floats, step: Floats | None, magnitudes: Sequence[float]) -> _Codes:
    """The index of the magnitude nearest to |t|, each times the vector; of two the smaller."""
    index = np.zeros(size.size, np.uint8)
    for low, high in pairwise(magnitudes):
        middle = np.float32((low + high) / 2)
        index += size > (middle if step is None else middle * step)
    return index


class SpanCodes:
    """The codes of one task over one span of an arena, as they go to disk.

    Parameters
    ----------
    weights
        Of the span.
    bits
        Planes of dense codes; 0: there are none.
    sparse
        Whether anything has sparse signs.
    values
        uint8, shape (B, bytes), zeroed: room for seeded values; None: there are none.
    """

    def __init__(self, weights: int, *, bits: int, sparse: bool, values: Bytes | None) -> None:
        self.planes = np.zeros((bits, weights // 8), np.uint8) if bits else None
        self.sparse = np.zeros((2, weights // 8), np.uint8) if sparse else None
        self.values = values

    def encode(
        self,
        draft: Draft,
        start: int,
        moves: Floats,
        vector: Floats | None,
        stats: CodeStats,
        *,
        own: Floats,
    ) -> None:
        """Code a run of weights of a dense or sparse segment.

        Parameters
        ----------
        start
            First weight, in the span: a multiple of 8.
        moves, vector
            Task vector, and shared vector or None, of the run; float32.
        stats
            Gets density and the sums of the unscaled codes.
        own
            See `encode_values`.
        """
        first = start // 8
        size = np.abs(moves)
        if draft.form == SPARSE and self.sparse is not None:
            touched = size >= np.float32(draft.cut)
            negative = np.signbit(moves)
            signs = (touched & ~negative, touched & negative)
            for plane, flags in zip(self.sparse, signs, strict=True):
                packed = pack_bits(flags)
                plane[first : first + packed.size] |= packed
            count = int(np.count_nonzero(touched))
            level = draft.magnitudes[0]
            stats.ones += count
            stats.projection += level * float(size[touched].sum(dtype=np.float64))
            stats.norm += level**2 * count
            if draft.corrected:
                given = np.where(negative, np.float32(-level), np.float32(level))
                stats.own_projection += _dot(given[touched], own[touched])
        elif draft.form == PLANES and self.planes is not None:
            step = None if vector is None else np.abs(vector)
            index = _nearest(size, step, draft.magnitudes)
            given = np.asarray(draft.magnitudes, np.float32)[index]
            if step is not None:
                given *= step
            stats.ones += moves.size
            stats.projection += _dot(given, size)
            stats.norm += _dot(given, given)
            if draft.corrected:
                stats.own_projection += _dot(np.copysign(given, moves), own)
            sign = moves if vector is None else moves * np.sign(vector)
            negative = np.signbit(sign)
            if not draft.magnitudes[0]:
                # Of two codes for nothing one alone is used: that takes fewer bits on disk.
                negative &= index > 0
            code = index | negative.view(np.uint8) << np.uint8(draft.bits - 1)
            for k in range(draft.bits):
                packed = pack_bits((code >> np.uint8(k) & np.uint8(1)).view(np.bool_))
                self.planes[k, first : first + packed.size] |= packed

    def encode_values(
        self,
        draft: Draft,
        piece: SeededPiece,
        moves: Floats,
        stats: CodeStats,
        *,
        own: Floats,
        seed: int,
        arena_span: int,
        span: int,
    ) -> None:
        """Code the values of a piece of a seeded segment.

        Parameters
        ----------
        moves
            The task vector over the piece, from its start as far as the task has weights: it may
            have fewer rows than the base.
        own
            The same of the checkpoint itself, where codes are of other weights; else `moves`.
        """
        if self.values is None:
            return
        tensor = seeded_tensor(piece, seed=seed, arena_span=arena_span, span=span)
        at = support(tensor)
        values = moves[at[at < moves.size]]
        size = np.abs(values)
        index = _nearest(size, None, draft.magnitudes)
        given = np.asarray(draft.magnitudes, np.float32)[index]
        stats.ones += values.size
        stats.projection += _dot(given, size)
        stats.norm += _dot(given, given)
        if draft.corrected:
            np.negative(given, out=given, where=np.signbit(values))
            stats.own_projection += _dot(given, own[at[at < own.size]])
        code = index | np.signbit(values).view(np.uint8) << np.uint8(draft.bits - 1)
        pack_values(np.pad(code, (0, at.size - code.size)), piece, self.values)


def _dot(one: Floats, other: Floats) -> float:
    return float(np.einsum("i,i->", one, other, dtype=np.float64, casting="same_kind"))
