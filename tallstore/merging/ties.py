"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tallstore.errors import OptionError
from tallstore.merging.rule import Floats, Scope, Stretch, sum_rows
from tallstore.merging.selection import count_high, count_low, find, join, magnitude_bits

__all__ = ["Ties"]

_COMBINE: Final = ("sum", "mean")
_ZERO_SIGN: Final = ("majority", "positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """Trim each task vector, elect a sign for each weight, merge the entries that agree with it.

    Yadav et al., *TIES-Merging* (arXiv 2306.01708), in the form that TALL-masks uses (arXiv
    2405.07813, section 3): the largest `keep` of the magnitudes over the whole flat vector of a
    task are kept, ties at the threshold included; the elected sign is that of the sum; the merged
    entry is the sum, or the mean, over the tasks whose trimmed entry has the elected sign.

    Parameters
    ----------
    keep
        Share of the weights that trimming keeps, 0 < keep <= 1.
    combine
        ``"sum"``, as TALL-masks and Consensus TIES take it, or ``"mean"`` over the agreeing
        entries, as the paper has it.
    zero_sign
        The sign where the entries sum to zero: ``"majority"``, the sign that most weights
        elected, as the reference implementation has it; or ``"positive"``, as PEFT and mergekit.
    """

    keep: float = 0.2
    combine: str = "sum"
    zero_sign: str = "majority"
    name: str = "ties"
    made: int = 0
    """Surveys made."""
    high: tuple[int, ...] = ()
    """Per task, the bin of the threshold's high bits; known after the first survey."""
    rank: tuple[int, ...] = ()
    """Per task, the threshold's rank within that bin, counted from its top."""
    threshold: tuple[int, ...] = ()
    """Per task, the bits of the smallest magnitude kept; known after the second survey."""
    majority: float = 0.0
    """The sign that most weights elected; known after the third survey."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise OptionError(f"keep is {self.keep}; TIES keeps a share in (0, 1], such as 0.2")
        if self.combine not in _COMBINE:
            raise OptionError(f"combine={self.combine!r}: {' or '.join(map(repr, _COMBINE))}")
        if self.zero_sign not in _ZERO_SIGN:
            raise OptionError(f"zero_sign={self.zero_sign!r}: {' or '.join(map(repr, _ZERO_SIGN))}")

    @property
    def scope(self) -> Scope:
        """All weights: the threshold is one for the whole vector."""
        return Scope.VECTOR

    @property
    def surveys(self) -> int:
        """Two for the thresholds, one for the majority's sign."""
        return (3 if self.zero_sign == "majority" else 2) - self.made

    @property
    def masks(self) -> bool:
        """Not needed."""
        return False

    @property
    def faithful(self) -> bool:
        """Whether nothing is trimmed."""
        return self.keep == 1

    @property
    def usual_alpha(self) -> float:
        """That of a sum, or of a mean."""
        return 1.0 if self.combine == "mean" else 0.3

    def parameters(self) -> Mapping[str, Any]:
        """What was chosen, as far as it is not TALL-masks' way."""
        odd = {"combine": self.combine, "zero_sign": self.zero_sign}
        usual = {"combine": "sum", "zero_sign": "majority"}
        return {"keep": self.keep, **{k: v for k, v in odd.items() if v != usual[k]}}

    def check(self, tasks: Sequence[str]) -> None:
        """Take any tasks."""

    def survey(self, stretch: Stretch) -> npt.NDArray[np.int64]:
        """Histograms of magnitudes, twice, for an exact threshold; then the balance of signs."""
        if self.made == 2:
            elected = np.sign(sum_rows(self._trim(stretch.vectors)))
            return np.array([elected.sum(dtype=np.int64)])
        bits = magnitude_bits(stretch.vectors)
        return count_high(bits) if self.made == 0 else count_low(bits, self.high)

    def conclude(self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]) -> Ties:
        """Take in a survey's total."""
        made = self.made + 1
        if made == 3:
            return replace(self, made=made, majority=float(np.sign(total[0])))
        if made == 1:
            # The reference takes the k-th smallest, k = d - int(d * keep), and keeps what is not
            # below it: int(d * keep) + 1 weights. Counted from the top, padding is no matter.
            wanted = [min(int(d * self.keep) + 1, int(d)) for d in weights]
            found = [find(row, rank) for row, rank in zip(total, wanted, strict=True)]
            high, rank = zip(*found, strict=True)
            return replace(self, made=made, high=high, rank=rank)
        found = [find(row, rank) for row, rank in zip(total, self.rank, strict=True)]
        threshold = tuple(join(h, low) for h, (low, _) in zip(self.high, found, strict=True))
        return replace(self, made=made, threshold=threshold)

    def _trim(self, vectors: Floats) -> Floats:
        limits = np.array(self.threshold, np.uint32)[:, None]
        return np.where(magnitude_bits(vectors) >= limits, vectors, np.float32(0))

    def merge(self, stretch: Stretch) -> Floats:
        """Trim, elect and merge one stretch."""
        trimmed = self._trim(stretch.vectors)
        sign = np.sign(sum_rows(trimmed))
        # Where even the majority is undecided the reference, too, takes the negative entries.
        sign[sign == 0] = 1.0 if self.zero_sign == "positive" else self.majority or -1.0
        merged = np.zeros(trimmed.shape[1], np.float32)
        agreeing = np.zeros(trimmed.shape[1], np.float32)
        for row in trimmed:
            agrees = np.sign(row) == sign
            np.add(merged, np.where(agrees, row, np.float32(0)), out=merged)
            agreeing += agrees
        if self.combine == "mean":
            merged /= np.maximum(agreeing, np.float32(1))
        return merged
