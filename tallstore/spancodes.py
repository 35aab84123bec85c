"""The codes of one span, from the streams that hold them: packed, as many planes as they take.

Whatever form a tensor's codes have on disk, here they become planes over the weights, so that one
reconstruction serves them all: code 0 of a sparse or seeded tensor leaves a weight as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tallstore.bits import pack_bits, unpack_bits
from tallstore.codecs import SPARSE as SPARSE_CODEC
from tallstore.codecs import Bytes
from tallstore.codecs.sparse import Touched, touched_of_planes
from tallstore.codes import (
    MAX_BITS,
    SEEDED,
    SPARSE,
    ArenaCode,
    SeededPiece,
    seeded_pieces,
)
from tallstore.documents import TaskDocument
from tallstore.engine.chunk import CheckedChunk
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError
from tallstore.layout import Layout
from tallstore.seeding import seeded_tensor, support
from tallstore.spans import Take, Touches

__all__ = [
    "code_bits",
    "code_planes",
    "code_touches",
    "pack_values",
    "spread_values",
]


def code_bits(code: ArenaCode) -> int:
    """Planes over the weights that an arena's codes take: 1 to 4."""
    bits = [code.bits] if code.planes is not None else []
    if code.sparse is not None:
        bits.append(2)
    if code.seeded is not None:
        bits.append(min(code.value_bits + 1, MAX_BITS))
    return max(bits, default=1)


def code_planes(
    snapshot: Snapshot,
    layout: Layout,
    task: TaskDocument,
    code: ArenaCode,
    span: int,
    take: Take,
) -> tuple[Bytes, int]:
    """The packed codes of a span of an arena, plane after plane, and how many planes.

    Parameters
    ----------
    take
        Gives the memory for them, called ``"planes"``.

    Raises
    ------
    CorruptStoreError
        A chunk is damaged, or is not what its stream says.
    """
    arena = layout.arenas[code.arena]
    weights = min(arena.span, arena.weights - span * arena.span)
    plane = weights // 8
    bits = code_bits(code)
    out = take("planes", bits * plane)
    # One stream alone, as wide as the codes: straight into place.
    dense = {code.planes: code.bits, code.sparse: 2}
    dense.pop(None, None)
    alone = code.seeded is None and len(dense) == 1 and bits in dense.values()
    if not alone:
        out.fill(0)
    for number, width in dense.items():
        stream = snapshot.stream(number) if number is not None else None
        if stream is None:
            continue
        part = out if alone else np.empty(width * plane, np.uint8)
        snapshot.read_chunk(stream, span, part)
        if not alone:
            out[: part.size] |= part
    if code.seeded is not None:
        stream = snapshot.stream(code.seeded)
        values = np.empty(stream.raw_size(span), np.uint8)
        snapshot.read_chunk(stream, span, values)
        pieces = seeded_pieces(layout, task.codings or {}, code.arena, span)
        spread = spread_values(
            values.reshape(code.value_bits, -1),
            pieces,
            weights,
            seed=task.seed,
            arena_span=arena.span,
            span=span,
        )
        for number, codes in enumerate(spread):
            out[number * plane : (number + 1) * plane] |= codes
    return out, bits


def code_touches(
    snapshot: Snapshot, layout: Layout, task: TaskDocument, code: ArenaCode, span: int
) -> dict[str, Touches]:
    """By form, the weights of a span that an arena's sparse and seeded codes touch.

    Much less than `code_planes` where codes touch few weights.

    Raises
    ------
    CorruptStoreError
        A chunk is damaged, or is not what its stream says.
    """
    arena = layout.arenas[code.arena]
    found: dict[str, Touches] = {}
    if code.sparse is not None:
        stream = snapshot.stream(code.sparse)
        size = stream.raw_size(span)

        def signs(chunk: CheckedChunk) -> Touches:
            seen: Touched | None
            if chunk.codec is SPARSE_CODEC:
                seen = SPARSE_CODEC.touched(chunk.payload, 4 * size)
            else:
                planes = np.empty(size, np.uint8)
                chunk.codec.decode(chunk.payload, planes, parameter=chunk.parameter)
                seen = touched_of_planes(planes)
            if seen is None:
                raise CorruptStoreError("signs of one weight both ways")
            return Touches(seen.positions, seen.minus + np.uint8(1))

        found[SPARSE] = snapshot.use_chunk(stream, span, signs)
    if code.seeded is not None:
        stream = snapshot.stream(code.seeded)
        values = np.empty(stream.raw_size(span), np.uint8)
        snapshot.read_chunk(stream, span, values)
        rows = values.reshape(code.value_bits, -1)
        at, codes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)]
        for seeded in seeded_pieces(layout, task.codings or {}, code.arena, span):
            places = support(
                seeded_tensor(seeded, seed=task.seed, arena_span=arena.span, span=span)
            )
            places += seeded.piece.within
            at.append(places)
            codes.append(_codes(rows, seeded) + np.uint8(1))
        found[SEEDED] = Touches(np.concatenate(at), np.concatenate(codes))
    return found


def spread_values(
    values: Bytes,
    pieces: Sequence[SeededPiece],
    weights: int,
    *,
    seed: int,
    arena_span: int,
    span: int,
) -> list[Bytes]:
    """Planes over the weights of a span from its seeded values: 1 + the value's code.

    Parameters
    ----------
    values
        uint8, shape (B, bytes), LSB-first.
    pieces
        The seeded pieces of the span.
    """
    dense = np.zeros(weights, np.uint8)
    for seeded in pieces:
        tensor = seeded_tensor(seeded, seed=seed, arena_span=arena_span, span=span)
        at = support(tensor)
        at += seeded.piece.within
        dense[at] = _codes(values, seeded) + np.uint8(1)
    planes = min(values.shape[0] + 1, MAX_BITS)
    return [pack_bits((dense >> np.uint8(k) & np.uint8(1)).view(np.bool_)) for k in range(planes)]


def _codes(values: Bytes, seeded: SeededPiece) -> npt.NDArray[np.uint8]:
    first = seeded.first // 8
    code = np.zeros(seeded.groups, np.uint8)
    for k, plane in enumerate(values[: seeded.code.bits]):
        code |= unpack_bits(plane[first:], seeded.groups).view(np.uint8) << np.uint8(k)
    return code


def pack_values(codes: npt.NDArray[np.uint8], seeded: SeededPiece, out: Bytes) -> None:
    """Put the values of a piece in their place: the inverse of what `spread_values` reads.

    Parameters
    ----------
    codes
        Shape (groups,).
    out
        uint8, shape (B, bytes).
    """
    first = seeded.first // 8
    for k in range(seeded.code.bits):
        packed = pack_bits((codes >> np.uint8(k) & np.uint8(1)).view(np.bool_))
        out[k, first : first + packed.size] = packed
