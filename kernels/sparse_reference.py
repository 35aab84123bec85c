"""Codes that touch few weights, kept as positions and codes alone, in plain torch.

The compact form, how planes become it and come back, and the meaning of `kernels/sparse.py`.
Knows torch only. No shared vector: a touched weight becomes base + level in float32, rounded once
to the output dtype; every other weight is the base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch

from . import reference

__all__ = [
    "BLOCK",
    "GROUP",
    "UNTOUCHED",
    "SparseCode",
    "apply",
    "compress",
    "expand",
    "pack",
    "plane_bytes",
    "restore",
    "switch",
]

#: Weights a group: a position in it takes 12 bits, and leaves 4 for the code.
GROUP: Final = 4096
#: Weights a block; one block has one row of levels.
BLOCK: Final = 1024
#: Level 0 of a code that touches few weights. x + -0.0 is x for every x, where -0.0 + 0.0 is
#: +0.0: with it a full reconstruction and one that skips the untouched weights agree to the bit.
UNTOUCHED: Final = -0.0
#: Weights that `compress` looks at in one go: what it needs beside its result is bounded.
_SPAN: Final = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseCode:
    """The touched weights of an arena, 16 bits each; see `compress`."""

    entries: torch.Tensor
    """int16 (the bits of a uint16), shape (touched,): position in the group | code << 12, the
    groups one after the other, ascending within each; codes are 1 .. 2**bits - 1."""
    starts: torch.Tensor
    """int64, shape (groups + 1,): entries of group g are starts[g] .. starts[g + 1] - 1."""
    table: torch.Tensor
    """float32, shape (R, 2**bits): the levels of each row; the one of code 0 is `UNTOUCHED`."""
    rows: torch.Tensor | None
    """int32, shape (at least ceil(weights / BLOCK),): which row a block takes; None: row 0."""
    bits: int
    """Bits a code, 1..4."""
    weights: int
    """Weights of the arena."""

    @property
    def groups(self) -> int:
        """Groups of the arena; the last may be short."""
        return -(-self.weights // GROUP)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        rows = 0 if self.rows is None else self.rows.nbytes
        return self.entries.nbytes + self.starts.nbytes + self.table.nbytes + rows

    def to(self, device: torch.device | str) -> SparseCode:
        """The same code on a device."""
        return replace(
            self,
            entries=self.entries.to(device),
            starts=self.starts.to(device),
            table=self.table.to(device),
            rows=None if self.rows is None else self.rows.to(device),
        )


def plane_bytes(weights: int) -> int:
    """Bytes of a plane that is written by `expand`: whole words of 32 weights."""
    return -(-weights // 32) * 4


def compress(
    planes: torch.Tensor,
    weights: int,
    *,
    table: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> SparseCode:
    """The compact form of packed planes.

    Parameters
    ----------
    planes
        uint8, shape (K, at least ceil(weights / 8)), K = 1..4, LSB-first; bits past the last
        weight are ignored.
    weights
        Weights of the arena.
    table
        float32, shape (R, 2**K), `UNTOUCHED` first in every row.
    rows
        int32, shape (at least ceil(weights / BLOCK),), or None: row 0 everywhere.
    """
    device = planes.device
    found = [torch.zeros(0, dtype=torch.int16, device=device)]
    counts = [torch.zeros(1, dtype=torch.int64, device=device)]
    for start in range(0, weights, _SPAN):
        size = min(_SPAN, weights - start)
        part = planes[:, start // 8 : (start + size + 7) // 8]
        touched = part[0].clone()
        for plane in part[1:]:
            touched |= plane
        at = touched.nonzero().squeeze(1)
        picked = part[:, at].contiguous()
        code = reference.codes(picked, at.numel() * 8)
        index = (at.unsqueeze(1) * 8 + torch.arange(8, device=device)).flatten()
        there = (code != 0) & (index < size)
        code, index = code[there], index[there]
        found.append((index % GROUP | code << 12).to(torch.int16))
        counts.append(torch.bincount(index // GROUP, minlength=-(-size // GROUP)))
    return SparseCode(
        entries=torch.cat(found),
        starts=torch.cat(counts).cumsum(0),
        table=table,
        rows=rows,
        bits=planes.shape[0],
        weights=weights,
    )


def _touched(code: SparseCode) -> tuple[torch.Tensor, torch.Tensor]:
    """The touched weights and their codes, int64."""
    groups = torch.arange(code.groups, device=code.entries.device)
    word = code.entries.long() & 0xFFFF
    first = torch.repeat_interleave(groups * GROUP, code.starts.diff())
    return first + word % GROUP, word >> 12


def pack(at: torch.Tensor, codes: torch.Tensor, bits: int, weights: int) -> torch.Tensor:
    """Planes of the codes of some weights, zeros elsewhere: uint8, shape (bits, `plane_bytes`)."""
    dense = torch.zeros(plane_bytes(weights) * 8, dtype=torch.uint8, device=at.device)
    dense[at] = codes.to(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=at.device)
    planes = torch.empty(bits, plane_bytes(weights), dtype=torch.uint8, device=at.device)
    for k in range(bits):
        planes[k] = ((dense >> k & 1).unflatten(0, (-1, 8)) << shifts).sum(1, dtype=torch.uint8)
    return planes


def expand(code: SparseCode) -> torch.Tensor:
    """The packed planes: uint8, shape (bits, `plane_bytes`), zeros past the last weight."""
    at, codes = _touched(code)
    return pack(at, codes, code.bits, code.weights)


def apply(code: SparseCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """Make the touched weights of `out` base + level, rounded; leave the others as they are.

    Parameters
    ----------
    code
        Of an arena of n weights.
    base
        Shape (n,), float32, bfloat16 or float16.
    out
        Shape (n,), one of the three dtypes; may be `base` itself.
    """
    at, codes = _touched(code)
    row = 0 if code.rows is None else code.rows[at // BLOCK].long()
    out[at] = (base[at].float() + code.table[row, codes]).to(out.dtype)


def restore(code: SparseCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """Make the touched weights of `out` the base again, rounded; leave the others as they are."""
    at, _ = _touched(code)
    out[at] = base[at].to(out.dtype)


def switch(old: SparseCode, new: SparseCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """From `old` to `new` in place: `restore` the one, then `apply` the other."""
    restore(old, base, out)
    apply(new, base, out)
