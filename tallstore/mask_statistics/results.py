"""What is found out about the masks of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["MaskStatistics", "Matrix", "PartStatistics", "TaskUse", "Use"]

#: One row and one column a task; None where there is no number.
Matrix = tuple[tuple[float | None, ...], ...]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How many of T tasks use the weights of the model, or of a part of it.

    The words are those of arXiv 2405.07813, section 4: *catastrophic* weights are used by no
    task, *selfish* ones by exactly one, *general* ones by two or more.
    """

    histogram: tuple[int, ...]
    """T + 1 numbers: of the weights that exactly 0, 1, .., T tasks use."""

    @property
    def weights(self) -> int:
        """All weights."""
        return sum(self.histogram)

    @property
    def catastrophic(self) -> float | None:
        """Share of the weights that no task uses."""
        return _share(self.histogram[0], self.weights)

    @property
    def selfish(self) -> float | None:
        """Share of the weights that exactly one task uses."""
        return _share(self.histogram[1], self.weights)

    @property
    def general(self) -> float | None:
        """Share of the weights that two tasks or more use."""
        return _share(sum(self.histogram[2:]), self.weights)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "weights": self.weights,
            "histogram": list(self.histogram),
            "catastrophic": self.catastrophic,
            "selfish": self.selfish,
            "general": self.general,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskUse:
    """What one task uses of the model, or of a part of it."""

    coded: int
    """Weights that the task has bits for."""
    ones: int
    """Weights that it uses: its ones."""
    exclusive: int
    """Weights that no other task uses."""

    @property
    def density(self) -> float | None:
        """Fraction of ones over the coded weights; None where it codes none."""
        return _share(self.ones, self.coded)

    @property
    def selfish(self) -> float | None:
        """Share of its ones that no other task uses."""
        return _share(self.exclusive, self.ones)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "coded": self.coded,
            "ones": self.ones,
            "exclusive": self.exclusive,
            "density": self.density,
            "selfish": self.selfish,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStatistics:
    """One tensor of the base, or one layer."""

    name: str
    """Of the tensor (the first, where several share memory), or of the layer."""
    layer: str
    """The layer that it belongs to, or is."""
    use: Use
    tasks: Mapping[str, TaskUse]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "layer": self.layer,
            **self.use.to_json(),
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskStatistics:
    """The masks of a store, counted.

    The weights are those of the base that at least one of the tasks codes, tensor by tensor.
    Where a task keeps such a tensor as it is (a head of another shape), or did not change it, it
    has no bits for it, and counts as not using it.
    """

    tasks: Mapping[str, TaskUse]
    """The tasks counted, in order: row t of the matrices is the t-th of them."""
    without_masks: tuple[str, ...]
    """Tasks of the store that have no masks and are left out."""
    use: Use
    uncoded: int
    """Weights of the base that none of the tasks codes: not counted anywhere."""
    layers: tuple[PartStatistics, ...]
    tensors: tuple[PartStatistics, ...]
    overlap: tuple[tuple[int, ...], ...]
    """How many weights each pair of tasks uses in common; the diagonal has each one's own."""
    cosine: Matrix | None
    """Cosines between the task vectors, where asked for."""
    cosine_from: str | None
    """What the task vectors are of: ``"exact"``, the originals, where every task counted has the
    exact tier; ``"codes"``, what the masks alone reconstruct; None where not asked for."""

    @property
    def jaccard(self) -> Matrix:
        """Weights that both tasks use, over those that either uses; None where neither uses any."""
        ones = [row[t] for t, row in enumerate(self.overlap)]
        return tuple(
            tuple(_share(both, ones[i] + ones[j] - both) for j, both in enumerate(row))
            for i, row in enumerate(self.overlap)
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "without_masks": list(self.without_masks),
            **self.use.to_json(),
            "uncoded": self.uncoded,
            "overlap": [list(row) for row in self.overlap],
            "jaccard": [list(row) for row in self.jaccard],
            "cosine": None if self.cosine is None else [list(row) for row in self.cosine],
            "cosine_from": self.cosine_from,
            "layers": [part.to_json() for part in self.layers],
            "tensors": [part.to_json() for part in self.tensors],
        }
