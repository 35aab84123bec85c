"""``code="auto"``: which tensor is coded how.

Every tensor has a choice of codes, each with its bits and the error it leaves, both known from the
histogram of how far its weights moved. Of all ways to spend a budget the best gives each tensor the
code that minimizes ``harm + price * bits``, at one price of a bit for all tensors.

*Within bits*, harm is not the squared error. Three kinds of it count differently, by measurement
(`bench.frontier` shows what comes of it):

- a tensor that is left as the base has it loses what it learnt: its squared movement counts whole;
- what a code leaves out at random, where a hash says, averages out. It harms as noise on the base
  does, however little the task moved: it counts `_NOISE` times the task's squared distance from
  the base, relative to the base;
- what a code leaves out by rule, always the small weights, adds up over the inputs of a row: it
  counts `_BY_RULE` times (the inputs, if those are fewer) as much as noise, at most whole.

Every error counts relative to the norm of the tensor's own weights in the base: what is little to a
large tensor is much to a small one, such as a depthwise convolution. Vectors (biases, norms) count
as the matrix before them.

So a task near its base gets few values, far apart, on all its tensors, and a task far from it more
values on fewer of them.

*Within an error* harm is the squared error, and bits are spent on signs and levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tallstore.codes import SEEDED, SPARSE
from tallstore.fitting import Magnitudes, fit_magnitudes, gain_factor
from tallstore.packing.drafting import dense_draft, moving, sparse_draft
from tallstore.packing.drafts import Draft

__all__ = ["Allotment", "Choice", "Offers", "dense_choice", "sparse_choice"]

_NOISE: Final = 3.0
#: With few bits noise is large whatever is done, and harms less than it would in proportion: it
#: counts at most so many times the budget's bits a weight.
_SATURATED: Final = 0.125
_BY_RULE: Final = 50
_DENSITIES: Final = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.045, 0.065, 0.1, 0.14, 0.2,
)  # fmt: skip
_STRIDES: Final = (
    2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 29, 35, 42, 50, 60, 72, 86, 103, 124, 149, 179,
    215, 258, 310, 372, 446, 535, 642, 770, 924,
)  # fmt: skip
#: Fewer values alone, each as long as the rest together, could be anything.
_FEWEST: Final = 32
_BITS: Final = (1, 2, 3, 4)
#: Bits that a tensor's entry in the document takes: part of its price, not of the budget.
_ENTRY: Final = 200.0


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to code a tensor."""

    draft: Draft
    """Of a seeded code without its magnitudes, which are fitted to the weights that are picked."""
    bits: float
    """In all, as the disk is expected to take them."""
    error: float
    """Squared norm of what it leaves."""
    at_random: float = 0.0
    """What of it is another error for every seed."""

    def harm(self, noise: float, by_rule: float) -> float:
        """The error, as its two parts count."""
        return noise * self.at_random + by_rule * (self.error - self.at_random)


@dataclass(frozen=True, slots=True)
class Allotment:
    """A choice for every tensor."""

    drafts: Mapping[int, Draft]
    bits: float
    """In all."""
    error: float
    """Squared norm, in all."""


class Offers:
    """The choices of every tensor of a task that moved.

    Parameters
    ----------
    found
        Histograms by segment.
    gain
        The gain rule.
    fans
        Inputs of a row of each tensor, by segment; 1 where it is not there.
    """

    def __init__(
        self, found: Mapping[int, Magnitudes], gain: str, fans: Mapping[int, int] | None = None
    ) -> None:
        self._there = {n: seen for n, seen in moving(found).items() if seen.moved > 0}
        self._fans = {n: (fans or {}).get(n, 1) for n in self._there}
        self._direct = {n: _direct(n, seen, gain) for n, seen in self._there.items()}
        self._seeded = {n: _seeded(n, seen, gain) for n, seen in self._there.items()}
        self.weights = sum(seen.weights for seen in found.values())
        self.moved = sum(seen.moved for seen in self._there.values())
        """Squared norm of the task vector."""
        starts = [seen.start for seen in found.values()]
        start = sum(squares for squares in starts if math.isfinite(squares))
        self._noise = min(_NOISE * self.moved / start, 1.0) if start else 1.0
        self._counts = _counts(self._there, self._fans)

    def within(self, bits_per_weight: float) -> Allotment:
        """What does the least harm within a budget; everything is left where it buys nothing."""
        budget = bits_per_weight * self.weights
        rate = min(self._noise, _SATURATED * bits_per_weight)
        low, high = 0.0, max(self.moved, 1e-30) * 1e3
        found = self._cheapest(low, rate)
        if found.bits <= budget:
            return found
        found = self._cheapest(high, rate)
        for _ in range(100):
            middle = math.sqrt(max(low, high * 1e-15) * high)
            made = self._cheapest(middle, rate)
            if made.bits <= budget:
                high, found = middle, made
            else:
                low = middle
        return found

    def least_bits(self) -> float:
        """Bits a weight from which on `within` buys anything, to two per cent."""
        bits = 1e-6
        while self._buys_nothing(bits) and bits < 16:
            bits *= 2
        low, high = bits / 2, bits
        while high > 1.02 * low:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._buys_nothing(middle) else (low, middle)
        digits = 10.0 ** (math.floor(math.log10(high)) - 3)
        return round(math.ceil(high / digits) * digits, 12)

    def _buys_nothing(self, bits_per_weight: float) -> bool:
        return all(draft.left for draft in self.within(bits_per_weight).drafts.values())

    def erring(self, relative_error: float) -> Allotment | None:
        """What takes the fewest bits for an error; None where the best errs more."""
        most = relative_error**2 * self.moved
        found = self.least_error
        if found.error > most:
            return None
        low, high = 0.0, max(self.moved, 1e-30) * 1e3
        for _ in range(100):
            middle = math.sqrt(max(low, high * 1e-15) * high)
            made = self._closest(middle)
            if made.error <= most:
                low, found = middle, made
            else:
                high = middle
        return found

    @property
    def least_error(self) -> Allotment:
        """The closest that codes come."""
        return self._closest(0.0)

    def _closest(self, price: float) -> Allotment:
        """What minimizes error + price * bits, tensor by tensor."""
        some = [offers for offers in self._direct.values() if offers]
        return _together([min(s, key=lambda c: c.error + price * c.bits) for s in some])

    def _cheapest(self, price: float, rate: float) -> Allotment:
        """What minimizes harm + price * bits, tensor by tensor, leaving a tensor included."""
        chosen: list[Choice] = []
        for n, seen in self._there.items():
            by_rule = min(rate * min(_BY_RULE, self._fans[n]), 1.0)
            best = Choice(Draft(n, SPARSE, cut=math.inf, left=True), 0.0, seen.moved)
            counts = self._counts[n]
            least = counts * seen.moved
            for choice in (*self._direct[n], *self._seeded[n]):
                cost = counts * choice.harm(rate, by_rule) + price * (choice.bits + _ENTRY)
                if cost < least:
                    best, least = choice, cost
            chosen.append(best)
        return _together(chosen)


