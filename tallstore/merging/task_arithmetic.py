"""Task arithmetic: the sum of the task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tallstore.merging.rule import Floats, Stretch, Unsurveyed, sum_rows

__all__ = ["TaskArithmetic"]


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Unsurveyed):
    """``v = sum of the task vectors``, float32, added in the order of the tasks.

    Ilharco et al., *Editing models with task arithmetic* (arXiv 2212.04089); the multi-task vector
    of TALL-masks (arXiv 2405.07813, section 3) with a scaling of 1.
    """

    name: str = "ta"
    usual_alpha: float = 0.3

    def parameters(self) -> Mapping[str, Any]:
        """Nothing: there is nothing to choose."""
        return {}

    def merge(self, stretch: Stretch) -> Floats:
        """Add up."""
        return sum_rows(stretch.vectors)
