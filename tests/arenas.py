"""What tests of kernels start from: arenas of weights, and codes over them."""

from __future__ import annotations

from pathlib import Path

import torch
from zoo import bits

from tallstore.kernels.sparse_reference import UNTOUCHED, SparseCode, compress

__all__ = [
    "DEVICE",
    "FLOATS",
    "compact",
    "draw",
    "draw_codes",
    "draw_levels",
    "packed",
    "poisoned",
    "same",
    "vast",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers with signed zeros among them, at the scale of weights."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator)
    values[::7] = 0.0
    values[3::11] = -0.0
    return values.to(dtype).to(DEVICE)


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


def poisoned(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((n,), float("nan"), dtype=dtype, device=DEVICE)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return a.dtype == b.dtype and bits(a.cpu()) == bits(b.cpu())


def vast(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no room on a disk: nobody reads most of them."""
    if DEVICE == "cuda":
        return torch.zeros(size, dtype=dtype, device=DEVICE)
    with path.open("wb") as file:
        file.truncate(size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
