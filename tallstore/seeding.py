"""Which weights of a tensor have a seeded value, in numpy: the same as the kernels, to the bit.

`tallstore.kernels.seeded_reference` gives the hash, step by step; it is part of the format.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.codes import SEEDED, SeededPiece, SegmentCode, seeded_pieces
from tallstore.kernels.seeded_reference import SeededTensor, key
from tallstore.layout import Layout

__all__ = ["Positions", "picked", "seeded_tensor", "support"]

#: Of weights, int64.
Positions = npt.NDArray[np.int64]

_LOW: Final = 0xFFFFFFFF
_Words = npt.NDArray[np.uint32]


def seeded_tensor(seeded: SeededPiece, *, seed: int, arena_span: int, span: int) -> SeededTensor:
    """A piece as the kernels place its values.

    Parameters
    ----------
    seed
        The task's, 32 bits.
    arena_span
        Weights of a span of the arena.
    span
        Number of the span: with it a span decodes by itself.
    """
    return SeededTensor(
        seed=seed | span << 32,
        number=seeded.piece.segment,
        stride=seeded.code.stride,
        offset=span * arena_span + seeded.piece.within,
        numel=seeded.piece.count,
    )


@functools.lru_cache(maxsize=1 << 14)
def _key(seed: int, number: int) -> tuple[int, int]:
    return key(seed, number)


def _mix(x: _Words) -> None:
    """Mix 32 bits in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)


def support(tensor: SeededTensor) -> Positions:
    """Which weights of a tensor have a value: shape (groups,), ascending."""
    first, second = _key(tensor.seed, tensor.number)
    # A piece lies in one span, so that the number of a group has no high half.
    h = np.arange(tensor.groups, dtype=np.uint32)
    h ^= np.uint32(first)
    _mix(h)
    h ^= np.uint32(second)
    _mix(h)
    wide = h.astype(np.uint64)
    wide *= np.uint64(tensor.stride)
    last = tensor.numel - (tensor.groups - 1) * tensor.stride
    wide[-1:] = h[-1:].astype(np.uint64) * np.uint64(last)
    wide >>= np.uint64(32)
    found = wide.view(np.int64)
    found += np.arange(0, tensor.groups * tensor.stride, tensor.stride)
    return found


def picked(layout: Layout, strides: Mapping[int, int], *, seed: int) -> dict[int, Positions]:
    """Which weights of some segments have a value, by segment: ascending, counted in the segment.

    Parameters
    ----------
    layout
        The base's.
    strides
        By segment.
    seed
        The task's.
    """
    codes = {n: SegmentCode(n, SEEDED, (0.0, 0.0), stride) for n, stride in strides.items()}
    parts: dict[int, list[Positions]] = defaultdict(list)
    for arena in sorted({layout.places[n].arena for n in codes}):
        record = layout.arenas[arena]
        for span in range(record.spans):
            for piece in seeded_pieces(layout, codes, arena, span):
                tensor = seeded_tensor(piece, seed=seed, arena_span=record.span, span=span)
                parts[piece.piece.segment].append(support(tensor) + piece.piece.start)
    return {n: np.concatenate(found) for n, found in parts.items()}
