"""What tests of kernels start from: arenas of weights, and codes over them."""

from __future__ import annotations

import torch
from kernel_helpers import DEVICE

from tallstore.kernels.sparse_reference import UNTOUCHED, SparseCode, compress

__all__ = ["compact", "draw_codes", "draw_levels", "packed"]


def draw_codes(n: int, density: float, count: int, seed: int = 1) -> torch.Tensor:
    """Codes of `count` bits, int64: zero but for a part of the weights."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 1 << count, (n,), generator=generator)
    return codes * (torch.rand(n, generator=generator) < density)


def draw_levels(rows: int, count: int, first: float, seed: int = 2) -> torch.Tensor:
    """A table of levels, the one of code 0 given."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, 1 << count, generator=generator)
    table[:, 0] = first
    return table.to(DEVICE)


def packed(codes: torch.Tensor, count: int) -> torch.Tensor:
    """Planes of codes, whole 32-bit words: uint8, shape (count, 4 * ceil(n / 32))."""
    planes = torch.zeros(count, -(-codes.numel() // 32) * 4, dtype=torch.uint8)
    for k, i in ((k, i) for k in range(count) for i in range(8)):
        bit = (codes[i::8] >> k & 1) << i
        planes[k, : bit.numel()] |= bit.to(torch.uint8)
    return planes.to(DEVICE)


def compact(
    codes: torch.Tensor, count: int, *, seed: int = 2, rows: torch.Tensor | None = None
) -> SparseCode:
    """Codes in the compact form, with levels drawn for them."""
    table = draw_levels(1 if rows is None else int(rows.max()) + 1, count, UNTOUCHED, seed)
    return compress(packed(codes, count), codes.numel(), table=table, rows=rows)
