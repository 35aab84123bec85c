"""From task vectors to levels: what is surveyed of a tensor, and what is fitted to it."""

from __future__ import annotations

from tallstore.fitting.gain import DEFAULT_GAIN, GAINS, gain_factor
from tallstore.fitting.levels import fit_magnitudes, signed_levels
from tallstore.fitting.magnitudes import Magnitudes

__all__ = [
    "DEFAULT_GAIN",
    "GAINS",
    "Magnitudes",
    "fit_magnitudes",
    "gain_factor",
    "signed_levels",
]
