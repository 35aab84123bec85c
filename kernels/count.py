"""Counts over the packed masks of T tasks: per weight, per number of uses, per pair of tasks.

Masks are added as they lie, up to 32 weights a word: bit j of the count of each weight stands in a
word of its own, and adding two masks to these takes a few logical operations for a whole word.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import BLOCK, Shape, launching_on, spread
from .counting import add_up, cut, load, popcount, valid

__all__ = ["at_least", "count_uses", "use_histogram"]

_USES: Final = Shape(blocks=2, warps=2)
_WORDS: Final = Shape(blocks=4)


@triton.jit
def _half(a, b):
    return a ^ b, a & b


@triton.jit
def _counts(masks, stride, tasks, at, inside, WORD: tl.constexpr, MASKED: tl.constexpr):
    """Bits 0 to 6 of how many masks have each bit set."""
    b0 = tl.zeros(at.shape, tl.uint32)
    b1 = b0
    b2 = b0
    b3 = b0
    b4 = b0
    b5 = b0
    b6 = b0
    # Eight masks a turn, so that enough loads are under way at a time.
    task = tl.zeros([], tl.int64)
    while task < tasks:
        for _ in tl.static_range(4):
            x = load(masks, stride, task, tasks, at, inside, WORD, MASKED)
            y = load(masks, stride, task + 1, tasks, at, inside, WORD, MASKED)
            task += 2
            carry = (x & y) | (b0 & (x | y))
            b0 = b0 ^ x ^ y
            b1, carry = _half(b1, carry)
            b2, carry = _half(b2, carry)
            b3, carry = _half(b3, carry)
            b4, carry = _half(b4, carry)
            b5, carry = _half(b5, carry)
            b6 = b6 ^ carry
    return b0, b1, b2, b3, b4, b5, b6


@triton.jit
def _as_bytes(b, nibble, place: tl.constexpr):
    return spread((b[:, None] >> nibble) & 0xF) << place


@triton.jit
def _uses(
    masks, stride, tasks, out, stop, block, PLACES: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, WORD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = WORD.primitive_bitwidth
    SIZE: tl.constexpr = BLOCKS * BLOCK // WIDTH
    word = tl.arange(0, SIZE)
    at = block * (BLOCK // WIDTH) + word
    b0, b1, b2, b3, b4, b5, b6 = _counts(masks, stride, tasks, at, at * WIDTH < stop, WORD, MASKED)
    # Four counts a word, a byte each.
    nibble = (tl.arange(0, WIDTH // 4) * 4)[None, :]
    counts = _as_bytes(b0, nibble, 0)
    if PLACES > 1:
        counts |= _as_bytes(b1, nibble, 1)
    if PLACES > 2:
        counts |= _as_bytes(b2, nibble, 2)
    if PLACES > 3:
        counts |= _as_bytes(b3, nibble, 3)
    if PLACES > 4:
        counts |= _as_bytes(b4, nibble, 4)
    if PLACES > 5:
        counts |= _as_bytes(b5, nibble, 5)
    if PLACES > 6:
        counts |= _as_bytes(b6, nibble, 6)
    byte = (tl.arange(0, 4) * 8)[None, None, :]
    counts = tl.reshape((counts[:, :, None] >> byte).to(tl.uint8), [SIZE, WIDTH])
    weight = block * BLOCK + (word[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    tl.store(out + weight, counts, mask=weight < stop if MASKED else None)


@triton.jit(do_not_specialize=["tasks", "stop"])
def uses_kernel(
    masks, stride, tasks, out, start, stop, PLACES: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """One tile of weights; see `count_uses`."""
    block = start // BLOCK + tl.program_id(0).to(tl.int64) * BLOCKS
    if (block + BLOCKS) * BLOCK <= stop:
        _uses(masks, stride, tasks, out, stop, block, PLACES, BLOCKS, BLOCK, WORD, False)
    else:
        PART: tl.constexpr = BLOCKS * 8 // WORD.primitive_bitwidth
        while block * BLOCK < stop:
            _uses(masks, stride, tasks, out, stop, block, PLACES, PART, BLOCK, tl.uint8, True)
            block += PART


@triton.jit
def _carry(b, carry, addend, place: tl.constexpr):
    one = (0 - ((addend >> place) & 1)).to(tl.uint32)
    return (b & carry) | (one & (b | carry))


@triton.jit
def _at_least(
    masks, stride, tasks, least, out, stop, block, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    WORD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = WORD.primitive_bitwidth
    at = block * (BLOCK // WIDTH) + tl.arange(0, BLOCKS * BLOCK // WIDTH)
    inside = at * WIDTH < stop
    b0, b1, b2, b3, b4, b5, b6 = _counts(masks, stride, tasks, at, inside, WORD, MASKED)
    # count >= least where count + (127 - least) + 1 carries out of seven bits.
    addend = 127 - least
    carry = tl.full(at.shape, 0xFFFFFFFF, tl.uint32)
    carry = _carry(b0, carry, addend, 0)
    carry = _carry(b1, carry, addend, 1)
    carry = _carry(b2, carry, addend, 2)
    carry = _carry(b3, carry, addend, 3)
    carry = _carry(b4, carry, addend, 4)
    carry = _carry(b5, carry, addend, 5)
    carry = _carry(b6, carry, addend, 6)
    if MASKED:
        carry = carry & valid(at, stop)
    tl.store(out.to(tl.pointer_type(WORD)) + at, carry.to(WORD), mask=inside if MASKED else None)


@triton.jit(do_not_specialize=["tasks", "least", "stop"])
def at_least_kernel(
    masks, stride, tasks, least, out, start, stop, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """One tile of weights; see `at_least`."""
    block = start // BLOCK + tl.program_id(0).to(tl.int64) * BLOCKS
    if (block + BLOCKS) * BLOCK <= stop:
        _at_least(masks, stride, tasks, least, out, stop, block, BLOCKS, BLOCK, WORD, False)
    else:
        PART: tl.constexpr = BLOCKS * 8 // WORD.primitive_bitwidth
        while block * BLOCK < stop:
            _at_least(masks, stride, tasks, least, out, stop, block, PART, BLOCK, tl.uint8, True)
            block += PART


@triton.jit
def _equal(b, value, place: tl.constexpr):
    return b ^ (((value >> place) & 1) - 1).to(tl.uint32)


@triton.jit
def _histogram(
    masks, stride, tasks, out, stop, block, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    WORD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = WORD.primitive_bitwidth
    at = block * (BLOCK // WIDTH) + tl.arange(0, BLOCKS * BLOCK // WIDTH)
    b0, b1, b2, b3, b4, b5, b6 = _counts(masks, stride, tasks, at, at * WIDTH < stop, WORD, MASKED)
    uses = tl.zeros([], tl.int32)
    while uses <= tasks:
        match = _equal(b0, uses, 0) & _equal(b1, uses, 1) & _equal(b2, uses, 2)
        match = match & _equal(b3, uses, 3) & _equal(b4, uses, 4)
        match = match & _equal(b5, uses, 5) & _equal(b6, uses, 6)
        if MASKED:
            match = match & valid(at, stop)
        elif WIDTH < 32:
            # Inverted bits go on above a narrow word.
            match = match & ((1 << WIDTH) - 1)
        found = tl.sum(popcount(match), axis=0)
        tl.atomic_add(out + uses, found.to(tl.int64), sem="relaxed")
        uses += 1


@triton.jit(do_not_specialize=["tasks", "stop"])
def histogram_kernel(
    masks, stride, tasks, out, start, stop, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """One tile of weights; see `use_histogram`."""
    block = start // BLOCK + tl.program_id(0).to(tl.int64) * BLOCKS
    if (block + BLOCKS) * BLOCK <= stop:
        _histogram(masks, stride, tasks, out, stop, block, BLOCKS, BLOCK, WORD, False)
    else:
        PART: tl.constexpr = BLOCKS * 8 // WORD.primitive_bitwidth
        while block * BLOCK < stop:
            _histogram(masks, stride, tasks, out, stop, block, PART, BLOCK, tl.uint8, True)
            block += PART


def count_uses(
    masks: torch.Tensor,
    out: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    shape: Shape = _USES,
) -> None:
    """Fill `out` with how many tasks use each weight, in one launch on the current stream.

    Nothing is checked, here and in the other launchers.

    Parameters
    ----------
    masks
        uint8, shape (T, at least ceil(n / 8)), T = 1..64, LSB-first, each row
        contiguous.
    out
        uint8, shape (n,), contiguous.
    start, stop
        The weights to count; `start` is a multiple of `BLOCK`.
    shape
        How the work is cut.
    """
    stop = out.numel() if stop is None else stop
    if start >= stop:
        return
    # A thread takes a word: 16 of its counts are one store.
    how = cut(tl.uint16, shape, start, stop, masks)
    with launching_on(out):
        uses_kernel[(how.tiles,)](
            masks,
            masks.stride(0),
            masks.shape[0],
            out,
            start,
            stop,
            PLACES=masks.shape[0].bit_length(),
            BLOCKS=how.blocks,
            BLOCK=BLOCK,
            WORD=how.word,
            num_warps=shape.warps,
        )


def at_least(
    masks: torch.Tensor,
    least: int,
    out: torch.Tensor,
    *,
    stop: int,
    start: int = 0,
    shape: Shape = _WORDS,
) -> None:
    """Fill `out` with the packed mask of the weights that at least `least` tasks use.

    The rule of Consensus Merging (arXiv 2405.07813, section 4.3), in one launch on the current
    stream.

    Parameters
    ----------
    masks
        As in `count_uses`.
    least
        0 .. 127; no weight has more uses than there are tasks.
    out
        uint8, shape (at least ceil(stop / 8),), contiguous; the last byte's bits past `stop`
        become zero. Not one of `masks`.
    start, stop
        The weights to judge; `start` is a multiple of `BLOCK`.
    shape
        How the work is cut.
    """
    if start >= stop:
        return
    how = cut(tl.uint32, shape, start, stop, masks, out)
    with launching_on(out):
        at_least_kernel[(how.tiles,)](
            masks,
            masks.stride(0),
            masks.shape[0],
            least,
            out,
            start,
            stop,
            BLOCKS=how.blocks,
            BLOCK=BLOCK,
            WORD=how.word,
            num_warps=shape.warps,
        )


def use_histogram(
    masks: torch.Tensor,
    out: torch.Tensor,
    *,
    stop: int,
    start: int = 0,
    shape: Shape = _WORDS,
) -> None:
    """Fill `out` with the number of weights that 0, 1, .. T tasks use.

    Parameters
    ----------
    masks
        As in `count_uses`.
    out
        int64, shape (T + 1,), contiguous.
    start, stop
        The weights to count; `start` is a multiple of `BLOCK`.
    shape
        How the work is cut.
    """
    add_up(histogram_kernel, 1, masks, out, start, stop, shape)
