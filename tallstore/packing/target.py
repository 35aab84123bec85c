"""What is to be kept of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tallstore.fitting import DEFAULT_GAIN
from tallstore.packing.drafts import Draft
from tallstore.packing.gathering import Candidate

__all__ = ["Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A checkpoint, and what is to be kept of it."""

    candidate: Candidate
    coded: Candidate | None = None
    """What codes are to be of, where that is not the checkpoint as it is: with other biases."""
    exact: bool
    """Whether loading is to give back the original bit for bit."""
    tall_lambda: float | None = None
    """Of TALL masks; None: there are none."""
    drafts: Mapping[int, Draft] | None = None
    """Codes of other kinds, by segment of the base; None: there are none. A segment that is not
    in it is kept: by the exact tier, or as it is."""
    shared: bool = False
    """Whether dense codes among `drafts` are over the shared vector."""
    gain: str = DEFAULT_GAIN
    seed: int = 0
    """Of the hash that places seeded values."""
    code: str = "none"
    """What the record says: ``"tall"``, ``"signs"``, ..."""
    parameters: Mapping[str, Any] | None = None
    """What the record says of them; None: all is in the words of format version 1."""
    score: float | None = None

    @property
    def plain(self) -> bool:
        """Whether it is written in the words of format version 1."""
        return self.parameters is None
