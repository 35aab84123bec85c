"""Averages of the fine-tuned models, plain or weighted: model soups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from tallstore.errors import OptionError
from tallstore.merging.rule import Floats, Stretch, Unsurveyed, sum_rows, weighted_sum

__all__ = ["Average"]


@dataclass(frozen=True, kw_only=True)
class Average(Unsurveyed):
    """``v = sum of w[t] * task_vector[t] / sum of w``: with alpha 1, the average of the models.

    Plain, it is the uniform soup of Wortsman et al., *Model soups* (arXiv 2203.05482); with
    weights, the reference model of SALSA (arXiv 2411.01798), an average of supervised fine-tunes.

    Parameters
    ----------
    weights
        A number of at least 0 for each task, not all 0; none: the plain average.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    name: str = "average"
    usual_alpha: float = 1.0

    def __post_init__(self) -> None:
        for task, weight in self.weights.items():
            if not math.isfinite(weight) or weight < 0:
                raise OptionError(f"weight {weight} for {task!r}: a finite number of at least 0")
        if self.weights and not any(self.weights.values()):
            raise OptionError("weights that are all 0 make no average; give one above 0")
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    def parameters(self) -> Mapping[str, Any]:
        """The weights, where there are any."""
        return {"weights": dict(self.weights)} if self.weights else {}

    def check(self, tasks: Sequence[str]) -> None:
        """Refuse weights that are not those of the tasks."""
        if not self.weights or set(self.weights) == set(tasks):
            return
        absent = ", ".join(repr(t) for t in tasks if t not in self.weights)
        other = ", ".join(repr(t) for t in self.weights if t not in tasks)
        why = [f"no weight for {absent}"] * bool(absent) + [f"no task {other}"] * bool(other)
        raise OptionError(f"weights: {'; '.join(why)}; give one for each task that is merged")

    def merge(self, stretch: Stretch) -> Floats:
        """Add up, and divide."""
        vectors = stretch.vectors
        if not self.weights:
            merged = sum_rows(vectors)
            merged /= np.float32(len(vectors))
            return merged
        whole = math.fsum(self.weights.values())
        return weighted_sum(vectors, [self.weights[task] / whole for task in stretch.tasks])
