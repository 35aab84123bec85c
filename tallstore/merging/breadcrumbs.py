"""Model Breadcrumbs: drop the smallest and the largest moves, layer by layer, and sum the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tallstore.errors import OptionError
from tallstore.merging.rule import Flags, Floats, Scope, Stretch, sum_rows
from tallstore.merging.selection import Bits, count_high, count_low, find, join, magnitude_bits

__all__ = ["Breadcrumbs", "breadcrumbs_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breadcrumbs:
    """``v = sum over tasks of the task vector's middle magnitudes, tensor by tensor``.

    Davari and Belilovsky, *Model Breadcrumbs* (arXiv 2312.06795): in each layer of each
    task vector the smallest magnitudes, which are noise, and the few largest, which are outliers,
    are set to zero. Of n weights int(beta * n) go at the bottom and int(gamma * n) at the top;
    ties with what is kept are kept.

    Parameters
    ----------
    beta
        Share of the smallest magnitudes to drop, at least 0.
    gamma
        Share of the largest to drop, at least 0; beta + gamma < 1.
    rows
        Count in each row (output) of a tensor rather than in the whole tensor.
    """

    beta: float = 0.85
    gamma: float = 0.007
    rows: bool = False
    made: int = 0
    """Surveys made."""
    places: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Per task, bin and rank of the smallest and the largest kept; after the first survey."""
    limits: tuple[tuple[int, ...], ...] = ()
    """Per task, the bits of the smallest and the largest magnitude kept; after the second."""

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and self.gamma >= 0 and self.beta + self.gamma < 1):
            raise OptionError(
                f"beta={self.beta}, gamma={self.gamma}: the shares of the smallest and of the "
                "largest magnitudes to drop, each at least 0 and together below 1, such as 0.85 "
                "and 0.007"
            )

    @property
    def name(self) -> str:
        """By variant."""
        return "breadcrumbs-rows" if self.rows else "breadcrumbs"

    @property
    def scope(self) -> Scope:
        """A tensor, or a row."""
        return Scope.ROW if self.rows else Scope.TENSOR

    @property
    def surveys(self) -> int:
        """Two, for exact thresholds."""
        return 2 - self.made

    @property
    def masks(self) -> bool:
        """Not needed."""
        return False

    @property
    def faithful(self) -> bool:
        """Whether nothing is dropped."""
        return self.beta == self.gamma == 0

    @property
    def usual_alpha(self) -> float:
        """That of a sum."""
        return 0.3

    def parameters(self) -> Mapping[str, Any]:
        """Both shares."""
        return {"beta": self.beta, "gamma": self.gamma}

    def check(self, tasks: Sequence[str]) -> None:
        """Take any tasks."""

    def _dropped(self, count: int) -> tuple[int, int]:
        return int(self.beta * count), int(self.gamma * count)

    def survey(self, stretch: Stretch) -> npt.NDArray[np.int64]:
        """Histograms of magnitudes: of the high bits, then of the low bits at both limits."""
        bits = magnitude_bits(stretch.vectors)
        if self.made == 0:
            return count_high(bits)
        ends = [[place[end][0] for place in self.places] for end in (0, 1)]
        return np.stack([count_low(bits, bins) for bins in ends], axis=1)

    def conclude(
        self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]
    ) -> Breadcrumbs:
        """Take in a survey's total."""
        if self.made == 0:
            places = []
            for row, count in zip(total, weights.tolist(), strict=True):
                bottom, top = self._dropped(count)
                places.append((find(row, count - bottom), find(row, top + 1)))
            return replace(self, made=1, places=tuple(places))
        limits = tuple(
            tuple(join(high, find(row[end], rank)[0]) for end, (high, rank) in enumerate(ends))
            for row, ends in zip(total, self.places, strict=True)
        )
        return replace(self, made=2, limits=limits)

    def merge(self, stretch: Stretch) -> Floats:
        """Drop and add up."""
        bits = magnitude_bits(stretch.vectors)
        if self.made == 2:
            ends = np.array(self.limits, np.uint32)
            kept = (bits >= ends[:, :1]) & (bits <= ends[:, 1:])
        else:
            kept = self._kept_in_rows(bits, stretch.row_length)
        return sum_rows(np.where(kept, stretch.vectors, np.float32(0)))

    def _kept_in_rows(self, bits: Bits, length: int) -> Flags:
        """Of whole rows, which weights stay."""
        rows = bits.reshape(len(bits), -1, length)
        bottom, top = self._dropped(length)
        first, last = bottom, length - top - 1
        ordered = np.partition(rows, (first, last), axis=-1)
        kept = (rows >= ordered[..., first, None]) & (rows <= ordered[..., last, None])
        flat: Flags = kept.reshape(bits.shape)
        return flat


def breadcrumbs_rows(*, beta: float = 0.85, gamma: float = 0.007) -> Breadcrumbs:
    """Model Breadcrumbs, counted row by row."""
    return Breadcrumbs(beta=beta, gamma=gamma, rows=True)
