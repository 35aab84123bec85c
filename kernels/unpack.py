"""Planes to flags or codes, a byte a weight: the inverse of packing, in one launch."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import BLOCK, Shape, launching_on, spread

__all__ = ["unpack"]

_SHAPE: Final = Shape(blocks=2)


@triton.jit
def _tile(
    planes,
    plane_stride,
    out,
    start,
    stop,
    tile,
    PLANES: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    first = start + tile * TILE
    # A thread takes two bytes of a plane and writes sixteen of the output.
    group = tl.arange(0, TILE // 16)[:, None]
    byte_at = first // 8 + (group * 2 + tl.arange(0, 2)[None, :])
    used = byte_at * 8 < stop if MASKED else None
    half = (tl.arange(0, 2) * 4)[None, None, :]
    # Four codes a word: a plane costs four instructions for four weights.
    words = tl.zeros([TILE // 16, 2, 2], tl.uint32)
    plane = planes
    for k in tl.static_range(PLANES):
        byte = tl.load(plane + byte_at, mask=used).to(tl.uint32)
        words |= spread((byte[:, :, None] >> half) & 0xF) << k
        # Added up: a product with k would be one of 32 bits, and planes can lie further apart.
        plane += plane_stride
    # Stored as bytes, so that any address will do; the compiler sees that the words lie ready.
    quarter = (tl.arange(0, 4) * 8)[None, None, None, :]
    codes = tl.reshape((words[:, :, :, None] >> quarter).to(tl.uint8), [TILE // 16, 16])
    at = first + (group * 16 + tl.arange(0, 16)[None, :])
    tl.store(out + at, codes, mask=at < stop if MASKED else None)


@triton.jit(do_not_specialize=["stop"])
def unpack_kernel(
    planes,
    plane_stride,
    out,
    start,
    stop,
    PLANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of weights; see `unpack`."""
    tile = tl.program_id(0).to(tl.int64)
    if start + (tile + 1) * TILE <= stop:
        _tile(planes, plane_stride, out, start, stop, tile, PLANES, TILE, False)
    else:
        _tile(planes, plane_stride, out, start, stop, tile, PLANES, TILE, True)


def unpack(
    planes: torch.Tensor,
    out: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    shape: Shape = _SHAPE,
) -> None:
    """Fill `out` with the codes of packed weights, on the current stream.

    Nothing is checked here.

    Parameters
    ----------
    planes
        uint8, shape (K, at least ceil(n / 8)), LSB-first, each plane contiguous, K = 1..4.
    out
        Shape (n,), contiguous: uint8 for codes 0 .. 2**K - 1, or bool where K = 1.
    start, stop
        The weights to unpack; `start` is a multiple of `BLOCK`.
    shape
        How the work is cut.
    """
    stop = out.numel() if stop is None else stop
    if start >= stop:
        return
    tile = shape.blocks * BLOCK
    with launching_on(out):
        unpack_kernel[(triton.cdiv(stop - start, tile),)](
            planes,
            planes.stride(0),
            out.view(torch.uint8),
            start,
            stop,
            PLANES=planes.shape[0],
            TILE=tile,
            num_warps=shape.warps,
        )
