"""The contract of a merge rule: task vectors in, one shared vector out, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "MergeRule"]

#: A float32 array.
Floats = npt.NDArray[np.float32]


class MergeRule(Protocol):
    """A way to merge task vectors, applied piece by piece.

    A rule that needs a statistic over all weights states how many `surveys` it makes. Each is one
    pass over all pieces: `survey` gives an array for a piece, the arrays of all pieces are added
    up in any order, and `conclude` returns the rule that knows the total. Rules are immutable.

    Attributes
    ----------
    name
        Its name on the command line and in the manifest.
    surveys
        Passes that are still needed before `merge`.
    """

    @property
    def name(self) -> str: ...
    @property
    def surveys(self) -> int: ...

    def parameters(self) -> Mapping[str, Any]:
        """What the manifest keeps of it: strict JSON."""
        ...

    def survey(self, vectors: Floats) -> npt.NDArray[np.int64]:
        """The statistic of one piece.

        Parameters
        ----------
        vectors
            Task vectors, float32, shape (tasks, weights). Weights that are padding, or not finite
            in some task, are zero.
        """
        ...

    def conclude(
        self, total: npt.NDArray[np.int64], *, weights: npt.NDArray[np.int64]
    ) -> MergeRule:
        """The rule after a survey.

        Parameters
        ----------
        total
            The sum of all pieces' statistics.
        weights
            How many weights each task's vector has, padding left out; shape (tasks,).
        """
        ...

    def merge(self, vectors: Floats) -> Floats:
        """The shared vector of one piece, float32, shape (weights,)."""
        ...
