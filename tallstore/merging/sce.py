"""SCE: select what tasks disagree on, calculate weights, erase the minority."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tallstore.errors import OptionError
from tallstore.merging.rule import Floats, Scope, Stretch, sum_rows, weighted_sum
from tallstore.merging.selection import count_high, count_low, find, join, magnitude_bits
from tallstore.merging.squares import shares, square_sums

__all__ = ["Sce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sce:
    """Select, calculate, erase: a weighted mean of the moves that tasks agree on the sign of.

    Wan et al., *FuseChat* (arXiv 2408.07990, section 3.3); tensor by tensor,

    - *select*: the weights whose variance over the tasks is among the `select` largest of those
      that are not zero; all other entries become zero;
    - *calculate*: a task's weight is its share of the squares of what was selected;
    - *erase*: entries whose sign is not that of the sum (positive where it is zero) are dropped;

    and ``v = sum of w[t] * entry[t] / sum of w[t]``, over the entries that are left.

    The published implementation selects only for the weights and merges all entries; the paper,
    and mergekit today, merge what was selected, and so does this.

    Parameters
    ----------
    select
        Share of the weights to select, 0 < select <= 1. Of so few weights that none is selected,
        none is merged.
    """

    select: float = 0.1
    name: str = "sce"
    made: int = 0
    """Surveys made, skipped ones included."""
    high: int = 0
    """Bin of the variance threshold's high bits; after the first survey."""
    rank: int = 0
    """The threshold's rank in that bin."""
    threshold: int = 0
    """Bits of the smallest variance selected; after the second survey."""
    weights: tuple[float, ...] = ()
    """Per task, its weight in this tensor; after the third."""

    def __post_init__(self) -> None:
        if not 0 < self.select <= 1:
            raise OptionError(f"select={self.select}: a share in (0, 1], such as 0.1")

    @property
    def scope(self) -> Scope:
        """A tensor."""
        return Scope.TENSOR

    @property
    def surveys(self) -> int:
        """Two for the threshold, one for the weights."""
        return (3 if self.select < 1 else 1) - self.made

    @property
    def masks(self) -> bool:
        """Not needed."""
        return False

    @property
    def faithful(self) -> bool:
        """Whether all is selected; otherwise one task, with no variance, merges to nothing."""
        return self.select == 1

    @property
    def usual_alpha(self) -> float:
        """That of a mean."""
        return 1.0

    def parameters(self) -> Mapping[str, Any]:
        """What was chosen."""
        return {"select": self.select}

    def check(self, tasks: Sequence[str]) -> None:
        """Take any tasks."""

    @staticmethod
    def _variance(vectors: Floats) -> Floats:
        """Over the tasks, computed in float64, so that it is the same however weights are cut."""
        wide = vectors.astype(np.float64)
        center = wide[0].copy()
        for row in wide[1:]:
            center += row
        center /= len(wide)
        total = np.zeros_like(center)
        for row in wide:
            total += np.square(row - center)
        with np.errstate(over="ignore"):
            variance: Floats = (total / len(wide)).astype(np.float32)
        return variance

    def survey(self, stretch: Stretch) -> npt.NDArray[np.int64]:
        """Histograms of variances, twice; then sums of squares."""
        if self.surveys == 1:
            return square_sums(self._selected(stretch.vectors))
        bits = magnitude_bits(self._variance(stretch.vectors))[None]
        if self.made == 0:
            return np.concatenate([count_high(bits)[0], [np.count_nonzero(bits)]])
        low: npt.NDArray[np.int64] = count_low(bits, [self.high])[0]
        return low

    def conclude(self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]) -> Sce:
        """Take in a survey's total."""
        if self.surveys == 1:
            return replace(self, made=self.made + 1, weights=shares(total))
        if self.made == 1:
            low, _ = find(total, self.rank)
            return replace(self, made=2, threshold=join(self.high, low))
        wanted = int(self.select * int(total[-1]))
        if not wanted:
            # No float has bits as large as this: nothing is selected.
            return replace(self, made=1, high=(1 << 15) - 1, rank=1)
        high, rank = find(total[:-1], wanted)
        return replace(self, made=1, high=high, rank=rank)

    def _selected(self, vectors: Floats) -> Floats:
        if self.select == 1:
            return vectors
        chosen = magnitude_bits(self._variance(vectors)) >= np.uint32(self.threshold)
        return np.where(chosen, vectors, np.float32(0))

    def merge(self, stretch: Stretch) -> Floats:
        """Select, weigh, erase."""
        vectors = self._selected(stretch.vectors)
        sign = np.where(sum_rows(vectors) >= 0, np.float32(1), np.float32(-1))
        left = np.sign(vectors) == sign
        total = weighted_sum(np.where(left, vectors, np.float32(0)), self.weights)
        divisor = weighted_sum(left.astype(np.float32), self.weights)
        divisor[divisor == 0] = 1
        return total / divisor
