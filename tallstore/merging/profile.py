"""How far weights move at all: a magnitude for each weight, for levels to be relative to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tallstore.merging.rule import Floats, Stretch, Unsurveyed

__all__ = ["Profile"]


@dataclass(frozen=True, kw_only=True)
class Profile(Unsurveyed):
    """``v = sum of |task_vector[t]| / tasks``: the mean magnitude, without a sign.

    No model to load but a step per weight: `pack` quantizes task vectors relative to it. It is not
    tied to the tasks that it was made of: one that came later is coded over it as well.
    """

    name: str = "profile"
    faithful: bool = False
    usual_alpha: float = 1.0

    def parameters(self) -> Mapping[str, Any]:
        """None."""
        return {}

    def merge(self, stretch: Stretch) -> Floats:
        """Add up magnitudes, and divide."""
        total: Floats = np.abs(stretch.vectors[0])
        for row in stretch.vectors[1:]:
            np.add(total, np.abs(row), out=total)
        total /= np.float32(len(stretch.vectors))
        return total
