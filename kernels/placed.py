"""`reconstruct` into tensors that lie anywhere: one launch over an arena, a place for each tensor.

A model's tensors are separate allocations, and stay where they are. A launch for each of hundreds
would cost more than the arithmetic; here each block looks up where its tensor is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import BLOCK, INTERPRETED, lanes, launching_on, tl_dtype
from .reconstruct import _tile

__all__ = ["reconstruct_placed"]


@triton.jit
def placed_kernel(
    base,
    planes,
    plane_stride,
    vector,
    rows,
    table,
    addresses,
    stops,
    blocks,
    PLANES: tl.constexpr,
    VECTOR: tl.constexpr,
    LISTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    DTYPE: tl.constexpr,
    SOFT: tl.constexpr,
):
    """One block of weights; see `reconstruct_placed`."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + tile)
    if LISTED:
        number, tile = tile, tl.load(blocks + tile).to(tl.int64)
        # So that what is listed is found by the block of the arena, as the base is.
        planes += (number - tile) * (BLOCK // 8)
        rows += number - tile
    stop = tl.load(stops + row)
    address = tl.load(addresses + row)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    out = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    if (tile + 1) * BLOCK <= stop:
        _tile(
            base, planes, plane_stride, vector, rows, table, out, 0, stop, tile,
            PLANES, VECTOR, True, BLOCK, BLOCK, LANES, DTYPE, SOFT, False,
        )  # fmt: skip
    elif tile * BLOCK < stop:
        _tile(
            base, planes, plane_stride, vector, rows, table, out, 0, stop, tile,
            PLANES, VECTOR, True, BLOCK, BLOCK, LANES, DTYPE, SOFT, True,
        )  # fmt: skip


def reconstruct_placed(
    base: torch.Tensor,
    planes: torch.Tensor,
    vector: torch.Tensor | None,
    table: torch.Tensor,
    rows: torch.Tensor,
    addresses: torch.Tensor,
    stops: torch.Tensor,
    blocks: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    aligned: bool,
) -> None:
    """Fill tensors with base + levels[code] * vector, in one launch on the current stream.

    As `reconstruct` does, to the bit. Nothing is checked here; the tensors must be alive.

    Parameters
    ----------
    base
        Shape (n,), float32, bfloat16 or float16, contiguous: the arena.
    planes
        uint8, shape (K, at least ceil(n / 8)), LSB-first, each plane contiguous, K = 1..4.
    vector
        Shape (n,), one of the three dtypes; None stands for 1.
    table
        float32, shape (R, 2**K): the levels of each tensor.
    rows
        int32, shape (blocks,): which tensor each block of `BLOCK` weights is of.
    addresses
        int64, shape (R,): where weight 0 of the arena would be, were it of that tensor.
    stops
        int64, shape (R,): where the tensor ends, counted in the arena; 0: it is left alone.
    blocks
        int32: the blocks of the arena that `planes` and `rows` have, which are of these alone then;
        None: all of them.
    dtype
        Of all the tensors, one of the three.
    aligned
        Whether every address is a multiple of 16.
    """
    if not rows.numel():
        return
    count = planes.shape[0]
    with launching_on(base):
        placed_kernel[(rows.numel(),)](
            base,
            planes,
            planes.stride(0) if count > 1 else 0,
            vector,
            rows,
            table,
            addresses,
            stops,
            blocks,
            PLANES=count,
            VECTOR=vector is not None,
            LISTED=blocks is not None,
            ALIGNED=aligned,
            BLOCK=BLOCK,
            LANES=lanes(base.dtype, None if vector is None else vector.dtype, dtype),
            DTYPE=tl_dtype(dtype),
            SOFT=INTERPRETED,
            num_warps=4,
            enable_fp_fusion=False,
        )
