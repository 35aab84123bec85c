"""How long a coded task vector is to be.

A quantizer fitted by least squares gives a vector that is too short along the one it codes, and
that costs accuracy; keeping the projection does not, however large the error.
"""

from __future__ import annotations

import math
from typing import Final

__all__ = ["DEFAULT_GAIN", "GAINS", "gain_factor"]

#: ``unbiased``: the projection on the task vector is the task vector's own, <c, t> = <t, t>.
#: ``norm``: the lengths agree, |c| = |t|. ``ls``: the error |c - t| is the least.
GAINS: Final = ("unbiased", "norm", "ls")
DEFAULT_GAIN: Final = "unbiased"


def gain_factor(rule: str, *, moved: float, projection: float, norm: float) -> float | None:
    """What levels are multiplied with; None where the rule has no answer.

    Parameters
    ----------
    rule
        One of `GAINS`.
    moved
        Squared norm of the task vector t.
    projection
        <c, t> of the vector c that unscaled levels give.
    norm
        Squared norm of c.
    """
    if not (moved > 0 and projection > 0 and norm > 0):
        return None
    factor = {
        "unbiased": moved / projection,
        "norm": math.sqrt(moved / norm),
        "ls": projection / norm,
    }[rule]
    return factor if math.isfinite(factor) else None
