"""What the sparse and the seeded kernels do to single weights, wherever those lie."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import rounded

__all__ = ["mark", "put_back"]


@triton.jit
def put_back(base, out, at, inside, DTYPE: tl.constexpr, SOFT: tl.constexpr):
    """out[at] = base[at], rounded where the dtypes differ."""
    x = tl.load(base + at, mask=inside)
    if base.dtype.element_ty != DTYPE:
        x = rounded(x.to(tl.float32), DTYPE, SOFT)
    tl.store(out + at, x, mask=inside)


@triton.jit
def mark(words, word_stride, at, inside, code, PLANES: tl.constexpr):
    """Set the bits of `code` at weight `at` of planes, seen as words of 32 weights."""
    word = words + at // 32
    bit = tl.full(code.shape, 1, tl.int32) << (at % 32).to(tl.int32)
    for k in tl.static_range(PLANES):
        # Neighbours share a word, and may belong to other threads or programs.
        there = inside & (((code >> k) & 1) != 0)
        tl.atomic_or(word, bit, mask=there, sem="relaxed")
        # Added up, not multiplied: a stride that fits 32 bits comes as 32 bits.
        word += word_stride
