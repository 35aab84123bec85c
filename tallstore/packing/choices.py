"""The ways to code a tensor, each with the bits it takes and the error it leaves.

Both are known before anything is coded, from the histogram of how far the weights moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.codes import PLANES, SEEDED
from tallstore.fitting import Magnitudes, fit_magnitudes, gain_factor
from tallstore.packing.drafting import dense_draft, sparse_draft
from tallstore.packing.drafts import Draft

__all__ = [
    "Choice",
    "dense_choice",
    "direct_choices",
    "seeded_choices",
    "sparse_choice",
]

_DENSITIES: Final = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.045, 0.065, 0.1, 0.14, 0.2,
)  # fmt: skip
_STRIDES: Final = (
    2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 29, 35, 42, 50, 60, 72, 86, 103, 124, 149, 179,
    215, 258, 310, 372, 446, 535, 642, 770, 924,
)  # fmt: skip
#: Steps of rounded levels, in root mean squares of a tensor's movement.
_STEPS: Final = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
_ROUNDED_BITS: Final = 4
#: What the codec of dense codes takes more than their entropy, bits a weight (`bench.codecs`).
_SYMBOLS: Final = 0.015
#: Fewer values alone, each as long as the rest together, could be anything.
_FEWEST: Final = 32
#: Weights to those that carry what they did, of normally distributed distances.
_SPREAD: Final = 3.0
_BITS: Final = (1, 2, 3, 4)


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
    rounded: bool = False
    """Whether every weight has a level near it: what is left is as good as random."""


def direct_choices(segment: int, found: Magnitudes, gain: str) -> list[Choice]:
    """Signs, levels fitted to the weights, and rounded ones."""
    made = [sparse_choice(sparse_draft(segment, found, d), found, gain) for d in _DENSITIES]
    for width in _BITS:
        dense = dense_draft(segment, found, width)
        choice = None if dense is None else dense_choice(dense, found, gain)
        if choice is not None:
            # So many levels lie as close as the steps of rounded ones, also where weights are not
            # spread about 0: of a head whose rows all moved as far, for one.
            made.append(replace(choice, rounded=width == _ROUNDED_BITS))
    made += _rounded_choices(segment, found, gain)
    return [choice for choice in made if choice is not None]


def _rounded_choices(segment: int, found: Magnitudes, gain: str) -> list[Choice]:
    """Levels at the multiples of a step: of few bits, since most weights take the lowest ones."""
    size = math.sqrt(found.moved / found.weights)
    made = []
    for step in _STEPS:
        levels = np.arange(1 << (_ROUNDED_BITS - 1)) * np.float32(step * size)
        draft = Draft(segment, PLANES, tuple(map(float, levels)), _ROUNDED_BITS)
        sums = _sums(draft.magnitudes, found)
        shares = sums.shares
        # Nothing has no sign. Of two codes, which share a symbol: the more often it is none and
        # none, the further a whole number of bits is from what it takes (`bench.codecs`).
        pair = 2 * (sums.entropy + 1 - shares[0] + _SYMBOLS)
        pair += 1.6 * min(max(shares[0] ** 2 - 0.4, 0.0), 0.25)
        bits = found.weights * pair / 2
        choice = _choice(draft, found, sums.projection, sums.norm, bits, gain)
        if choice is not None:
            made.append(replace(choice, rounded=True))
    return made


def seeded_choices(segment: int, found: Magnitudes, gain: str) -> list[Choice]:
    """Values on one weight in so many."""
    made = []
    carrying = _carrying(found)
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
            if min(groups, _SPREAD * carrying / stride) < _FEWEST:
                break
            draft = Draft(segment, SEEDED, (), width, stride=stride)
            bits = groups * (sums.entropy + 1)
            at_random = (stride - 1) * norm
            made.append(Choice(draft, bits, by_rule + at_random, at_random))
    return made


def _carrying(found: Magnitudes) -> float:
    """How many weights there would be if all moved as far: (sum t^2)^2 / sum t^4.

    A third of the weights where they moved by normally distributed distances, and 1 where one moved
    further than all others together: what carries the task is then picked, or it is not.
    """
    there = found.count > 0
    squares = found.product[there] ** 2 / found.count[there]
    fourths = float((squares**2 / found.count[there]).sum())
    return found.moved**2 / fourths if fourths else 0.0


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of unscaled levels over all of a tensor's weights."""

    projection: float
    norm: float
    shares: npt.NDArray[np.float64]
    """Of the weights, by magnitude."""

    @property
    def entropy(self) -> float:
        """Of the magnitudes, bits a weight; their signs take another bit."""
        return _entropy(self.shares.tolist())


def _sums(magnitudes: Sequence[float], found: Magnitudes) -> _Sums:
    levels = np.asarray(magnitudes)
    there = found.count > 0
    center = found.product[there] / np.maximum(found.weight[there], 1e-300)
    group = np.searchsorted((levels[1:] + levels[:-1]) / 2, center)
    shares = np.bincount(group, found.count[there], levels.size) / found.weights
    return _Sums(
        projection=float((levels[group] * found.product[there]).sum()),
        norm=float((levels[group] ** 2 * found.weight[there]).sum()),
        shares=shares,
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
    bits = found.weights * (sums.entropy + 1 + _SYMBOLS * (draft.bits > 1))
    return _choice(draft, found, sums.projection, sums.norm, bits, gain)


def _choice(
    draft: Draft, found: Magnitudes, projection: float, norm: float, bits: float, gain: str
) -> Choice | None:
    factor = gain_factor(gain, moved=found.moved, projection=projection, norm=norm)
    if factor is None:
        return None
    error = factor**2 * norm - 2 * factor * projection + found.moved
    return Choice(draft, bits, max(error, 0.0))
