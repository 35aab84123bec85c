"""Seeded codes for tests, and their hash once more, with numpy's numbers of 32 bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from kernel_helpers import DEVICE

from tallstore.kernels import seeded_reference as plain
from tallstore.kernels.seeded_reference import BLOCK, SeededCode, SeededTensor

__all__ = ["SEED", "arena", "make", "mix", "positions", "support"]

Words = npt.NDArray[np.uint32]
SEED = 0xFEDCBA9876543210


def mix(x: Words) -> Words:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def positions(seed: int, number: int, groups: Sequence[int], sizes: Sequence[int]) -> list[int]:
    key = np.array([0x243F6A88, 0x85A308D3], dtype=np.uint32)
    for word in (seed % 2**32, seed >> 32, number):
        key = mix(key ^ np.uint32(word))
    low, high = (np.array([f(g) for g in groups], dtype=np.uint32) for f in (_low, _high))
    h = mix(mix(low ^ key[0]) ^ key[1] ^ high)
    return [int(word) * size >> 32 for word, size in zip(h, sizes, strict=True)]


def _low(number: int) -> int:
    return number % 2**32


def _high(number: int) -> int:
    return number >> 32


def support(tensor: SeededTensor) -> torch.Tensor:
    starts = range(0, tensor.numel, tensor.stride)
    sizes = [min(tensor.stride, tensor.numel - start) for start in starts]
    found = positions(tensor.seed, tensor.number, range(len(starts)), sizes)
    return torch.tensor([a + b for a, b in zip(starts, found, strict=True)], dtype=torch.int64)


def make(
    tensors: Sequence[SeededTensor], count: int, *, weights: int = 0, seed: int = 1
) -> SeededCode:
    """A code of `count` bits a value, its values and levels drawn."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, plain.value_groups(tensors)[-1] // 8)
    planes = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(DEVICE)
    table = torch.randn(len(tensors), 1 << count, generator=generator).to(DEVICE)
    end = max((one.offset + one.numel for one in tensors), default=0)
    return plain.build(tensors, planes, table, max(weights, end))


def arena(
    *sizes: tuple[int, int], seed: int = SEED, first: int = 0, gap: int = 0
) -> tuple[SeededTensor, ...]:
    """Tensors one after the other, given (weights, stride)."""
    tensors, offset = [], first * BLOCK
    for number, (numel, stride) in enumerate(sizes):
        tensors.append(
            SeededTensor(seed=seed, number=number, stride=stride, offset=offset, numel=numel)
        )
        offset += -(-numel // BLOCK) * BLOCK + gap * BLOCK
    return tuple(tensors)
