"""Levels of a scalar quantizer, fitted to a histogram of magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from tallstore.fitting.magnitudes import Magnitudes

__all__ = ["fit_magnitudes", "signed_levels"]

_ROUNDS: Final = 60


def fit_magnitudes(found: Magnitudes, count: int) -> tuple[float, ...]:
    """The magnitudes nearest to all, by least squares (Lloyd's rounds); ascending.

    Parameters
    ----------
    count
        How many, at most: fewer where fewer magnitudes occur.

    Returns
    -------
    tuple of float
        float32 numbers; empty where nothing moved.
    """
    there = found.weight > 0
    weight, product = found.weight[there], found.product[there]
    if not product.any():
        return ()
    center = product / weight
    # Bins that hold the same share of the movement each: a start that no outlier pulls away.
    share = np.cumsum(product)
    at = np.searchsorted(share, share[-1] * (np.arange(count) + 0.5) / count)
    levels = np.unique(center[np.minimum(at, center.size - 1)])
    # Where a few magnitudes hold most of the movement, as in bfloat16, starts coincide.
    for _ in range(count - levels.size):
        nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, center)]
        worst = np.argmax(weight * np.square(center - nearest))
        levels = np.unique(np.append(levels, center[worst]))
    for _ in range(_ROUNDS):
        group = np.searchsorted((levels[1:] + levels[:-1]) / 2, center)
        sums = np.bincount(group, weights=product, minlength=levels.size)
        weights = np.bincount(group, weights=weight, minlength=levels.size)
        used = weights > 0
        fresh = sums[used] / weights[used]
        if fresh.size == levels.size and np.allclose(fresh, levels, rtol=1e-7, atol=0):
            break
        levels = fresh
    return tuple(float(level) for level in np.unique(levels.astype(np.float32)))


def signed_levels(magnitudes: Sequence[float], bits: int, factor: float) -> tuple[float, ...]:
    """Levels by code: the low bits choose a magnitude, the highest makes it negative.

    Parameters
    ----------
    magnitudes
        At most 2**(bits - 1).
    factor
        What they are multiplied with, before rounding to float32.
    """
    half = 1 << (bits - 1)
    with np.errstate(over="ignore"):
        scaled = (np.asarray(magnitudes, np.float64) * factor).astype(np.float32)
    # -0.0 leaves every weight as it is, to the bit; 0.0 would make a -0.0 of the base 0.0.
    padded = [float(level) or -0.0 for level in scaled] + [0.0] * (half - len(scaled))
    return (*padded, *(-level for level in padded))
