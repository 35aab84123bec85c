"""What the kernels that count over packed masks share.

A program takes a tile of weights as words of 8 to 32 bits. Its last words may be cut short or lie
past the end, so that the one tile that is not whole is read by the byte, a part at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl

from .common import BLOCK, Shape, launching_on

__all__ = ["MOST_TASKS", "Cut", "add_up", "cut", "load", "popcount", "valid"]

#: Tasks the kernels hold: a count takes seven bits.
MOST_TASKS: Final = 64


@triton.jit
def load(masks, stride, task, tasks, at, inside, WORD: tl.constexpr, MASKED: tl.constexpr):
    """Words of one mask, widened to 32 bits; zeros past the last task."""
    # A whole tile of it: the interpreter takes no single flag for a mask.
    there = tl.full(at.shape, task, tl.int64) < tasks
    if MASKED:
        there = there & inside
    row = (masks + task * stride).to(tl.pointer_type(WORD))
    return tl.load(row + at, mask=there, other=0).to(tl.uint32)


@triton.jit
def valid(at, stop):
    """The bits of bytes that belong to weights before `stop`."""
    left = tl.minimum(tl.maximum(stop - at * 8, 0), 8).to(tl.int32)
    return ((1 << left) - 1).to(tl.uint32)


@triton.jit
def popcount(x):
    """Ones in each word, as int32: the compiler knows this form and has an instruction for it."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How weights are cut into tiles."""

    tiles: int
    word: Any
    """Triton's dtype of a word."""
    blocks: int
    """Blocks of `BLOCK` weights a tile."""


def cut(wide: Any, shape: Shape, start: int, stop: int, *tensors: torch.Tensor) -> Cut:
    """Tiles of `shape.blocks` for each byte of a word.

    The word is `wide`, but a byte unless each row of the tensors starts at a multiple of 16 bytes.
    """
    places = [place for t in tensors for place in (t.data_ptr(), *t.stride()[:-1])]
    word = tl.uint8 if any(place % 16 for place in places) else wide
    blocks = shape.blocks * word.primitive_bitwidth // 8
    return Cut(tiles=triton.cdiv(stop - start, blocks * BLOCK), word=word, blocks=blocks)


def add_up(
    kernel: Any,
    programs: int,
    masks: torch.Tensor,
    out: torch.Tensor,
    start: int,
    stop: int,
    shape: Shape,
) -> None:
    """Launch a kernel whose programs, so many a tile, add integers to `out` in any order."""
    out.zero_()
    if start >= stop:
        return
    how = cut(tl.uint32, shape, start, stop, masks)
    with launching_on(out):
        kernel[(how.tiles * programs,)](
            masks,
            masks.stride(0),
            masks.shape[0],
            out,
            start,
            stop,
            BLOCKS=how.blocks,
            BLOCK=BLOCK,
            WORD=how.word,
            num_warps=shape.warps,
        )
