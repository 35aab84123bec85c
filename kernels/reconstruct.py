"""base + levels[code] * vector over a whole arena in one launch: `reference.reconstruct` on a GPU.

Memory-bound: each thread moves 16 bytes at a time; a plane costs one byte for eight weights.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import BLOCK, INTERPRETED, Shape, lanes, launching_on, rounded, tl_dtype

__all__ = ["reconstruct"]

_SHAPE: Final = Shape()


@triton.jit
def _tile(
    base,
    planes,
    plane_stride,
    vector,
    rows,
    table,
    out,
    start,
    stop,
    tile,
    PLANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    DTYPE: tl.constexpr,
    SOFT: tl.constexpr,
    MASKED: tl.constexpr,
):
    group = tl.arange(0, TILE // LANES)
    lane = tl.arange(0, LANES)[None, :]
    within = group[:, None] * LANES + lane
    # 64-bit from here on: an arena of a 7B model has more than 2**31 weights.
    first = start + tile * TILE
    at = first + within
    inside = at < stop if MASKED else None
    x = tl.load(base + at, mask=inside).to(tl.float32)
    if PLANES > 0:
        used = first + group * LANES < stop if MASKED else None
        byte_at = first // 8 + group * LANES // 8
        shift = within % 8 if LANES < 8 else lane
        if not ROWS:
            row = tl.zeros([], tl.int64)
        elif TILE == BLOCK:
            row = tl.load(rows + first // BLOCK).to(tl.int64)
        else:
            # Zero outside: what is loaded there must still be a row of the table.
            none = 0 if MASKED else None
            row = tl.load(rows + (first + group * LANES) // BLOCK, mask=used, other=none)
            row = row.to(tl.int64)[:, None]
        code = tl.zeros([TILE // LANES, LANES], tl.int32)
        plane = planes
        for k in tl.static_range(PLANES):
            byte = tl.load(plane + byte_at, mask=used).to(tl.int32)
            code |= ((byte[:, None] >> shift) & 1) << k
            # Added up: a product with k would be one of 32 bits, and planes can lie further apart.
            plane += plane_stride
        if PLANES == 1:
            # Few levels: chosen between in registers, where a table would be read per weight.
            low = tl.load(table + row * 2)
            high = tl.load(table + row * 2 + 1)
            step = tl.where(code != 0, high, low)
        elif PLANES == 2:
            at_row = table + row * 4
            low = tl.where((code & 1) != 0, tl.load(at_row + 1), tl.load(at_row))
            high = tl.where((code & 1) != 0, tl.load(at_row + 3), tl.load(at_row + 2))
            step = tl.where((code & 2) != 0, high, low)
        else:
            step = tl.load(table + (row * (1 << PLANES) + code))
        if VECTOR:
            step = step * tl.load(vector + at, mask=inside).to(tl.float32)
        x = x + step
    tl.store(out + at, rounded(x, DTYPE, SOFT), mask=inside)


@triton.jit(do_not_specialize=["stop"])
def reconstruct_kernel(
    base,
    planes,
    plane_stride,
    vector,
    rows,
    table,
    out,
    start,
    stop,
    PLANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    DTYPE: tl.constexpr,
    SOFT: tl.constexpr,
):
    """One tile of weights; see `reconstruct`."""
    tile = tl.program_id(0).to(tl.int64)
    # The one tile that is cut short takes a path of its own: masks on single weights would keep
    # the compiler from 16-byte accesses everywhere.
    if start + (tile + 1) * TILE <= stop:
        _tile(
            base, planes, plane_stride, vector, rows, table, out, start, stop, tile,
            PLANES, VECTOR, ROWS, TILE, BLOCK, LANES, DTYPE, SOFT, False,
        )  # fmt: skip
    else:
        _tile(
            base, planes, plane_stride, vector, rows, table, out, start, stop, tile,
            PLANES, VECTOR, ROWS, TILE, BLOCK, LANES, DTYPE, SOFT, True,
        )  # fmt: skip


def reconstruct(
    base: torch.Tensor,
    planes: torch.Tensor | None,
    vector: torch.Tensor | None,
    table: torch.Tensor | None,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    shape: Shape = _SHAPE,
) -> None:
    """Fill `out` with base + levels[code] * vector, in one launch on the current stream.

    float32 arithmetic, product and sum each rounded, one rounding to the output dtype. Nothing is
    checked here.

    Parameters
    ----------
    base
        Shape (n,), float32, bfloat16 or float16, contiguous.
    planes
        uint8, shape (K, at least ceil(n / 8)), LSB-first, each plane contiguous, K = 1..4; None:
        K = 0, `out` becomes the base.
    vector
        Shape (n,), one of the three dtypes; None stands for 1.
    table
        float32, shape (R, 2**K): the levels of each row. None for K = 0.
    out
        Shape (n,), one of the three dtypes; may be `base` itself.
    rows
        int32, shape (at least ceil(n / BLOCK),): which row of `table` a block takes; None: row 0.
    start, stop
        The weights to reconstruct; `start` is a multiple of `BLOCK`.
    shape
        How the work is cut.
    """
    stop = base.numel() if stop is None else stop
    if start >= stop:
        return
    count = 0 if planes is None else planes.shape[0]
    tile = shape.blocks * BLOCK
    with launching_on(out):
        reconstruct_kernel[(triton.cdiv(stop - start, tile),)](
            base,
            planes,
            # Of one plane it is not used, and must not make a kernel of its own.
            planes.stride(0) if planes is not None and count > 1 else 0,
            vector,
            rows,
            table,
            out,
            start,
            stop,
            PLANES=count,
            VECTOR=vector is not None,
            ROWS=rows is not None,
            TILE=tile,
            BLOCK=BLOCK,
            LANES=lanes(base.dtype, None if vector is None else vector.dtype, out.dtype),
            DTYPE=tl_dtype(out.dtype),
            SOFT=INTERPRETED,
            num_warps=shape.warps,
            enable_fp_fusion=False,
        )
