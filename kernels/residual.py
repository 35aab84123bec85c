"""The exact tier: integer differences of bit patterns added to a prediction, in one launch."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import BLOCK, Shape, launching_on

__all__ = ["add_residual"]

_SHAPE: Final = Shape(blocks=2)

_WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _tile(
    predicted,
    zigzag,
    out,
    start,
    stop,
    tile,
    ORDERED: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    at = start + tile * TILE + tl.arange(0, TILE)
    inside = at < stop if MASKED else None
    p = tl.load(predicted + at, mask=inside)
    z = tl.load(zigzag + at, mask=inside)
    SIZE: tl.constexpr = p.dtype.primitive_bitwidth
    # Words of 32 bits at least: what lies above a shorter one is cut off in the end.
    WORD: tl.constexpr = tl.uint64 if SIZE == 64 else tl.uint32
    SHORT: tl.constexpr = tl.uint16 if SIZE == 16 else tl.uint8
    NARROW: tl.constexpr = WORD if SIZE >= 32 else SHORT
    word = p.to(NARROW, bitcast=True).to(WORD)
    z = z.to(NARROW, bitcast=True).to(WORD)
    TOP: tl.constexpr = SIZE - 1
    one = tl.full([], 1, WORD)
    if ORDERED:
        # Negative floats with every bit flipped, the others with the sign: they order as integers.
        word = word ^ ((0 - (word >> TOP)) | (one << TOP))
    word = word + ((z >> 1) ^ (0 - (z & 1)))
    if ORDERED:
        word = word ^ ((((word >> TOP) & 1) - 1) | (one << TOP))
    tl.store(out + at, word.to(NARROW).to(p.dtype, bitcast=True), mask=inside)


@triton.jit(do_not_specialize=["stop"])
def residual_kernel(
    predicted,
    zigzag,
    out,
    start,
    stop,
    ORDERED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of elements; see `add_residual`."""
    tile = tl.program_id(0).to(tl.int64)
    if start + (tile + 1) * TILE <= stop:
        _tile(predicted, zigzag, out, start, stop, tile, ORDERED, TILE, False)
    else:
        _tile(predicted, zigzag, out, start, stop, tile, ORDERED, TILE, True)


def add_residual(
    predicted: torch.Tensor,
    zigzag: torch.Tensor,
    out: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    shape: Shape = _SHAPE,
) -> None:
    """Fill `out` with the elements whose residual over `predicted` is `zigzag`.

    ``unordered(ordered(predicted) + unzigzag(zigzag))`` modulo the word, in one launch on the
    current stream; bit patterns of integers and bools are in order as they are. Nothing is
    checked here.

    Parameters
    ----------
    predicted
        Shape (n,), contiguous, elements of 1, 2, 4 or 8 bytes: floats but those of one byte,
        integers or bools.
    zigzag
        Shape (n,), contiguous, any dtype of that size: little-endian words.
    out
        Shape (n,), contiguous, the dtype of `predicted`, and may be `predicted` itself.
    start, stop
        The elements to restore; `start` is a multiple of `BLOCK`.
    shape
        How the work is cut.
    """
    stop = predicted.numel() if stop is None else stop
    if start >= stop:
        return
    word = _WORDS[predicted.element_size()]
    tile = shape.blocks * BLOCK
    with launching_on(out):
        residual_kernel[(triton.cdiv(stop - start, tile),)](
            predicted.view(word),
            zigzag.view(word),
            out.view(word),
            start,
            stop,
            ORDERED=predicted.is_floating_point(),
            TILE=tile,
            num_warps=shape.warps,
        )
