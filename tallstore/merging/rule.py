"""The contract of a merge rule: task vectors in, one merged vector out, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "Flags",
    "Floats",
    "MergeRule",
    "Scope",
    "Stretch",
    "Unsurveyed",
    "row_length",
    "sum_rows",
    "weighted_sum",
]

#: A float32 array.
Floats = npt.NDArray[np.float32]
#: A bool array.
Flags = npt.NDArray[np.bool_]


class Scope(Enum):
    """Over which weights a rule takes its statistics."""

    VECTOR = "vector"
    """All weights of all tensors at once."""
    TENSOR = "tensor"
    """Each tensor by itself."""
    ROW = "row"
    """Each row of each tensor: a weight's first axis; all of a tensor of fewer than two axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A run of consecutive weights, of all tasks at once: what a rule sees at a time.

    Parameters
    ----------
    tasks
        The tasks' names, in order.
    vectors
        Task vectors, float32, shape (tasks, weights). Weights that are padding, or not finite in
        some task, are zero.
    arena, start
        Where it lies: the arena's number, and the first weight counted in the arena. This is a
        weight's address: it is the same however the weights are cut.
    tensor, shape, first
        The tensor it lies in, its shape, and the first weight counted in the tensor; only for a
        rule whose scope is a tensor or a row.
    masks
        The tasks' TALL masks, bool, shape (tasks, weights); only for a rule that asks for them.
    """

    tasks: tuple[str, ...]
    vectors: Floats
    arena: int = 0
    start: int = 0
    tensor: str = ""
    shape: tuple[int, ...] = ()
    first: int = 0
    masks: Flags | None = None

    @property
    def row_length(self) -> int:
        """Weights of a row of the tensor."""
        return row_length(self.shape)

    def having(self, vectors: Floats) -> Stretch:
        """The same weights with other vectors."""
        return replace(self, vectors=vectors)


def row_length(shape: Sequence[int]) -> int:
    """Weights of one row of a tensor of `shape`."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


class MergeRule(Protocol):
    """A way to merge task vectors, applied stretch by stretch.

    A rule that needs a statistic states how many `surveys` it makes. Each is one pass over all
    weights: `survey` gives an array of integers for a stretch, the arrays of all stretches of the
    rule's scope are added up in any order (integers, so that the order shows nowhere), and
    `conclude` returns the rule that knows the total: one rule for each tensor where the scope is
    the tensor. Where the scope is the row, stretches are whole rows and are merged without a
    survey; a row that had to be cut is surveyed, and its stretches hold nothing else. Rules are
    immutable.

    Attributes
    ----------
    name
        Its name on the command line and in the manifest.
    scope
        What statistics are taken over.
    surveys
        Passes that are still needed before `merge`.
    masks
        Whether stretches are to carry the tasks' TALL masks.
    faithful
        Whether the merge of one task alone is that task's vector, every weight of it.
    usual_alpha
        The scaling to take where nobody chooses: 1 where the merged vector is a mean; 0.3, a
        common choice, where it is a sum.
    """

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> Scope: ...
    @property
    def surveys(self) -> int: ...
    @property
    def masks(self) -> bool: ...
    @property
    def faithful(self) -> bool: ...
    @property
    def usual_alpha(self) -> float: ...

    def parameters(self) -> Mapping[str, Any]:
        """What the manifest keeps of it: strict JSON."""
        ...

    def check(self, tasks: Sequence[str]) -> None:
        """Refuse tasks that its options do not fit; raises OptionError."""
        ...

    def survey(self, stretch: Stretch) -> npt.NDArray[np.int64]:
        """The statistic of one stretch."""
        ...

    def conclude(
        self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]
    ) -> MergeRule:
        """The rule after a survey.

        Parameters
        ----------
        total
            The sum of all stretches' statistics.
        weights
            How many of the surveyed weights each task has, padding left out; shape (tasks,).
        """
        ...

    def merge(self, stretch: Stretch) -> Floats:
        """The merged vector of one stretch, float32, shape (weights,)."""
        ...


class Unsurveyed:
    """What rules that look at nothing but the stretch have in common."""

    __slots__ = ()
    scope = Scope.VECTOR
    surveys = 0
    masks = False
    faithful = True

    def check(self, tasks: Sequence[str]) -> None:
        """Take any tasks."""

    def survey(self, stretch: Stretch) -> npt.NDArray[np.int64]:
        """Never called."""
        raise NotImplementedError

    def conclude(
        self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]
    ) -> MergeRule:
        """Never called."""
        raise NotImplementedError


def sum_rows(vectors: Floats) -> Floats:
    """Add up, one task after the other: the order is part of the result in float32."""
    total: Floats = vectors[0].copy()
    for row in vectors[1:]:
        np.add(total, row, out=total)
    return total


def weighted_sum(vectors: Floats, weights: Sequence[float]) -> Floats:
    """``sum of weights[t] * vectors[t]`` in float32, in the order of the tasks."""
    total: Floats = vectors[0] * np.float32(weights[0])
    for row, weight in zip(vectors[1:], weights[1:], strict=True):
        np.add(total, row * np.float32(weight), out=total)
    return total
