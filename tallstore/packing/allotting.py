"""``code="auto"``: which tensor gets how many bits.

Every tensor has a choice of codes, each with its bits and the error it leaves, both known from the
histogram of how far its weights moved. Of all ways to spend a budget the one with the least error
in all gives each tensor the code that minimizes ``error + price * bits``, at one price for all
tensors; the price is what fits the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tallstore.fitting import Magnitudes, gain_factor
from tallstore.packing.drafting import dense_draft, moving, sparse_draft
from tallstore.packing.drafts import Draft

__all__ = ["Allotment", "Choice", "allot", "choices"]

_DENSITIES: Final = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.045, 0.065, 0.1, 0.14, 0.2, 0.3,
)  # fmt: skip
_BITS: Final = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to code a tensor."""

    draft: Draft
    bits: float
    """In all, as the disk is expected to take them."""
    error: float
    """Squared norm of what it leaves."""


@dataclass(frozen=True, slots=True)
class Allotment:
    """A choice for every tensor."""

    drafts: Mapping[int, Draft]
    bits: float
    """In all."""
    error: float
    """Squared norm, in all."""


def entropy(shares: Sequence[float]) -> float:
    """Bits a symbol of independent symbols."""
    return -sum(p * math.log2(p) for p in shares if p > 0)


def choices(segment: int, found: Magnitudes, gain: str) -> list[Choice]:
    """The ways to code a tensor that moved, the cheapest first."""
    made = []
    for density in _DENSITIES:
        draft = sparse_draft(segment, found, density)
        count, total = found.touched(draft.cut)
        share = count / found.weights
        bits = found.weights * (entropy((share, 1 - share)) + share)
        made.append(_choice(draft, found, total, count, bits, gain))
    for width in _BITS:
        dense = dense_draft(segment, found, width)
        if dense is not None:
            levels = np.asarray(dense.magnitudes)
            there = found.count > 0
            center = found.product[there] / np.maximum(found.weight[there], 1e-300)
            group = np.searchsorted((levels[1:] + levels[:-1]) / 2, center)
            shares = np.bincount(group, found.count[there], levels.size) / found.weights
            projection = float((levels[group] * found.product[there]).sum())
            norm = float((levels[group] ** 2 * found.weight[there]).sum())
            bits = found.weights * (entropy(shares.tolist()) + 1)
            made.append(_choice(dense, found, projection, norm, bits, gain))
    return sorted((c for c in made if c is not None), key=lambda choice: choice.bits)


def _choice(
    draft: Draft, found: Magnitudes, projection: float, norm: float, bits: float, gain: str
) -> Choice | None:
    factor = gain_factor(gain, moved=found.moved, projection=projection, norm=norm)
    if factor is None:
        return None
    error = factor**2 * norm - 2 * factor * projection + found.moved
    return Choice(draft, bits, max(error, 0.0))


def allot(found: Mapping[int, Magnitudes], bits: float, gain: str) -> Allotment | None:
    """The codes of least error in all that take at most `bits`; None: the cheapest take more.

    Parameters
    ----------
    found
        Histograms by segment.
    """
    offered = {n: choices(n, seen, gain) for n, seen in moving(found).items()}
    offered = {n: some for n, some in offered.items() if some}
    low, high = 0.0, 1.0
    while _at(offered, high).bits > bits:
        high *= 16
        if high > 1e30:
            return None
    for _ in range(80):
        middle = math.sqrt(max(low, high * 1e-12) * high)
        if _at(offered, middle).bits > bits:
            low = middle
        else:
            high = middle
    return _at(offered, high)


def _at(offered: Mapping[int, Sequence[Choice]], price: float) -> Allotment:
    chosen = [min(some, key=lambda c: c.error + price * c.bits) for some in offered.values()]
    return Allotment(
        {choice.draft.segment: choice.draft for choice in chosen},
        sum(choice.bits for choice in chosen),
        sum(choice.error for choice in chosen),
    )
