"""What the encoders share: bits on their way out, and sums over a block.

A program takes one block, so that levels and sums are uniform in it: a tile of bytes by the eight
weights of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["bits_of", "packed", "store_flags", "total"]


@triton.jit
def total(x):
    """The sum over a block, over a tree."""
    # Over the weights of a byte first: they lie in one thread, or in two.
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def packed(flags, lane):
    """Bytes of the bits of eight weights each, LSB-first; `lane` is each weight's place."""
    return tl.sum(flags.to(tl.int32) << lane, axis=1).to(tl.uint8)


@triton.jit
def _top(x):
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def bits_of(x):
    """The bit patterns of floats, as int32."""
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def store_flags(base, finetuned, error, moved, total_error, same, finite, block):
    """Whether a block's weights are the base's own bits, and its errors (float32) finite.

    `moved` and `total_error` are the block's sums of squares. Nearly always they tell: a sum above
    zero is of a weight that differs, and a finite one of finite errors.
    """
    if (moved > 0) & (moved < float("inf")) & (total_error < float("inf")):
        tl.store(same + block, tl.zeros([], tl.uint8))
        tl.store(finite + block, tl.full([], 1, tl.uint8))
    else:
        if base.dtype == finetuned.dtype:
            differing = _top((bits_of(base) ^ bits_of(finetuned)).to(tl.uint32, bitcast=True))
            tl.store(same + block, (differing == 0).to(tl.uint8))
        else:
            tl.store(same + block, tl.zeros([], tl.uint8))
        # Without their signs bit patterns are in order: finite, infinite, NaN.
        highest = _top(bits_of(tl.abs(error)))
        tl.store(finite + block, (highest < 0x7F800000).to(tl.uint8))
