"""The entries of sparse codes as kernels read them, and how work over them is cut."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

__all__ = ["Cut", "entry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How the work is cut: groups a program, entries it takes at once, warps."""

    groups: int
    chunk: int
    warps: int = 4


@triton.jit
def entry(entries, starts, first, last, low, at, inside, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Weight, from the first of group `first` on, and code of the entries low + at."""
    word = tl.load(entries + low + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
    place = word % GROUP
    for j in tl.static_range(1, GROUPS):
        bound = (tl.load(starts + tl.minimum(first + j, last)) - low).to(tl.int32)
        place += tl.where(at >= bound, GROUP, 0)
    return place, word >> 12
