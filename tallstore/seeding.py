"""Which weights of a tensor have a seeded value, in numpy: the same as the kernels, to the bit.

`tallstore.kernels.seeded_reference` gives the hash, step by step; it is part of the format.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.codes import SeededPiece
from tallstore.kernels.seeded_reference import SeededTensor, key

__all__ = ["seeded_tensor", "support"]

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


def support(tensor: SeededTensor) -> npt.NDArray[np.int64]:
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
