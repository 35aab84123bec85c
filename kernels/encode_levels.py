"""The nearest of 2**K levels of each weight, packed, and their sums, in one pass.

Memory-bound at K = 1; the arithmetic grows with the number of levels.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import BLOCK, launching_on
from .encoding import packed, store_flags, total
from .sums import LevelSums

__all__ = ["encode_levels"]

#: Warps a block: of two or four levels, and of more, whose sums would spill from fewer threads.
_FEW_LEVELS: Final = 2
_MANY_LEVELS: Final = 4


@triton.jit
def _block(
    base,
    vector,
    finetuned,
    rows,
    table,
    planes,
    plane_stride,
    counts,
    products,
    squares,
    moved,
    error,
    same,
    finite,
    stop,
    block,
    PLANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    byte = tl.arange(0, BLOCK // 8)
    lane = tl.arange(0, 8)[None, :]
    first = block * BLOCK
    at = first + (byte[:, None] * 8 + lane)
    inside = at < stop if MASKED else None
    none = 0.0 if MASKED else None
    x = tl.load(base + at, mask=inside, other=none)
    y = tl.load(finetuned + at, mask=inside, other=none)
    t = y.to(tl.float32) - x.to(tl.float32)
    if VECTOR:
        v = tl.load(vector + at, mask=inside, other=none).to(tl.float32)
    if ROWS:
        table += tl.load(rows + block).to(tl.int64) * (1 << PLANES)
    code = tl.zeros([BLOCK // 8, 8], tl.int32)
    nearest = tl.full([BLOCK // 8, 8], float("inf"), tl.float32)
    for c in tl.static_range(1 << PLANES):
        step = tl.load(table + c)
        if VECTOR:
            step = step * v
        distance = tl.abs(t - step)
        # Strictly: of equal distances the first, and never a NaN.
        code = tl.where(distance < nearest, c, code)
        nearest = tl.where(distance < nearest, distance, nearest)
    used = first + byte * 8 < stop if MASKED else None
    plane = planes + first // 8
    for k in tl.static_range(PLANES):
        flag = (code >> k) & 1
        if MASKED:
            flag = tl.where(inside, flag, 0)
        tl.store(plane + byte, packed(flag, lane), mask=used)
        # Added up: a product with k would be one of 32 bits, and planes can lie further apart.
        plane += plane_stride
    if SUMS:
        if MASKED:
            code = tl.where(inside, code, -1)
            nearest = tl.where(inside, nearest, 0.0)
        for c in range(1 << PLANES):
            chosen = code == c
            each = block * (1 << PLANES) + c
            count = total(chosen.to(tl.int32))
            tl.store(counts + each, count)
            if VECTOR:
                tl.store(products + each, total(tl.where(chosen, t * v, 0.0)))
                tl.store(squares + each, total(tl.where(chosen, v * v, 0.0)))
            else:
                tl.store(products + each, total(tl.where(chosen, t, 0.0)))
                tl.store(squares + each, count.to(tl.float32))
        far = total(t * t)
        off = total(nearest * nearest)
        tl.store(moved + block, far)
        tl.store(error + block, off)
        # Infinite still where no level is at a finite distance.
        store_flags(x, y, nearest, far, off, same, finite, block)


@triton.jit(do_not_specialize=["stop"])
def levels_kernel(
    base,
    vector,
    finetuned,
    rows,
    table,
    planes,
    plane_stride,
    counts,
    products,
    squares,
    moved,
    error,
    same,
    finite,
    start,
    stop,
    PLANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of weights; see `encode_levels`."""
    block = start // BLOCK + tl.program_id(0).to(tl.int64)
    if (block + 1) * BLOCK <= stop:
        _block(
            base, vector, finetuned, rows, table, planes, plane_stride, counts, products, squares,
            moved, error, same, finite, stop, block, PLANES, VECTOR, ROWS, SUMS, BLOCK, False,
        )  # fmt: skip
    else:
        _block(
            base, vector, finetuned, rows, table, planes, plane_stride, counts, products, squares,
            moved, error, same, finite, stop, block, PLANES, VECTOR, ROWS, SUMS, BLOCK, True,
        )  # fmt: skip


def encode_levels(
    base: torch.Tensor,
    vector: torch.Tensor | None,
    finetuned: torch.Tensor,
    table: torch.Tensor,
    planes: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    sums: LevelSums | None = None,
    start: int = 0,
    stop: int | None = None,
    warps: int | None = None,
) -> None:
    """Fill `planes` with each weight's nearest level, in one launch on the current stream.

    The code is the first c of those that minimize ``|t - levels[c] * vector|``, where ``t =
    finetuned - base``; float32, each step rounded. A distance that is NaN counts as infinite, and
    where all are the code is 0. Nothing is checked here.

    Parameters
    ----------
    base, finetuned
        Shape (n,), contiguous, each float32, bfloat16 or float16.
    vector
        The same; None stands for 1.
    table
        float32, shape (R, 2**K), contiguous: the levels of each row.
    planes
        uint8, shape (K, at least ceil(n / 8)), K = 1..4, LSB-first, each plane contiguous; the
        last byte's bits past the end become zero.
    rows
        int32, shape (at least ceil(n / BLOCK),): which row of `table` a block takes; None: row 0.
    sums
        Where the sums of each block go, indexed as the weights are; None: not wanted.
    start, stop
        The weights to encode; `start` is a multiple of `BLOCK`.
    warps
        Warps a block of weights; None: what suits the number of levels.
    """
    stop = base.numel() if stop is None else stop
    if start >= stop:
        return
    if warps is None:
        warps = _FEW_LEVELS if planes.shape[0] <= 2 else _MANY_LEVELS
    with launching_on(base):
        levels_kernel[(triton.cdiv(stop - start, BLOCK),)](
            base,
            vector,
            finetuned,
            rows,
            table,
            planes,
            planes.stride(0),
            None if sums is None else sums.counts,
            None if sums is None else sums.products,
            None if sums is None else sums.squares,
            None if sums is None else sums.moved,
            None if sums is None else sums.error,
            None if sums is None else sums.same.view(torch.uint8),
            None if sums is None else sums.finite.view(torch.uint8),
            start,
            stop,
            PLANES=planes.shape[0],
            VECTOR=vector is not None,
            ROWS=rows is not None,
            SUMS=sums is not None,
            BLOCK=BLOCK,
            num_warps=warps,
            enable_fp_fusion=False,
        )
