"""Seeded support, applied to the weights that a hash picks: `seeded_reference` on a GPU.

As with `sparse`, sectors of 32 bytes are what costs: one is read and one written for a value,
where a stride is above the weights a sector has. Positions are computed, so no load waits for
another: a program takes `BLOCK` groups of one tensor, consecutive lanes consecutive groups (so
that a small stride is coalesced), and its loads from the base are all in flight together. What a
whole tensor needs (key, stride, where it starts) is loaded once a program, and 64-bit arithmetic
is done for the first group of a program alone.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, Shape, launching_on, rounded, tl_dtype
from .seeded_reference import SeededCode
from .sparse_reference import BLOCK, plane_bytes
from .touched import mark, put_back

__all__ = ["apply", "expand", "restore", "switch"]

_SHAPE: Final = Shape()


@triton.jit
def mix(x):
    """Mix 32 bits (uint32), one to one."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _support(index, owner, block, BLOCK: tl.constexpr):
    """Weights of a block of values.

    Where its first group starts in the arena, each position from there on, which groups exist.
    """
    entry = index + owner * 5
    offset = tl.load(entry)
    numel = tl.load(entry + 1)
    stride = tl.load(entry + 2).to(tl.int32)
    # The groups of a block differ in their last ten bits only.
    first = block * BLOCK - tl.load(entry + 3)
    key = tl.load(entry + 4)
    key0 = key.to(tl.uint32) ^ first.to(tl.uint32)
    key1 = (key >> 32).to(tl.uint32) ^ (first >> 32).to(tl.uint32)
    lane = tl.arange(0, BLOCK)
    ahead = lane.to(tl.int64) * stride.to(tl.int64)
    left = numel - first * stride - ahead
    size = tl.minimum(left, stride.to(tl.int64)).to(tl.uint32)
    h = mix(mix(lane.to(tl.uint32) ^ key0) ^ key1)
    # The high half of the product, which is one instruction.
    place = tl.umulhi(h, size)
    return offset + first * stride, ahead + place.to(tl.int64), left > 0


@triton.jit
def _value(planes, plane_stride, block, inside, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of a block of values."""
    lane = tl.arange(0, BLOCK)
    at = planes + block * (BLOCK // 8) + lane // 8
    code = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(BITS):
        byte = tl.load(at, mask=inside, other=0).to(tl.int32)
        code |= ((byte >> (lane % 8)) & 1) << k
        # Added up, not multiplied: a stride that fits 32 bits comes as 32 bits.
        at += plane_stride
    return code


@triton.jit(do_not_specialize=["plane_stride"])
def touch_kernel(
    planes,
    plane_stride,
    table,
    index,
    owners,
    base,
    out,
    BITS: tl.constexpr,
    APPLY: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    SOFT: tl.constexpr,
):
    """A block of values: apply them, or restore what they touch."""
    block = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + block).to(tl.int64)
    start, place, inside = _support(index, owner, block, BLOCK)
    base += start
    out += start
    if APPLY:
        # From memory first: the levels come from the cache, and would only hold it up.
        x = tl.load(base + place, mask=inside).to(tl.float32)
        code = _value(planes, plane_stride, block, inside, BITS, BLOCK)
        levels = table + owner * (1 << BITS)
        if BITS <= 2:
            # Few levels, the same for all: chosen between in registers.
            level = tl.load(levels)
            for k in tl.static_range(1, 1 << BITS):
                level = tl.where(code == k, tl.load(levels + k), level)
        else:
            level = tl.load(levels + code)
        tl.store(out + place, rounded(x + level, DTYPE, SOFT), mask=inside)
    else:
        put_back(base, out, place, inside, DTYPE, SOFT)


@triton.jit(do_not_specialize=["plane_stride", "word_stride"])
def expand_kernel(
    planes,
    plane_stride,
    index,
    owners,
    words,
    word_stride,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of values: their codes, plus one, into zeroed planes over the weights."""
    block = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + block).to(tl.int64)
    start, place, inside = _support(index, owner, block, BLOCK)
    code = _value(planes, plane_stride, block, inside, BITS, BLOCK)
    mark(words, word_stride, start + place, inside, code + 1, BITS + 1)


def _touch(
    code: SeededCode, base: torch.Tensor, out: torch.Tensor, applying: bool, shape: Shape
) -> None:
    blocks = code.owners.numel()
    if not blocks:
        return
    with launching_on(out):
        touch_kernel[(blocks,)](
            code.planes,
            code.planes.stride(0),
            code.table,
            code.index,
            code.owners,
            base,
            out,
            BITS=code.bits,
            APPLY=applying,
            BLOCK=BLOCK,
            DTYPE=tl_dtype(out.dtype),
            SOFT=INTERPRETED,
            num_warps=shape.warps,
            enable_fp_fusion=False,
        )


def apply(
    code: SeededCode, base: torch.Tensor, out: torch.Tensor, *, shape: Shape = _SHAPE
) -> None:
    """Make the touched weights of `out` base + level, in one launch on the current stream.

    A float32 sum, rounded once to the output dtype; no other weight of `out` is read or written.
    Nothing is checked here.

    Parameters
    ----------
    code
        Of an arena of n weights, on the same device as the others.
    base
        Shape (n,), float32, bfloat16 or float16, contiguous.
    out
        Shape (n,), one of the three dtypes; may be `base` itself.
    shape
        Warps a program; a program always takes one block of values.
    """
    _touch(code, base, out, True, shape)


def restore(
    code: SeededCode, base: torch.Tensor, out: torch.Tensor, *, shape: Shape = _SHAPE
) -> None:
    """Make the touched weights of `out` the base again, rounded to its dtype; see `apply`."""
    _touch(code, base, out, False, shape)


def switch(
    old: SeededCode,
    new: SeededCode,
    base: torch.Tensor,
    out: torch.Tensor,
    *,
    shape: Shape = _SHAPE,
) -> None:
    """From `old` to `new`, touching only what either does; see `apply`.

    `out` holds `old` applied over `base`, and is not `base`; both codes are of one arena. Codes
    with the same seed, numbers and strides touch the same weights: one launch. Others take two.
    """
    if old.tensors != new.tensors:
        restore(old, base, out, shape=shape)
    apply(new, base, out, shape=shape)


def expand(code: SeededCode, planes: torch.Tensor, *, shape: Shape = _SHAPE) -> None:
    """Fill `planes` with the planes of `seeded_reference.expand`, on the current stream.

    Parameters
    ----------
    code
        Of an arena of n weights, B = 1..3.
    planes
        uint8, shape (B + 1, at least `plane_bytes(n)`), each plane contiguous and 4-byte aligned.
        Its first `plane_bytes(n)` bytes a plane are overwritten.
    shape
        Warps a program.

    Raises
    ------
    ValueError
        B is 4: 17 codes need 5 planes, and a reconstruction takes 4.
    """
    if code.bits > 3:
        raise ValueError("seeded values of 4 bits have no planes: 16 levels and none need 5 of 4")
    words = planes[:, : plane_bytes(code.weights)].view(torch.int32)
    words.zero_()
    blocks = code.owners.numel()
    if not blocks:
        return
    with launching_on(planes):
        expand_kernel[(blocks,)](
            code.planes,
            code.planes.stride(0),
            code.index,
            code.owners,
            words,
            words.stride(0),
            BITS=code.bits,
            BLOCK=BLOCK,
            num_warps=shape.warps,
        )
