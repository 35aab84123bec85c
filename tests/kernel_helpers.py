"""What the tests of several kernels draw from."""

from __future__ import annotations

from pathlib import Path

import torch
from zoo import bits

__all__ = [
    "DEVICE",
    "FLOATS",
    "TRITON",
    "draw",
    "draw_bytes",
    "nans",
    "poison",
    "poisoned",
    "same",
    "vast",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

#: Triton's names of dtypes.
TRITON = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def draw(n: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers with signed zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * scale
    values[::7] = 0.0
    values[3::11] = -0.0
    return values.to(dtype).to(DEVICE)


def draw_bytes(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random bytes, such as packed masks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(DEVICE)


def poison(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """0xAA in every byte; NaN would hide in integers, and these show in both."""
    size = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.full((size,), 0xAA, dtype=torch.uint8, device=DEVICE)
    return raw.view(dtype).view(shape)


def poisoned(tensor: torch.Tensor) -> bool:
    """Whether nothing wrote over the poison."""
    return bool((tensor.contiguous().view(torch.uint8) == 0xAA).all())


def nans(n: int, dtype: torch.dtype) -> torch.Tensor:
    """What a result must overwrite."""
    return torch.full((n,), float("nan"), dtype=dtype, device=DEVICE)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a.cpu()) == bits(b.cpu())


def vast(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no room: nobody reads most of them."""
    if DEVICE == "cuda":
        return torch.zeros(size, dtype=dtype, device=DEVICE)
    with path.open("wb") as file:
        file.truncate(size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
