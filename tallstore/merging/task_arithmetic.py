"""Task arithmetic: the sum of the task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tallstore.merging.rule import Floats, MergeRule

__all__ = ["TaskArithmetic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskArithmetic:
    """``v = sum of the task vectors``, float32, added in the order of the tasks.

    Ilharco et al., *Editing models with task arithmetic* (arXiv 2212.04089); the multi-task vector
    of TALL-masks (arXiv 2405.07813, section 3) with a scaling of 1.
    """

    name: str = "ta"
    surveys: int = 0

    def parameters(self) -> Mapping[str, Any]:
        """Nothing: there is nothing to choose."""
        return {}

    def survey(self, vectors: Floats) -> npt.NDArray[np.int64]:
        """Never called."""
        raise NotImplementedError

    def conclude(
        self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]
    ) -> MergeRule:
        """Never called."""
        raise NotImplementedError

    def merge(self, vectors: Floats) -> Floats:
        """Add up, one task after the other: the order is part of the result in float32."""
        merged: Floats = vectors[0].copy()
        for vector in vectors[1:]:
            np.add(merged, vector, out=merged)
        return merged
