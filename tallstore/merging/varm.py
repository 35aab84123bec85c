"""VaRM: an average whose weights are how much each task moved each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tallstore.merging.rule import Floats, Scope, Stretch, weighted_sum
from tallstore.merging.squares import shares, square_sums

__all__ = ["Varm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Varm:
    """``v = sum of w[t, tensor] * task_vector[t]``, w the task's share of the squared moves.

    Wan et al., *FuseChat* (arXiv 2402.16107, section 3.3: variation ratio merging; arXiv
    2408.07990 makes SCE of it): in each parameter matrix the weight of a task is the mean of its
    squared moves over the sum of all tasks' means; all equal where nothing moved. The sums of
    squares are exact.
    """

    name: str = "varm"
    made: int = 0
    """Surveys made."""
    weights: tuple[float, ...] = ()
    """Per task, its weight in this tensor; known after the survey."""

    @property
    def scope(self) -> Scope:
        """A tensor."""
        return Scope.TENSOR

    @property
    def surveys(self) -> int:
        """One, of squares."""
        return 1 - self.made

    @property
    def masks(self) -> bool:
        """Not needed."""
        return False

    @property
    def faithful(self) -> bool:
        """One task has all the weight."""
        return True

    @property
    def usual_alpha(self) -> float:
        """That of a mean."""
        return 1.0

    def parameters(self) -> Mapping[str, Any]:
        """Nothing: there is nothing to choose."""
        return {}

    def check(self, tasks: Sequence[str]) -> None:
        """Take any tasks."""

    def survey(self, stretch: Stretch) -> npt.NDArray[np.int64]:
        """Sums of squares."""
        return square_sums(stretch.vectors)

    def conclude(self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]) -> Varm:
        """Take in the sums; all tasks have as many weights in a tensor, so means are no matter."""
        return replace(self, made=1, weights=shares(total))

    def merge(self, stretch: Stretch) -> Floats:
        """The weighted sum."""
        return weighted_sum(stretch.vectors, self.weights)
