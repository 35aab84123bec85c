"""TALL masks of one task, packed, and their sums, in one pass.

Memory-bound: 16-byte loads, a bit out for each weight. The sums cost nothing where not wanted.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import BLOCK, launching_on
from .encoding import packed, store_flags, total
from .sums import TallSums

__all__ = ["encode_tall"]

#: Sums over a block cost least where one warp makes them.
_WARPS: Final = 2
_WARPS_SUMMING: Final = 1


@triton.jit
def _block(
    base,
    vector,
    finetuned,
    tall_lambda,
    plane,
    ones,
    moved,
    error,
    same,
    finite,
    stop,
    block,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    byte = tl.arange(0, BLOCK // 8)
    lane = tl.arange(0, 8)[None, :]
    first = block * BLOCK
    at = first + (byte[:, None] * 8 + lane)
    inside = at < stop if MASKED else None
    # Zeros beyond the end: no bit, no difference, nothing in any sum.
    none = 0.0 if MASKED else None
    x = tl.load(base + at, mask=inside, other=none)
    v = tl.load(vector + at, mask=inside, other=none)
    y = tl.load(finetuned + at, mask=inside, other=none)
    from_base = x.to(tl.float32) - y.to(tl.float32)
    from_merged = (x.to(tl.float32) + v.to(tl.float32)) - y.to(tl.float32)
    flag = tl.abs(from_base) > tl.abs(from_merged) * tall_lambda
    used = first + byte * 8 < stop if MASKED else None
    tl.store(plane + (first // 8 + byte), packed(flag, lane), mask=used)
    if SUMS:
        chosen = tl.where(flag, from_merged, from_base)
        tl.store(ones + block, total(flag.to(tl.int32)))
        squares = total(from_base * from_base)
        tl.store(moved + block, squares)
        tl.store(error + block, total(chosen * chosen))
        # Where the bit is set the other difference is finite too.
        store_flags(x, y, from_base, squares, squares, same, finite, block)


@triton.jit(do_not_specialize=["stop"])
def tall_kernel(
    base,
    vector,
    finetuned,
    tall_lambda,
    plane,
    ones,
    moved,
    error,
    same,
    finite,
    start,
    stop,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of weights; see `encode_tall`."""
    block = start // BLOCK + tl.program_id(0).to(tl.int64)
    if (block + 1) * BLOCK <= stop:
        _block(
            base, vector, finetuned, tall_lambda, plane, ones, moved, error, same, finite,
            stop, block, SUMS, BLOCK, False,
        )  # fmt: skip
    else:
        _block(
            base, vector, finetuned, tall_lambda, plane, ones, moved, error, same, finite,
            stop, block, SUMS, BLOCK, True,
        )  # fmt: skip


def encode_tall(
    base: torch.Tensor,
    vector: torch.Tensor,
    finetuned: torch.Tensor,
    plane: torch.Tensor,
    *,
    tall_lambda: float,
    sums: TallSums | None = None,
    start: int = 0,
    stop: int | None = None,
    warps: int | None = None,
) -> None:
    """Fill `plane` with the packed TALL mask of a task, in one launch on the current stream.

    ``|base - finetuned| > |(base + vector) - finetuned| * lambda``, float32, each step rounded, in
    this order (arXiv 2405.07813, equation 5); false where a NaN is compared. Nothing is checked
    here.

    Parameters
    ----------
    base, vector, finetuned
        Shape (n,), contiguous, each float32, bfloat16 or float16.
    plane
        uint8, shape (at least ceil(n / 8),), LSB-first; the last byte's bits past the end become
        zero.
    tall_lambda
        The threshold's factor, rounded to float32.
    sums
        Where the sums of each block go, indexed as the weights are; None: not wanted.
    start, stop
        The weights to encode; `start` is a multiple of `BLOCK`.
    warps
        Warps a block of weights; None: what suits.
    """
    stop = base.numel() if stop is None else stop
    if start >= stop:
        return
    if warps is None:
        warps = _WARPS if sums is None else _WARPS_SUMMING
    with launching_on(base):
        tall_kernel[(triton.cdiv(stop - start, BLOCK),)](
            base,
            vector,
            finetuned,
            float(tall_lambda),
            plane,
            None if sums is None else sums.ones,
            None if sums is None else sums.moved,
            None if sums is None else sums.error,
            None if sums is None else sums.same.view(torch.uint8),
            None if sums is None else sums.finite.view(torch.uint8),
            start,
            stop,
            SUMS=sums is not None,
            BLOCK=BLOCK,
            num_warps=warps,
            enable_fp_fusion=False,
        )
