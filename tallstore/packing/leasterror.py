"""``code="auto"`` within an error: the fewest bits that a relative error can be had for.

Every tensor has a choice of codes, each with its bits and the error it leaves, both known from the
histogram of how far its weights moved. Of all ways to come to an error the one with the fewest bits
gives each tensor the code that minimizes ``error + price * bits``, at one price for all tensors.
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

__all__ = ["Allotment", "Choice", "Offers", "choices", "dense_choice", "sparse_choice"]

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
    made = [sparse_choice(sparse_draft(segment, found, d), found, gain) for d in _DENSITIES]
    for width in _BITS:
        dense = dense_draft(segment, found, width)
        if dense is not None:
            made.append(dense_choice(dense, found, gain))
    return sorted((c for c in made if c is not None), key=lambda choice: choice.bits)


def sparse_choice(draft: Draft, found: Magnitudes, gain: str) -> Choice | None:
    """What sparse signs cost and leave; None where the gain is undefined."""
    count, total = found.touched(draft.cut)
    share = count / found.weights
    bits = found.weights * (entropy((share, 1 - share)) + share)
    return _choice(draft, found, total, count, bits, gain)


def dense_choice(draft: Draft, found: Magnitudes, gain: str) -> Choice | None:
    """What dense levels cost and leave; None where the gain is undefined."""
    levels = np.asarray(draft.magnitudes)
    there = found.count > 0
    center = found.product[there] / np.maximum(found.weight[there], 1e-300)
    group = np.searchsorted((levels[1:] + levels[:-1]) / 2, center)
    shares = np.bincount(group, found.count[there], levels.size) / found.weights
    projection = float((levels[group] * found.product[there]).sum())
    norm = float((levels[group] ** 2 * found.weight[there]).sum())
    bits = found.weights * (entropy(shares.tolist()) + 1)
    return _choice(draft, found, projection, norm, bits, gain)


def _choice(
    draft: Draft, found: Magnitudes, projection: float, norm: float, bits: float, gain: str
) -> Choice | None:
    factor = gain_factor(gain, moved=found.moved, projection=projection, norm=norm)
    if factor is None:
        return None
    error = factor**2 * norm - 2 * factor * projection + found.moved
    return Choice(draft, bits, max(error, 0.0))


class Offers:
    """The choices of every tensor of a task that moved.

    Parameters
    ----------
    found
        Histograms by segment.
    gain
        The gain rule.
    """

    def __init__(self, found: Mapping[int, Magnitudes], gain: str) -> None:
        there = moving(found)
        some = {n: choices(n, seen, gain) for n, seen in there.items()}
        self._choices = {n: made for n, made in some.items() if made}
        self.weights = sum(seen.weights for seen in found.values())
        self.moved = sum(seen.moved for seen in there.values())
        """Squared norm of the task vector."""

    def erring(self, relative_error: float) -> Allotment | None:
        """What takes the fewest bits for an error; None where the best errs more."""
        most = relative_error**2 * self.moved
        found = self.at(0.0)
        if found.error > most:
            return None
        # The dearest price whose error is still within.
        low, high = 0.0, max(self.moved, 1e-30) * 1e3
        for _ in range(100):
            middle = math.sqrt(max(low, high * 1e-15) * high)
            made = self.at(middle)
            if made.error <= most:
                low, found = middle, made
            else:
                high = middle
        return found

    def at(self, price: float) -> Allotment:
        """What minimizes error + price * bits, tensor by tensor."""
        some = self._choices.values()
        return _together([min(s, key=lambda c: c.error + price * c.bits) for s in some])


def _together(chosen: Sequence[Choice]) -> Allotment:
    return Allotment(
        {choice.draft.segment: choice.draft for choice in chosen},
        sum(choice.bits for choice in chosen),
        sum(choice.error for choice in chosen),
    )
