"""DARE: drop most of each task vector at random, and rescale what is left."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tallstore.errors import OptionError
from tallstore.merging.rule import Flags, Floats, MergeRule, Scope, Stretch
from tallstore.merging.task_arithmetic import TaskArithmetic
from tallstore.merging.ties import Ties

__all__ = ["Dare", "dare_ta", "dare_ties"]

#: Constants of splitmix64 (Steele, Lea and Flood, 2014).
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MAX_SEED: Final = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Dare:
    """Each entry is dropped with probability `drop`, else divided by 1 - drop; then `inner` merges.

    Yu et al., *Language Models are Super Mario* (arXiv 2311.03099, equations 1 to 3). Whether an
    entry goes depends on the seed, the task's name and the weight's place in the store alone: a
    counter-based hash, so the same entries go whatever the stretches, threads and other tasks.

    Parameters
    ----------
    inner
        The rule that merges what is left.
    drop
        Probability, 0 <= drop < 1.
    seed
        0 .. 2**63 - 1.
    """

    inner: MergeRule
    drop: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise OptionError(f"drop={self.drop}: a probability in [0, 1), such as 0.9")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(f"seed={self.seed!r}: a whole number")
        if not 0 <= self.seed < _MAX_SEED:
            raise OptionError(f"seed={self.seed}: at least 0 and below 2**63")

    @property
    def name(self) -> str:
        """Of both rules; over task arithmetic, plain ``dare``."""
        return "dare" if self.inner.name == "ta" else f"dare-{self.inner.name}"

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
        """The inner rule's."""
        return self.inner.masks

    @property
    def faithful(self) -> bool:
        """Whether nothing is dropped."""
        return self.drop == 0 and self.inner.faithful

    @property
    def usual_alpha(self) -> float:
        """The inner rule's: what is left stands for what was dropped."""
        return self.inner.usual_alpha

    def parameters(self) -> Mapping[str, Any]:
        """Those of the inner rule, and its own."""
        return {**self.inner.parameters(), "drop": self.drop, "seed": self.seed}

    def check(self, tasks: Sequence[str]) -> None:
        """Ask the inner rule."""
        self.inner.check(tasks)

    def survey(self, stretch: Stretch) -> npt.NDArray[np.int64]:
        """The inner rule's, of what is left."""
        return self.inner.survey(self._thinned(stretch))

    def conclude(self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]) -> Dare:
        """The inner rule's conclusion."""
        return replace(self, inner=self.inner.conclude(total, weights=weights))

    def merge(self, stretch: Stretch) -> Floats:
        """The inner rule's merge of what is left."""
        return self.inner.merge(self._thinned(stretch))

    def _thinned(self, stretch: Stretch) -> Stretch:
        if self.drop == 0:
            return stretch
        vectors = stretch.vectors / np.float32(1 - self.drop)
        for row, task in zip(vectors, stretch.tasks, strict=True):
            row[~self._kept(task, stretch.arena, stretch.start, row.size)] = 0
        return stretch.having(vectors)

    def _kept(self, task: str, arena: int, start: int, count: int) -> Flags:
        named = f"{self.seed}/{arena}/{task}".encode()
        key = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")
        word = np.arange(start + 1, start + 1 + count, dtype=np.uint64)
        word *= _STEP
        word += np.uint64(key)
        for shift, factor in _MIX:
            word ^= word >> np.uint64(shift)
            word *= np.uint64(factor)
        word ^= word >> np.uint64(31)
        kept: Flags = word >= np.uint64(int(self.drop * 2**64))
        return kept


def dare_ta(*, drop: float = 0.9, seed: int = 0) -> Dare:
    """DARE, then the sum."""
    return Dare(inner=TaskArithmetic(), drop=drop, seed=seed)


def dare_ties(*, drop: float = 0.9, seed: int = 0, keep: float = 1.0) -> Dare:
    """DARE, then the election of signs; TIES trims nothing unless told to."""
    return Dare(inner=Ties(keep=keep), drop=drop, seed=seed)
