"""Quantized vectors to float32, in one launch: `reference.dequantize` on a GPU."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import BLOCK, Shape, launching_on
from .reference import SCALED

__all__ = ["dequantize"]

_SHAPE: Final = Shape(blocks=2)


@triton.jit
def _tile(
    values,
    scales,
    out,
    start,
    stop,
    tile,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    first = start + tile * TILE
    # A thread writes four weights, which are two bytes or four.
    group = tl.arange(0, TILE // 4)
    used = first + group * 4 < stop if MASKED else None
    scale = tl.load(scales + (first + group * 4) // SCALED, mask=used).to(tl.float32)
    within = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    at = first + within
    inside = at < stop if MASKED else None
    if BITS == 8:
        value = tl.load(values + at, mask=inside).to(tl.int32)
        value = value if SIGNED else value & 0xFF
    else:
        byte_at = first // 2 + (group[:, None] * 2 + tl.arange(0, 2)[None, :])
        byte = tl.load(values + byte_at, mask=byte_at * 2 < stop if MASKED else None).to(tl.int32)
        half = (tl.arange(0, 2) * 4)[None, None, :]
        value = tl.reshape((byte[:, :, None] >> half) & 15, [TILE // 4, 4])
        value = (value ^ 8) - 8 if SIGNED else value
    tl.store(out + at, value.to(tl.float32) * scale[:, None], mask=inside)


@triton.jit(do_not_specialize=["stop"])
def dequantize_kernel(
    values,
    scales,
    out,
    start,
    stop,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of weights; see `dequantize`."""
    tile = tl.program_id(0).to(tl.int64)
    if start + (tile + 1) * TILE <= stop:
        _tile(values, scales, out, start, stop, tile, BITS, SIGNED, SCALED, TILE, False)
    else:
        _tile(values, scales, out, start, stop, tile, BITS, SIGNED, SCALED, TILE, True)


def dequantize(
    values: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    *,
    bits: int,
    signed: bool,
    start: int = 0,
    stop: int | None = None,
    shape: Shape = _SHAPE,
) -> None:
    """Fill `out` with ``float32(q) * scale``, on the current stream.

    Nothing is checked here.

    Parameters
    ----------
    values
        uint8, shape (at least ceil(n * bits / 8),), contiguous; of 4 bits the first weight of a
        byte is its lower half.
    scales
        bfloat16, shape (at least ceil(n / 256),), contiguous.
    out
        Shape (n,), float32, contiguous.
    bits, signed
        8 or 4, and whether the values are two's complement.
    start, stop
        The weights to write; `start` is a multiple of `BLOCK`.
    shape
        How the work is cut.
    """
    stop = out.numel() if stop is None else stop
    if start >= stop:
        return
    tile = shape.blocks * BLOCK
    with launching_on(out):
        dequantize_kernel[(triton.cdiv(stop - start, tile),)](
            values.view(torch.int8),
            scales,
            out,
            start,
            stop,
            BITS=bits,
            SIGNED=signed,
            SCALED=SCALED,
            TILE=tile,
            num_warps=shape.warps,
            enable_fp_fusion=False,
        )
