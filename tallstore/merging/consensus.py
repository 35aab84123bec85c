"""Consensus Merging: weights that few tasks use are left out of the merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tallstore.errors import OptionError
from tallstore.merging.rule import Floats, MergeRule, Scope, Stretch
from tallstore.merging.task_arithmetic import TaskArithmetic
from tallstore.merging.ties import Ties

__all__ = ["Consensus", "consensus_ta", "consensus_ties"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """``v = inner's vector where at least k tasks' TALL masks are 1, elsewhere 0``.

    Wang et al., *Localizing Task Information for Improved Model Merging and Compression* (arXiv
    2405.07813, its Consensus Merging): k = 1 drops the catastrophic weights, which no task
    uses, k = 2 the selfish ones too, which one task uses. k = 0 drops nothing, k above the number
    of tasks everything. The masks are those stored with the tasks, made for the store's vector.

    Parameters
    ----------
    inner
        The rule that gives the vector: task arithmetic or TIES with a disjoint sum.
    k
        Tasks that have to use a weight, at least 0.
    """

    inner: MergeRule
    k: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 0:
            raise OptionError(
                f"k={self.k!r}: a whole number of tasks; 2 keeps what two or more tasks use, "
                "0 keeps everything"
            )

    @property
    def name(self) -> str:
        """Of both rules."""
        return f"consensus-{self.inner.name}"

    @property
    def scope(self) -> Scope:
        """The inner rule's."""
        return self.inner.scope

    @property
    def surveys(self) -> int:
        """The inner rule's."""
        return self.inner.surveys

    @property
    def masks(self) -> bool:
        """Needed."""
        return True

    @property
    def faithful(self) -> bool:
        """Whether nothing is dropped."""
        return self.k == 0 and self.inner.faithful

    @property
    def usual_alpha(self) -> float:
        """The inner rule's."""
        return self.inner.usual_alpha

    def parameters(self) -> Mapping[str, Any]:
        """Those of the inner rule, and k."""
        return {**self.inner.parameters(), "k": self.k}

    def check(self, tasks: Sequence[str]) -> None:
        """Ask the inner rule."""
        self.inner.check(tasks)

    def survey(self, stretch: Stretch) -> npt.NDArray[np.int64]:
        """The inner rule's."""
        return self.inner.survey(stretch)

    def conclude(
        self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]
    ) -> Consensus:
        """The inner rule's conclusion, under the same masks."""
        return replace(self, inner=self.inner.conclude(total, weights=weights))

    def merge(self, stretch: Stretch) -> Floats:
        """The inner rule's vector, where enough tasks use it."""
        if stretch.masks is None:
            raise OptionError(f"{self.name} takes stored TALL masks, and there are none here")
        used = stretch.masks.sum(axis=0, dtype=np.int64) >= self.k
        return np.where(used, self.inner.merge(stretch), np.float32(0))


def consensus_ta(*, k: int = 2) -> Consensus:
    """Consensus Task Arithmetic."""
    return Consensus(inner=TaskArithmetic(), k=k)


def consensus_ties(*, k: int = 2, keep: float = 0.2) -> Consensus:
    """Consensus TIES."""
    return Consensus(inner=Ties(keep=keep), k=k)
