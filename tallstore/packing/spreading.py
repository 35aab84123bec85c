"""``code="auto"`` within a budget of bits: seeded values, more of them where weights moved further.

What a code leaves out at random does little harm, for it is another error every time it is added
up; what it leaves out by rule, always the small weights, adds up. So for few bits values on weights
that a hash picks keep more of a task than the signs of the largest, at several times the squared
error (`bench.frontier`).

Picking one weight in N of a tensor leaves an error of about N |t|^2 and takes w B / N bits for w
weights. The least error in all, for so many bits in all, has 1/N in proportion to the root mean
square |t| / sqrt(w). A tensor that gets N = 1 is dense. Tensors of a few weights, norms and biases,
take next to nothing whatever they get: they get `_MOST` bits a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tallstore.fitting import Magnitudes
from tallstore.packing.drafting import moving

__all__ = ["Spread", "least_bits", "spread"]

_MOST: Final = 4
#: Tensors of at most so many weights are dense.
_SMALL: Final = 2048
#: Bits of a value, from a budget a weight on: finer values pay once there are many of them.
_VALUE_BITS: Final = ((0.35, 4), (0.2, 3), (0.0, 2))
#: One weight in more than this is as good as none.
_MOST_STRIDE: Final = 1 << 16
#: Values a tensor, at least: a few alone, each as long as the rest together, could be anything.
_LEAST_VALUES: Final = 32


@dataclass(frozen=True, slots=True)
class Spread:
    """What each tensor gets."""

    dense: Mapping[int, int]
    """Bits of the tensors that are dense, by segment."""
    strides: Mapping[int, int]
    """One weight in so many has a value, of the others."""
    value_bits: int
    bits: float
    """In all, as they are expected to take on the disk."""


def spread(found: Mapping[int, Magnitudes], bits_per_weight: float) -> Spread | None:
    """What a budget buys; None where it does not even buy the small tensors.

    Parameters
    ----------
    found
        Histograms by segment.
    """
    there = {n: seen for n, seen in moving(found).items() if seen.moved > 0}
    budget = bits_per_weight * sum(seen.weights for seen in found.values())
    value_bits = next(bits for least, bits in _VALUE_BITS if bits_per_weight >= least)
    small = {n: _MOST for n, seen in there.items() if seen.weights <= _SMALL}
    fixed = float(sum(_MOST * there[n].weights for n in small))
    if fixed > budget:
        return None
    large = {n: seen for n, seen in there.items() if n not in small}
    if not large:
        return Spread(small, {}, value_bits, fixed)
    low, high = 0.0, 1 / min(map(_rms, large.values()))
    for _ in range(60):
        scale = (low + high) / 2
        if fixed + _bits(large, _strides(large, scale), value_bits) > budget:
            high = scale
        else:
            low = scale
    strides = _strides(large, low)
    bits = fixed + _bits(large, strides, value_bits)
    if bits > budget:
        return None
    dense = {n: value_bits for n, stride in strides.items() if stride == 1}
    rest = {n: stride for n, stride in strides.items() if stride > 1}
    return Spread({**small, **dense}, rest, value_bits, bits)


def least_bits(found: Mapping[int, Magnitudes]) -> float:
    """The least bits a weight that `spread` can do with."""
    there = {n: seen for n, seen in moving(found).items() if seen.moved > 0}
    small = sum(seen.weights for seen in there.values() if seen.weights <= _SMALL)
    large = {n: seen for n, seen in there.items() if seen.weights > _SMALL}
    weights = sum(seen.weights for seen in found.values())
    strides = _strides(large, 0.0)
    able, above = [], math.inf
    for least, value_bits in _VALUE_BITS:
        needed = max(least, (_MOST * small + _bits(large, strides, value_bits)) / max(weights, 1))
        if needed < above:
            able.append(needed)
        above = least
    return min(able)


def _rms(seen: Magnitudes) -> float:
    return math.sqrt(seen.moved / seen.weights)


def _strides(found: Mapping[int, Magnitudes], scale: float) -> dict[int, int]:
    strides = {}
    for n, seen in found.items():
        most = min(_MOST_STRIDE, seen.weights // _LEAST_VALUES)
        wanted = 1 / (scale * _rms(seen)) if scale else math.inf
        strides[n] = max(round(min(wanted, most)), 1)
    return strides


def _bits(found: Mapping[int, Magnitudes], strides: Mapping[int, int], value_bits: int) -> float:
    return sum(found[n].weights * value_bits / stride for n, stride in strides.items())