def _counts(found: Mapping[int, Magnitudes], fans: Mapping[int, int]) -> dict[int, float]:
    """What a squared error of each tensor counts, 1 on average; a vector's as the last matrix's."""
    made: dict[int, float] = {}
    last = 1.0
    for n, seen in sorted(found.items()):
        if fans[n] > 1 and 0 < seen.start < math.inf:
            last = 1 / math.sqrt(seen.start)
        made[n] = last
    whole = sum(seen.moved for seen in found.values())
    mean = sum(made[n] * seen.moved for n, seen in found.items()) / whole if whole else 1.0
    return {n: count / mean for n, count in made.items()}


def _together(chosen: Sequence[Choice]) -> Allotment:
    return Allotment(
        {choice.draft.segment: choice.draft for choice in chosen},
        sum(choice.bits for choice in chosen),
        sum(choice.error for choice in chosen),
    )


def _direct(segment: int, found: Magnitudes, gain: str) -> list[Choice]:
    """Signs and levels."""
    made = [sparse_choice(sparse_draft(segment, found, d), found, gain) for d in _DENSITIES]
    for width in _BITS:
        dense = dense_draft(segment, found, width)
        if dense is not None:
            made.append(dense_choice(dense, found, gain))
    return [choice for choice in made if choice is not None]


def _seeded(segment: int, found: Magnitudes, gain: str) -> list[Choice]:
    """Values on one weight in so many."""
    made = []
    for width in _BITS:
        magnitudes = fit_magnitudes(found, min(1 << (width - 1), 7))
        sums = _sums(magnitudes, found)
        factor = gain_factor(gain, moved=found.moved, projection=sums.projection, norm=sums.norm)
        if factor is None:
            continue
        norm = factor**2 * sums.norm
        by_rule = max(norm - 2 * factor * sums.projection + found.moved, 0.0)
        for stride in _STRIDES:
            groups = -(-found.weights // stride)
            if groups < _FEWEST:
                break
            draft = Draft(segment, SEEDED, (), width, stride=stride)
            bits = groups * (sums.entropy + 1)
            at_random = (stride - 1) * norm
            made.append(Choice(draft, bits, by_rule + at_random, at_random))
    return made


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of unscaled levels over all of a tensor's weights."""

    projection: float
    norm: float
    entropy: float
    """Of the magnitudes, bits a weight; their signs take another bit."""


def _sums(magnitudes: Sequence[float], found: Magnitudes) -> _Sums:
    levels = np.asarray(magnitudes)
    there = found.count > 0
    center = found.product[there] / np.maximum(found.weight[there], 1e-300)
    group = np.searchsorted((levels[1:] + levels[:-1]) / 2, center)
    shares = np.bincount(group, found.count[there], levels.size) / found.weights
    return _Sums(
        projection=float((levels[group] * found.product[there]).sum()),
        norm=float((levels[group] ** 2 * found.weight[there]).sum()),
        entropy=_entropy(shares.tolist()),
    )


def _entropy(shares: Sequence[float]) -> float:
    """Bits a symbol of independent symbols."""
    return -sum(p * math.log2(p) for p in shares if p > 0)


def sparse_choice(draft: Draft, found: Magnitudes, gain: str) -> Choice | None:
    """What sparse signs cost and leave; None where the gain is undefined."""
    count, total = found.touched(draft.cut)
    share = count / found.weights
    bits = found.weights * (_entropy((share, 1 - share)) + share)
    return _choice(draft, found, total, count, bits, gain)


def dense_choice(draft: Draft, found: Magnitudes, gain: str) -> Choice | None:
    """What dense levels cost and leave; None where the gain is undefined."""
    sums = _sums(draft.magnitudes, found)
    bits = found.weights * (sums.entropy + 1)
    return _choice(draft, found, sums.projection, sums.norm, bits, gain)


def _choice(
    draft: Draft, found: Magnitudes, projection: float, norm: float, bits: float, gain: str
) -> Choice | None:
    factor = gain_factor(gain, moved=found.moved, projection=projection, norm=norm)
    if factor is None:
        return None
    error = factor**2 * norm - 2 * factor * projection + found.moved
    return Choice(draft, bits, max(error, 0.0))
