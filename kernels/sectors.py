"""From one sparse code to another by whole sectors of 32 bytes, in one launch.

Memory reads and writes sectors, and whoever writes a part of one has the rest read first. `out`
holds the old code over the base, so all of a sector that either code touches follows from the base
and the new code: a base's sector in, a sector out, and what was there is never read.

- The first entry of a sector speaks for it: it restores the sector, or applies itself and the next
  few entries that are in it. More than those (1 in 70,000 sectors at 2 % of 16 weights) follow one
  by one, once the sector is written.
- A program restores and applies the same groups, so that the second finds in the cache what the
  first brought there.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, launching_on, rounded, tl_dtype
from .entries import Cut, entry
from .sparse_reference import BLOCK, GROUP, SparseCode

__all__ = ["cut", "switch"]

_SECTOR: Final = 32
#: Entries of a sector that are applied with the first one, itself among them.
_NEAR: Final = 4


def cut(*codes: SparseCode) -> Cut:
    """The cut for the densest of some codes: one chunk for most programs."""
    mean = max(code.entries.numel() / max(1, code.groups) for code in codes)
    groups = 8
    while groups > 1 and groups * mean > 100:
        groups //= 2
    # Room for the spread of random counts.
    chunk = triton.next_power_of_2(int(groups * mean * 1.1) + 1)
    return Cut(groups=groups, chunk=min(128, max(64, chunk)), warps=2)


@triton.jit
def _level(
    table, rows, first, place, code, there, LEVELS: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = 0
    if ROWS:
        row = tl.load(rows + first * (GROUP // BLOCK) + place // BLOCK, mask=there, other=0)
    return tl.load(table + (row * LEVELS + code), mask=there, other=0.0)


@triton.jit
def _switch(
    old_entries, old_starts, new_entries, new_starts, rows, table, base, out, first, last, left,
    LEVELS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, NEAR: tl.constexpr,
    DTYPE: tl.constexpr, SOFT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, WIDTH)[None, :]
    # The level of code 0, which leaves a weight as it is: minus zero.
    none = tl.load(table)
    # Restored: all of each sector becomes the base.
    low = tl.load(old_starts + first)
    count = (tl.load(old_starts + last) - low).to(tl.int32)
    chunk = tl.zeros([], tl.int32)
    while chunk < count:
        at = chunk + tl.arange(0, CHUNK)
        inside = at < count
        place, _ = entry(old_entries, old_starts, first, last, low, at, inside, GROUPS, GROUP)
        before, _ = entry(
            old_entries, old_starts, first, last, low, at - 1, inside & (at > 0), GROUPS, GROUP
        )
        leads = inside & ((at == 0) | (before // WIDTH != place // WIDTH))
        where = (place // WIDTH * WIDTH)[:, None] + lane
        mask = tl.broadcast_to(leads[:, None], where.shape)
        if MASKED:
            mask = mask & (where < left)
        x = tl.load(base + where, mask=mask)
        if base.dtype.element_ty != DTYPE:
            x = rounded(x.to(tl.float32), DTYPE, SOFT)
        tl.store(out + where, x, mask=mask)
        chunk += CHUNK
    # A sector that both touch is another thread's now: what it restored comes first.
    tl.debug_barrier()
    low = tl.load(new_starts + first)
    count = (tl.load(new_starts + last) - low).to(tl.int32)
    chunk = tl.zeros([], tl.int32)
    while chunk < count:
        at = chunk + tl.arange(0, CHUNK)
        inside = at < count
        place, code = entry(new_entries, new_starts, first, last, low, at, inside, GROUPS, GROUP)
        sector = place // WIDTH
        before, _ = entry(
            new_entries, new_starts, first, last, low, at - 1, inside & (at > 0), GROUPS, GROUP
        )
        leads = inside & ((at == 0) | (before // WIDTH != sector))
        where = (sector * WIDTH)[:, None] + lane
        mask = tl.broadcast_to(leads[:, None], where.shape)
        if MASKED:
            mask = mask & (where < left)
        # From memory first: entries and levels come from the cache, and would only hold it up.
        x = tl.load(base + where, mask=mask).to(tl.float32)
        own = _level(table, rows, first, place, code, inside, LEVELS, ROWS, GROUP, BLOCK)
        step = tl.where(lane == (place % WIDTH)[:, None], own[:, None], none)
        for near in tl.static_range(1, NEAR):
            there = inside & (at + near < count)
            other, code = entry(
                new_entries, new_starts, first, last, low, at + near, there, GROUPS, GROUP
            )
            there = there & (other // WIDTH == sector)
            level = _level(table, rows, first, other, code, there, LEVELS, ROWS, GROUP, BLOCK)
            spot = tl.where(there, other % WIDTH, -1)
            step = tl.where(lane == spot[:, None], level[:, None], step)
        tl.store(out + where, rounded(x + step, DTYPE, SOFT), mask=mask)
        far = inside & (at >= NEAR)
        other, _ = entry(new_entries, new_starts, first, last, low, at - NEAR, far, GROUPS, GROUP)
        far = far & (other // WIDTH == sector)
        if tl.max(far.to(tl.int32), axis=0) > 0:
            # Their sector is written by then, here or a chunk before.
            tl.debug_barrier()
            single = tl.load(base + place, mask=far).to(tl.float32)
            tl.store(out + place, rounded(single + own, DTYPE, SOFT), mask=far)
        chunk += CHUNK


@triton.jit(do_not_specialize=["start", "stop", "weights"])
def switch_kernel(
    old_entries, old_starts, new_entries, new_starts, rows, table, base, out, start, stop, weights,
    LEVELS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, NEAR: tl.constexpr,
    DTYPE: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Some groups; see `switch`."""
    # 64-bit: an arena of a 7B model has more than 2**31 weights.
    first = start + tl.program_id(0).to(tl.int64) * GROUPS
    last = tl.minimum(first + GROUPS, stop)
    base += first * GROUP
    out += first * GROUP
    left = weights - first * GROUP
    # Of the last sector alone a part may be missing: masks on single weights would keep the
    # compiler from 16-byte accesses everywhere.
    if left >= GROUPS * GROUP:
        _switch(
            old_entries, old_starts, new_entries, new_starts, rows, table, base, out, first, last,
            left, LEVELS, ROWS, GROUPS, GROUP, BLOCK, CHUNK, WIDTH, NEAR, DTYPE, SOFT, False,
        )  # fmt: skip
    else:
        _switch(
            old_entries, old_starts, new_entries, new_starts, rows, table, base, out, first, last,
            left, LEVELS, ROWS, GROUPS, GROUP, BLOCK, CHUNK, WIDTH, NEAR, DTYPE, SOFT, True,
        )  # fmt: skip


