"""Codes that touch few weights, applied to the weights they touch: `sparse_reference` on a GPU.

Bound by sectors of 32 bytes, not by weights: at 2 % density a bfloat16 sector of 16 weights is
touched by one code with probability 28 %, by either of two with 48 %. So a switch reads and
writes about half of the memory that it lies in, 2 bytes a weight (3, where a sector that is
written in part must be read too), and 0.08 bytes of entries, against 6.125 for a dense
reconstruction with a vector. What matters is to have many sectors in flight:

- A program takes several groups, and their entries as one run: consecutive lanes take
  consecutive entries, whatever group each is in, so that uneven groups leave no lane idle. Which
  group an entry is in is told by comparing its number with the few bounds of the groups.
- How many groups is chosen so that the run of an average program is one chunk of lanes, several
  entries a thread, all of their loads independent of each other.
- Positions are 32-bit within a program's groups; only the address of its first is 64-bit.
- A switch restores and applies the same groups in the same program, so that the second finds in
  the cache what the first brought there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, launching_on, rounded, tl_dtype
from .sparse_reference import BLOCK, GROUP, SparseCode, plane_bytes
from .touched import mark, put_back

__all__ = ["Cut", "apply", "cut", "expand", "restore", "switch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How the work is cut: groups a program, entries it takes at once, warps."""

    groups: int
    chunk: int
    warps: int = 4


def cut(*codes: SparseCode) -> Cut:
    """The cut for the densest of some codes: one chunk for most programs."""
    mean = max(code.entries.numel() / max(1, code.groups) for code in codes)
    groups = 8
    while groups > 1 and groups * mean > 900:
        groups //= 2
    # Room for the spread of random counts.
    chunk = triton.next_power_of_2(int(groups * mean * 1.1) + 1)
    return Cut(groups=groups, chunk=min(1024, max(128, chunk)))


