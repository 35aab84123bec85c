"""The store's own codes, in memory: sparse signs, seeded support, fitted levels.

Design.md, section 3. Every level is scaled so that <tau^, tau> = <tau, tau> in each tensor (the
gain rule "unbiased"); "ls" is least squares, "norm" restores the norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.rivals.vectors import (
    SCALE_BITS,
    Vectors,
    entropy,
    kept_count,
    largest,
    quantized_shared,
)


def gained(raw: Tensor, piece: Tensor, gain: str) -> Tensor:
    """Scale an approximation of a tensor by a gain rule."""
    along, length = float(raw.double() @ piece.double()), float(raw.double() @ raw.double())
    target = float(piece.double() @ piece.double())
    if length == 0.0 or along <= 0.0:
        return torch.zeros_like(raw)
    scale = {
        "unbiased": target / along,
        "ls": along / length,
        "norm": math.sqrt(target / length),
    }[gain]
    scaled: Tensor = raw * scale
    return scaled


def fitted(values: Tensor, weight: Tensor | None, bits: int, rounds: int = 12) -> Tensor:
    """Round each value to the nearest of 2**bits fitted ones (Lloyd's algorithm).

    Parameters
    ----------
    values
        float32 [n].
    weight
        What a squared error at each place counts, or None for 1.
    bits
        1 to 4.
    """
    count = 2**bits
    step = max(1, values.numel() // 100_000)
    sample = values[::step]
    mass = torch.ones_like(sample) if weight is None else weight[::step]
    order = sample.argsort()
    sample, mass = sample[order].double(), mass[order].double()
    total, moment = mass.cumsum(0), (mass * sample).cumsum(0)
    spread = float((mass * sample.square()).sum() / mass.sum()) ** 0.5
    # Gaussian quantiles to begin with, wider than even ones, as the best levels are.
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = spread * 1.3 * torch.special.ndtri(quantiles)
    for _ in range(rounds):
        edges = torch.searchsorted(sample, (levels[1:] + levels[:-1]) / 2)
        cuts = torch.cat([torch.tensor([0]), edges, torch.tensor([len(sample)])])
        masses = torch.cat([torch.zeros(1, dtype=torch.float64), total])[cuts].diff()
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), moment])[cuts].diff()
        levels = torch.where(masses > 0, sums / masses.clamp_min(1e-300), levels)
        levels = levels.sort().values
    levels = levels.float()
    nearest: Tensor = levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]
    return nearest


def signs(piece: Tensor, density: float, gain: str = "unbiased") -> tuple[Tensor, float]:
    """Signs of a tensor's largest weights, one level."""
    mask = largest(piece, kept_count(piece.numel(), density))
    kept = int(mask.sum())
    bits = entropy([kept, piece.numel() - kept]) + kept + SCALE_BITS
    return gained(piece.sign() * mask, piece, gain), bits


def seeded(
    piece: Tensor, stride: int, bits: int, generator: torch.Generator, gain: str = "unbiased"
) -> tuple[Tensor, float]:
    """Values of one weight in every ``stride``, at places that a seed gives."""
    groups = -(-piece.numel() // stride)
    places = torch.arange(groups) * stride
    places = places + torch.randint(stride, (groups,), generator=generator)
    places = places[places < piece.numel()]
    raw = torch.zeros_like(piece)
    if len(places):
        raw[places] = fitted(piece[places], None, bits)
    return gained(raw, piece, gain), bits * groups + SCALE_BITS * 2**bits


def levels(
    piece: Tensor, bits: int, shared: Tensor | None = None, gain: str = "unbiased"
) -> tuple[Tensor, float]:
    """Levels of every weight, over 1 or over a magnitude profile that all tasks share."""
    if shared is None:
        raw = fitted(piece, None, bits)
    else:
        ratio = torch.where(shared > 0, piece / shared, 0.0)
        raw = fitted(ratio, shared.square(), bits) * shared
    return gained(raw, piece, gain), bits * piece.numel() + SCALE_BITS * 2**bits


def exact(piece: Tensor) -> tuple[Tensor, float]:
    """A tensor in 16 bits."""
    return piece.bfloat16().float(), 16.0 * piece.numel()


def profile(vectors: Vectors, bits: int = 8) -> tuple[Tensor, float]:
    """The mean magnitude of each weight over the tasks, and its cost for all tasks together."""
    size = torch.zeros_like(vectors.base)
    for vector in vectors.tasks.values():
        size += vector.abs() / len(vectors.tasks)
    return quantized_shared(size, bits)