def switch(
    old: SparseCode,
    new: SparseCode,
    base: torch.Tensor,
    out: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    shape: Cut | None = None,
) -> None:
    """From `old` to `new` in one launch, writing the sectors that either touches.

    `out` holds `old` applied over `base`, and is not `base`; both codes are of one arena. Weights
    that neither touches, but that share 32 bytes with one, are written as they were.

    Parameters
    ----------
    old, new
        Of an arena of n weights, on the same device as the others.
    base
        Shape (n,), float32, bfloat16 or float16, contiguous.
    out
        Shape (n,), one of the three dtypes.
    start, stop
        The weights to look at, whole groups: multiples of `GROUP`, or n.
    shape
        How the work is cut; None: by the codes' density.
    """
    stop = new.weights if stop is None else stop
    if start >= stop or not (old.entries.numel() or new.entries.numel()):
        return
    shape = shape or cut(old, new)
    first, last = start // GROUP, -(-stop // GROUP)
    with launching_on(out):
        switch_kernel[(triton.cdiv(last - first, shape.groups),)](
            old.entries,
            old.starts,
            new.entries,
            new.starts,
            new.rows,
            new.table,
            base,
            out,
            first,
            last,
            new.weights,
            LEVELS=1 << new.bits,
            ROWS=new.rows is not None,
            GROUPS=shape.groups,
            GROUP=GROUP,
            BLOCK=BLOCK,
            CHUNK=shape.chunk,
            WIDTH=_SECTOR // out.element_size(),
            NEAR=_NEAR,
            DTYPE=tl_dtype(out.dtype),
            SOFT=INTERPRETED,
            num_warps=shape.warps,
            enable_fp_fusion=False,
        )
