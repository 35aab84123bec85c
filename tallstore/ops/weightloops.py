"""What loops over weights have in common, for numba; imported only where it is: see `compiling`.

Weights are float32, or bfloat16 as their bits, uint16. A product and a sum are rounded each, so no
loop has ``fastmath``.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numba import types
from numba.extending import overload

from tallstore.jit import compiled

__all__ = ["NAN", "as_in", "bit", "narrow", "wide", "word"]

#: What torch rounds a NaN to in bfloat16: it depends on the processor.
NAN: Final = (
    int(torch.full((64,), torch.nan, device="cpu").to(torch.bfloat16).view(torch.int16)[0]) & 0xFFFF
)


def wide(weight: Any) -> Any:
    """The float32 that a weight is."""
    raise NotImplementedError


def narrow(value: Any, like: Any) -> Any:
    """A float32, rounded to what an array of weights holds."""
    raise NotImplementedError


def as_in(weight: Any, like: Any) -> Any:
    """A weight as an array of weights holds it."""
    raise NotImplementedError


@overload(wide, strict=False)
def _wide_of(weight: Any) -> Any:
    if isinstance(weight, types.Float):
        return lambda weight: weight
    return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)


@overload(narrow, strict=False)
def _narrow_to(value: Any, like: Any) -> Any:
    if isinstance(like.dtype, types.Float):
        return lambda value, like: value

    def rounded(value: Any, like: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        near = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return near if value == value else np.uint16(NAN)

    return rounded


@overload(as_in, strict=False)
def _as_of(weight: Any, like: Any) -> Any:
    if weight == like.dtype:
        # With what a NaN carries.
        return lambda weight, like: weight
    return lambda weight, like: narrow(wide(weight), like)


@compiled
def word(plane: Any, byte: Any) -> Any:
    """32 bits of a plane."""
    low = np.uint32(plane[byte]) | np.uint32(plane[byte + 1]) << np.uint32(8)
    high = np.uint32(plane[byte + 2]) | np.uint32(plane[byte + 3]) << np.uint32(8)
    return np.uint32(low | high << np.uint32(16))


@compiled
def bit(word: Any, j: Any) -> Any:
    """Bit j of a word."""
    return word >> np.uint32(j) & np.uint32(1)
