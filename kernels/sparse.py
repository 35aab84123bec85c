"""Codes that touch few weights, applied to the weights they touch: `sparse_reference` on a GPU.

Bound by sectors of 32 bytes, not by weights: at 2 % density a bfloat16 sector of 16 weights is
touched with probability 28 %, and where a part of it is written the rest is read (`sectors`, which
switches, is spared that). What matters is to have many sectors in flight:

- A program takes several groups, and their entries as one run: consecutive lanes take
  consecutive entries, whatever group each is in, so that uneven groups leave no lane idle. Which
  group an entry is in is told by comparing its number with the few bounds of the groups.
- How many groups is chosen so that the run of an average program is one chunk of lanes, several
  entries a thread, all of their loads independent of each other.
- Positions are 32-bit within a program's groups; only the address of its first is 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, launching_on, rounded, tl_dtype
from .entries import Cut, entry
from .sectors import switch
from .sparse_reference import BLOCK, GROUP, SparseCode, plane_bytes
from .touched import mark, put_back

__all__ = ["Cut", "apply", "cut", "expand", "restore", "switch"]


def cut(code: SparseCode) -> Cut:
    """The cut for a code: one chunk for most programs."""
    mean = code.entries.numel() / max(1, code.groups)
    groups = 8
    while groups > 1 and groups * mean > 900:
        groups //= 2
    # Room for the spread of random counts.
    chunk = triton.next_power_of_2(int(groups * mean * 1.1) + 1)
    return Cut(groups=groups, chunk=min(1024, max(128, chunk)))


@triton.jit(do_not_specialize=["start", "stop"])
def touch_kernel(
    entries,
    starts,
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
    """Some groups: apply their entries or, where there are no levels, restore what they touch."""
    # 64-bit: an arena of a 7B model has more than 2**31 weights.
    first = start + tl.program_id(0).to(tl.int64) * GROUPS
    last = tl.minimum(first + GROUPS, stop)
    base += first * GROUP
    out += first * GROUP
    low = tl.load(starts + first)
    count = (tl.load(starts + last) - low).to(tl.int32)
    chunk = tl.zeros([], tl.int32)
    while chunk < count:
        at = chunk + tl.arange(0, CHUNK)
        inside = at < count
        place, code = entry(entries, starts, first, last, low, at, inside, GROUPS, GROUP)
        if LEVELS:
            # From memory first: the levels come from the cache, and would only hold it up.
            x = tl.load(base + place, mask=inside).to(tl.float32)
            row = 0
            if ROWS:
                block = first * (GROUP // BLOCK) + place // BLOCK
                row = tl.load(rows + block, mask=inside, other=0)
            level = tl.load(table + (row * LEVELS + code))
            tl.store(out + place, rounded(x + level, DTYPE, SOFT), mask=inside)
        else:
            put_back(base, out, place, inside, DTYPE, SOFT)
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
        place, code = entry(entries, starts, first, last, low, at, inside, GROUPS, GROUP)
        mark(words + first * (GROUP // 32), word_stride, place, inside, code, PLANES)
        chunk += CHUNK


def _touch(
    code: SparseCode,
    base: torch.Tensor,
    out: torch.Tensor,
    applying: bool,
    start: int,
    stop: int | None,
    shape: Cut | None,
) -> None:
    stop = code.weights if stop is None else stop
    if start >= stop or not code.entries.numel():
        return
    shape = shape or cut(code)
    first, last = start // GROUP, -(-stop // GROUP)
    with launching_on(out):
        touch_kernel[(triton.cdiv(last - first, shape.groups),)](
            code.entries,
            code.starts,
            code.rows if applying else None,
            code.table if applying else None,
            base,
            out,
            first,
            last,
            LEVELS=1 << code.bits if applying else 0,
            ROWS=applying and code.rows is not None,
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
    _touch(code, base, out, True, start, stop, shape)


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
    _touch(code, base, out, False, start, stop, shape)


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
