"""How many weights each two of T tasks both use, from their packed masks."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import Shape
from .counting import add_up, load, popcount, valid

__all__ = ["overlaps"]

_SHAPE: Final = Shape(blocks=8)


@triton.jit
def _overlaps(
    masks, stride, tasks, out, stop, one, block, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    WORD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = WORD.primitive_bitwidth
    at = block * (BLOCK // WIDTH) + tl.arange(0, BLOCKS * BLOCK // WIDTH)
    inside = at * WIDTH < stop
    x = load(masks, stride, one, tasks, at, inside, WORD, MASKED)
    if MASKED:
        x = x & valid(at, stop)
    other = one
    while other < tasks:
        y = load(masks, stride, other, tasks, at, inside, WORD, MASKED)
        both = tl.sum(popcount(x & y), axis=0).to(tl.int64)
        tl.atomic_add(out + (one * tasks + other), both, sem="relaxed")
        tl.atomic_add(out + (other * tasks + one), both, mask=other > one, sem="relaxed")
        other += 1


@triton.jit(do_not_specialize=["tasks", "stop"])
def overlaps_kernel(
    masks, stride, tasks, out, start, stop, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """One task and those after it, over one tile of weights; see `overlaps`."""
    # The tasks of a tile are neighbours, so that its masks come from memory once.
    program = tl.program_id(0).to(tl.int64)
    one = program % tasks
    block = start // BLOCK + program // tasks * BLOCKS
    if (block + BLOCKS) * BLOCK <= stop:
        _overlaps(masks, stride, tasks, out, stop, one, block, BLOCKS, BLOCK, WORD, False)
    else:
        PART: tl.constexpr = BLOCKS * 8 // WORD.primitive_bitwidth
        while block * BLOCK < stop:
            _overlaps(masks, stride, tasks, out, stop, one, block, PART, BLOCK, tl.uint8, True)
            block += PART


def overlaps(
    masks: torch.Tensor,
    out: torch.Tensor,
    *,
    stop: int,
    start: int = 0,
    shape: Shape = _SHAPE,
) -> None:
    """Fill `out` with the number of weights that each two tasks both use.

    Parameters
    ----------
    masks
        As in `count_uses`.
    out
        int64, shape (T, T), contiguous, symmetric; on the diagonal, what each task uses.
    start, stop
        The weights to count; `start` is a multiple of `BLOCK`.
    shape
        How the work is cut.
    """
    add_up(overlaps_kernel, masks.shape[0], masks, out, start, stop, shape)