@triton.jit
def _entry(
    entries, starts, first, last, low, at, inside, GROUPS: tl.constexpr, GROUP: tl.constexpr
):
    """Weight, from the first of group `first` on, and code of the entries low + at."""
    word = tl.load(entries + low + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
    place = word % GROUP
    for j in tl.static_range(1, GROUPS):
        bound = (tl.load(starts + tl.minimum(first + j, last)) - low).to(tl.int32)
        place += tl.where(at >= bound, GROUP, 0)
    return place, word >> 12


@triton.jit(do_not_specialize=["start", "stop"])
def touch_kernel(
    old_entries,
    old_starts,
    new_entries,
    new_starts,
    rows,
    table,
    base,
    out,
    start,
    stop,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Some groups: restore what the old code touched, if any, then apply the new one, if any."""
    # 64-bit: an arena of a 7B model has more than 2**31 weights.
    first = start + tl.program_id(0).to(tl.int64) * GROUPS
    last = tl.minimum(first + GROUPS, stop)
    base += first * GROUP
    out += first * GROUP
    lane = tl.arange(0, CHUNK)
    if old_entries is not None:
        low = tl.load(old_starts + first)
        count = (tl.load(old_starts + last) - low).to(tl.int32)
        chunk = tl.zeros([], tl.int32)
        while chunk < count:
            at = chunk + lane
            inside = at < count
            place, _ = _entry(old_entries, old_starts, first, last, low, at, inside, GROUPS, GROUP)
            put_back(base, out, place, inside, DTYPE, SOFT)
            chunk += CHUNK
    if old_entries is not None and new_entries is not None:
        # A weight that both touch is another thread's now: what it restored comes first.
        tl.debug_barrier()
    if new_entries is not None:
        low = tl.load(new_starts + first)
        count = (tl.load(new_starts + last) - low).to(tl.int32)
        chunk = tl.zeros([], tl.int32)
        while chunk < count:
            at = chunk + lane
            inside = at < count
            place, code = _entry(
                new_entries, new_starts, first, last, low, at, inside, GROUPS, GROUP
            )
            # From memory first: the levels come from the cache, and would only hold it up.
            x = tl.load(base + place, mask=inside).to(tl.float32)
            row = 0
            if ROWS:
                block = first * (GROUP // BLOCK) + place // BLOCK
                row = tl.load(rows + block, mask=inside, other=0)
            level = tl.load(table + (row * LEVELS + code))
            tl.store(out + place, rounded(x + level, DTYPE, SOFT), mask=inside)
            chunk += CHUNK


@triton.jit(do_not_specialize=["word_stride", "stop"])
def expand_kernel(
    entries,
    starts,
    words,
    word_stride,
    stop,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Some groups: the bits of their entries into zeroed planes."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    last = tl.minimum(first + GROUPS, stop)
    low = tl.load(starts + first)
    count = (tl.load(starts + last) - low).to(tl.int32)
    chunk = tl.zeros([], tl.int32)
    while chunk < count:
        at = chunk + tl.arange(0, CHUNK)
        inside = at < count
        place, code = _entry(entries, starts, first, last, low, at, inside, GROUPS, GROUP)
        mark(words + first * (GROUP // 32), word_stride, place, inside, code, PLANES)
        chunk += CHUNK


def _touch(
    old: SparseCode | None,
    new: SparseCode | None,
    base: torch.Tensor,
    out: torch.Tensor,
    start: int,
    stop: int | None,
    shape: Cut | None,
) -> None:
    codes = [code for code in (old, new) if code is not None]
    stop = codes[0].weights if stop is None else stop
    if start >= stop or not any(code.entries.numel() for code in codes):
        return
    shape = shape or cut(*codes)
    first, last = start // GROUP, -(-stop // GROUP)
    with launching_on(out):
        touch_kernel[(triton.cdiv(last - first, shape.groups),)](
            None if old is None else old.entries,
            None if old is None else old.starts,
            None if new is None else new.entries,
            None if new is None else new.starts,
            None if new is None else new.rows,
            None if new is None else new.table,
            base,
            out,
            first,
            last,
            LEVELS=0 if new is None else 1 << new.bits,
            ROWS=new is not None and new.rows is not None,
            GROUPS=shape.groups,
            GROUP=GROUP,
            BLOCK=BLOCK,
            CHUNK=shape.chunk,
            DTYPE=tl_dtype(out.dtype),
            SOFT=INTERPRETED,
            num_warps=shape.warps,
            enable_fp_fusion=False,
        )


def apply(
    code: SparseCode,
    base: torch.Tensor,
    out: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    shape: Cut | None = None,
) -> None:
    """Make the touched weights of `out` base + level, in one launch on the current stream.

    A float32 sum, rounded once to the output dtype; no other weight of `out` is read or written.
    Nothing is checked here.

    Parameters
    ----------
    code
        Of an arena of n weights, on the same device as the others.
    base
        Shape (n,), float32, bfloat16 or float16, contiguous.
    out
        Shape (n,), one of the three dtypes; may be `base` itself.
    start, stop
        The weights to look at, whole groups: multiples of `GROUP`, or n.
    shape
        How the work is cut; None: by the code's density.
    """
    _touch(None, code, base, out, start, stop, shape)


def restore(
    code: SparseCode,
    base: torch.Tensor,
    out: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    shape: Cut | None = None,
) -> None:
    """Make the touched weights of `out` the base again, rounded to its dtype; see `apply`."""
    _touch(code, None, base, out, start, stop, shape)


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
    """From `old` to `new` in one launch that touches only what either does; see `apply`.

    `out` holds `old` applied over `base`, and is not `base`; both codes are of one arena.
    """
    _touch(old, new, base, out, start, stop, shape)


def expand(code: SparseCode, planes: torch.Tensor, *, shape: Cut | None = None) -> None:
    """Fill `planes` with the packed planes of a code, on the current stream.

    Parameters
    ----------
    code
        Of an arena of n weights.
    planes
        uint8, shape (bits, at least `plane_bytes(n)`), each plane contiguous and 4-byte aligned.
        Its first `plane_bytes(n)` bytes a plane are overwritten.
    shape
        How the work is cut; None: by the code's density.
    """
    words = planes[:, : plane_bytes(code.weights)].view(torch.int32)
    words.zero_()
    if not code.entries.numel():
        return
    shape = shape or cut(code)
    with launching_on(planes):
        expand_kernel[(triton.cdiv(code.groups, shape.groups),)](
            code.entries,
            code.starts,
            words,
            words.stride(0),
            code.groups,
            PLANES=code.bits,
            GROUPS=shape.groups,
            GROUP=GROUP,
            CHUNK=shape.chunk,
            num_warps=shape.warps,
        )
