"""TIES: trim, elect signs, sum what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tallstore.errors import OptionError
from tallstore.merging.rule import Floats

__all__ = ["Ties"]

_HIGH_BINS: Final = 1 << 15  # the exponent and the top 7 bits of |x|
_LOW_BINS: Final = 1 << 16


def _magnitude_bits(vectors: Floats) -> npt.NDArray[np.uint32]:
    """|x| as an integer: for floats of one sign, integers order as the floats do."""
    return np.ascontiguousarray(vectors).view(np.uint32) & np.uint32(0x7FFFFFFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """Trim each task vector, elect a sign for each weight, sum the entries that agree with it.

    Yadav et al., *TIES-Merging* (arXiv 2306.01708), in the form that TALL-masks uses (arXiv
    2405.07813, section 3): the largest `keep` of the magnitudes over the whole flat vector of a
    task are kept, ties at the threshold included; the elected sign is that of the sum; where the
    sum is zero the sign that most weights elected is taken, as the reference implementation does;
    the merged entry is the sum over the tasks whose trimmed entry has the elected sign.

    Parameters
    ----------
    keep
        Share of the weights that trimming keeps, 0 < keep <= 1.
    """

    keep: float = 0.2
    name: str = "ties"
    surveys: int = 3
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

    def parameters(self) -> Mapping[str, Any]:
        """What was chosen."""
        return {"keep": self.keep}

    def survey(self, vectors: Floats) -> npt.NDArray[np.int64]:
        """Histograms of magnitudes, twice, for an exact threshold; then the balance of signs."""
        if self.surveys == 1:
            return np.array([np.sign(self._elect(self._trim(vectors))).sum(dtype=np.int64)])
        bits = _magnitude_bits(vectors)
        if self.surveys == 3:
            return np.stack([np.bincount(row >> 16, minlength=_HIGH_BINS) for row in bits])
        counts = []
        for row, high in zip(bits, self.high, strict=True):
            inside = row[(row >> 16) == high] & 0xFFFF
            counts.append(np.bincount(inside, minlength=_LOW_BINS))
        return np.stack(counts)

    def conclude(self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]) -> Ties:
        """Take in a survey's total."""
        left = self.surveys - 1
        if self.surveys == 1:
            return replace(self, surveys=left, majority=float(np.sign(total[0])))
        if self.surveys == 3:
            # The reference takes the k-th smallest, k = d - int(d * keep), and keeps what is not
            # below it: int(d * keep) + 1 weights. Counted from the top, padding is no matter.
            wanted = [min(int(d * self.keep) + 1, int(d)) for d in weights]
            found = [_from_top(row, rank) for row, rank in zip(total, wanted, strict=True)]
            high, rank = zip(*found, strict=True)
            return replace(self, surveys=left, high=high, rank=rank)
        found = [_from_top(row, rank) for row, rank in zip(total, self.rank, strict=True)]
        threshold = tuple((h << 16) | low for h, (low, _) in zip(self.high, found, strict=True))
        return replace(self, surveys=left, threshold=threshold)

    def _trim(self, vectors: Floats) -> Floats:
        limits = np.array(self.threshold, np.uint32)[:, None]
        return np.where(_magnitude_bits(vectors) >= limits, vectors, np.float32(0))

    @staticmethod
    def _elect(trimmed: Floats) -> Floats:
        total: Floats = trimmed[0].copy()
        for row in trimmed[1:]:
            np.add(total, row, out=total)
        return total

    def merge(self, vectors: Floats) -> Floats:
        """Trim, elect and sum one piece."""
        trimmed = self._trim(vectors)
        sign = np.sign(self._elect(trimmed))
        # Where even the majority is undecided the reference, too, takes the negative entries.
        sign[sign == 0] = self.majority or -1.0
        merged = np.zeros(vectors.shape[1], np.float32)
        for row in trimmed:
            np.add(merged, np.where(np.sign(row) == sign, row, np.float32(0)), out=merged)
        return merged


def _from_top(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    """(bin of the `rank`-th largest entry, its rank within that bin), ranks from 1."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, rank))
    index = min(index, counts.size - 1)
    before = int(above[index - 1]) if index else 0
    return counts.size - 1 - index, max(rank - before, 1)
