"""``code="auto"``: which tensor is coded how.

Every tensor has a choice of codes (`tallstore.packing.choices`), each with its bits and the error
it leaves. Of all ways to spend a budget the best gives each tensor the code that minimizes
``harm + price * bits``, at one price of a bit for all tensors.

*Within bits*, harm is not the squared error. By measurement (`bench.frontier` shows what comes of
it) a tensor that is left as the base has it loses what it learnt: its squared movement counts
whole. Of what a code leaves, less counts:

- noise, where a hash says which weights are coded: it averages out. It counts as the task's squared
  distance from the base does, relative to the base, and at most 1.5 %: the further a task went, the
  larger the steps that harm it;
- rounding, to multiples of a step or to sixteen fitted levels: as noise while what is left is
  small, which is as good as random, and steeply more as it grows;
- what a rule leaves out, always the small weights: that adds up over the inputs of a row. It counts
  50 times (the inputs, if those are fewer) as much as noise. Corrected biases take back most of
  what adds up: where there are inputs to see it by, it counts as little as serves them best.

Every error counts relative to the squared norm of the tensor's own weights in the base, which is
how loud the noise is beside what the layer says, however large the layer is. The first layers count
most, since all others hear their noise: block k, by the first number in a tensor's name,
``(k + 2) ** -0.75`` times as much as what is in no block, such as embeddings. Vectors (biases,
norms) count as the matrix before them.

So a task near its base gets few values, far apart, on all its tensors; a task far from it more
values on fewer of them; and where bits are plenty most tensors are rounded.

*Within an error* harm is the squared error, and bits are spent on signs and levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.codes import SPARSE
from tallstore.fitting import Magnitudes
from tallstore.packing.choices import Choice, direct_choices, seeded_choices
from tallstore.packing.drafting import moving
from tallstore.packing.drafts import Draft

__all__ = ["BY_RULE", "Allotment", "Offers", "block"]

#: Noise counts d^2 * _NOISE / (1 + d^2 * _NOISE / _LOUDEST) at a relative distance of d.
_NOISE: Final = 1.5
_LOUDEST: Final = 0.015
BY_RULE: Final = 50.0
#: Rounding counts 1 + _ROUNDING * e^4 times as much as noise where it leaves an error of e.
_ROUNDING: Final = 600
#: How fast blocks come to count less.
_DEPTH: Final = 0.75
#: Bits that a tensor's entry in the document takes: part of its price, not of the budget.
_ENTRY: Final = 200.0


def block(name: str) -> int | None:
    """The number of the block that a tensor is in, the first in its name; None: it is in none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


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
    blocks
        The block of each tensor that is in one, by segment; see `block`.
    by_rule
        How much more than noise counts what a rule leaves out.
    """

    def __init__(
        self,
        found: Mapping[int, Magnitudes],
        gain: str,
        *,
        fans: Mapping[int, int] | None = None,
        blocks: Mapping[int, int | None] | None = None,
        by_rule: float = BY_RULE,
    ) -> None:
        self._by_rule = by_rule
        self._there = {n: seen for n, seen in moving(found).items() if seen.moved > 0}
        self._fans = {n: (fans or {}).get(n, 1) for n in self._there}
        self._direct = {n: direct_choices(n, seen, gain) for n, seen in self._there.items()}
        self._by_error = [
            _Menu.of(some, [c.error for c in some], [c.bits for c in some])
            for some in self._direct.values()
            if some
        ]
        self.weights = sum(seen.weights for seen in found.values())
        self.moved = sum(seen.moved for seen in self._there.values())
        """Squared norm of the task vector."""
        starts = [seen.start for seen in found.values()]
        start = sum(squares for squares in starts if math.isfinite(squares))
        loud = _NOISE * self.moved / start if start else math.inf
        self._noise = 1 / (1 / loud + 1 / _LOUDEST) if loud else 0.0
        self._counts = _counts(self._there, self._fans, blocks or {})
        self._by_harm = [
            self._menu(n, seeded_choices(n, seen, gain)) for n, seen in self._there.items()
        ]

    def within(self, bits_per_weight: float, *, taken: float = 0.0) -> Allotment:
        """What does the least harm within a budget; everything is left where it buys nothing.

        Parameters
        ----------
        taken
            Bits of it, in all, that are spent on something else.
        """
        budget = bits_per_weight * self.weights - taken
        low, high = 0.0, max(self.moved, 1e-30) * 1e3
        found = self._cheapest(low)
        if found.bits <= budget:
            return found
        found = self._cheapest(high)
        for _ in range(100):
            middle = math.sqrt(max(low, high * 1e-15) * high)
            made = self._cheapest(middle)
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
        # Times itself: the power raises where that is infinite.
        most = relative_error * relative_error * self.moved
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
        return _together([menu.best(price) for menu in self._by_error])

    def _harm(self, choice: Choice, segment: int) -> float:
        """The error of a choice, as its parts count."""
        moved, rate = self._there[segment].moved, self._noise
        if choice.rounded:
            return min(rate * (1 + _ROUNDING * (choice.error / moved) ** 2), 1.0) * choice.error
        by_rule = min(rate * min(self._by_rule, self._fans[segment]), 1.0)
        return rate * choice.at_random + by_rule * (choice.error - choice.at_random)

    def _menu(self, segment: int, seeded: Sequence[Choice]) -> _Menu:
        """The choices of a tensor by harm, leaving it included."""
        seen, counts = self._there[segment], self._counts[segment]
        left = Choice(Draft(segment, SPARSE, cut=math.inf, left=True), 0.0, seen.moved)
        some = (*self._direct[segment], *seeded)
        harms = [counts * self._harm(choice, segment) for choice in some]
        bits = [choice.bits + _ENTRY for choice in some]
        return _Menu.of((left, *some), [counts * seen.moved, *harms], [0.0, *bits])

    def _cheapest(self, price: float) -> Allotment:
        """What minimizes harm + price * bits, tensor by tensor."""
        return _together([menu.best(price) for menu in self._by_harm])


@dataclass(frozen=True, slots=True)
class _Menu:
    """The choices of one tensor, and what each is to be judged by."""

    choices: Sequence[Choice]
    harms: npt.NDArray[np.float64]
    bits: npt.NDArray[np.float64]

    @classmethod
    def of(cls, choices: Sequence[Choice], harms: list[float], bits: list[float]) -> _Menu:
        return cls(choices, np.array(harms), np.array(bits))

    def best(self, price: float) -> Choice:
        """What minimizes harm + price * bits; of equals the first."""
        return self.choices[int(np.argmin(self.harms + price * self.bits))]


def _counts(
    found: Mapping[int, Magnitudes], fans: Mapping[int, int], blocks: Mapping[int, int | None]
) -> dict[int, float]:
    """What a squared error of each tensor counts, 1 on average; a vector's as the last matrix's."""
    made: dict[int, float] = {}
    last = 1.0
    for n, seen in sorted(found.items()):
        if fans[n] > 1 and 0 < seen.start < math.inf:
            number = blocks.get(n)
            last = (1.0 if number is None else (number + 2) ** -_DEPTH) / seen.start
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
