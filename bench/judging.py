"""What a code keeps of a zoo's fine-tunes: accuracy or loss against base and fine-tuned model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.rivals.vectors import Vectors
from bench.zoos import language, minilm, vision
from bench.zoos.cache import Zoo

Split = Literal["validation", "test"]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A zoo, how its models are tested and on how much."""

    name: str
    zoo: Callable[[Path | None], Zoo]
    calibration: Callable[..., tuple[torch.nn.Module, list[Any]]]
    """Of a task and `cache`: a module, and inputs without labels."""
    pupil: Mapping[str, int]
    """How many, and in what batches, to train codes with."""
    validation: int
    """Texts, images or windows a task."""
    test: int
    classifies: bool = True
    """Whether accuracy is measured; else a loss."""


FAMILIES: Final = {
    family.name: family
    for family in (
        Family(
            "minilm",
            minilm.zoo,
            minilm.calibration,
            {"count": 512, "batch": 32},
            validation=100,
            test=500,
        ),
        Family(
            "vision",
            vision.zoo,
            vision.calibration,
            {"count": 3500, "batch": 64},
            validation=200,
            test=1000,
        ),
        Family(
            "language",
            language.zoo,
            language.calibration,
            {"count": 256, "batch": 16},
            validation=16,
            test=64,
            classifies=False,
        ),
    )
}


@dataclass(frozen=True)
class Kept:
    """The share of the fine-tuned models' quality that is left.

    Of a classifier it is accuracy over the fine-tuned model's, of a language model the loss
    between base and fine-tuned model that is recovered.
    """

    tasks: dict[str, float]
    variances: dict[str, float]
    """Of each task's figure, over the test items, which both models saw."""
    divergence: float
    """Mean over the tasks: KL(fine-tuned || coded) or the loss above the fine-tuned, in nats."""

    @property
    def mean(self) -> float:
        """Over the tasks."""
        return mean(self.tasks.values())

    @property
    def worst(self) -> float:
        """The lowest of the tasks."""
        return min(self.tasks.values())

    @property
    def error(self) -> float:
        """Standard error of the mean, by the choice of test items."""
        return math.sqrt(sum(self.variances.values())) / len(self.variances)


class Judge:
    """Holds a zoo in memory and tests models against it.

    Parameters
    ----------
    family, cache
        The zoo and where it is kept; trained if it is not there.
    limit
        Test at most so many items a task, for a quick look.
    """

    def __init__(self, family: Family, cache: Path | None, limit: int | None = None) -> None:
        self.family, self.cache, self._limit = family, cache, limit
        self.zoo = family.zoo(cache)
        base = load_file(self.zoo.base / "model.safetensors")
        finetuned = {t: load_file(p / "model.safetensors") for t, p in self.zoo.tasks.items()}
        self.vectors: Vectors = Vectors.of(base, finetuned)
        shared = set(self.vectors.layout.names)
        self._own = {
            task: {name: tensor for name, tensor in state.items() if name not in shared}
            for task, state in finetuned.items()
        }
        self._references: dict[tuple[Split, str], tuple[Any, Any]] = {}
        self._base, self._finetuned = base, finetuned

    def judge(self, vectors: Mapping[str, Tensor], split: Split) -> Kept:
        """Test task vectors on the base."""
        states = (self.vectors.state(self._own[t], v) for t, v in vectors.items())
        return self.judge_states(dict(zip(vectors, states, strict=True)), split)

    def judge_states(self, states: Mapping[str, State], split: Split) -> Kept:
        """Test whole models."""
        tasks, variances, divergences = {}, {}, []
        for task, state in states.items():
            figure, variance, divergence = self._one(task, state, split)
            tasks[task], variances[task] = figure, variance
            divergences.append(divergence)
        return Kept(tasks, variances, mean(divergences))

    def _one(self, task: str, state: State, split: Split) -> tuple[float, float, float]:
        own, base = self._reference(split, task)
        if not self.family.classifies:
            found = self._losses(task, state, split)
            gap = float((base - own).mean())
            above = found - own
            figure = 1 - float(above.mean()) / gap
            return figure, float(above.var()) / len(above) / gap**2, float(above.mean())
        found, labels = self._predictions(task, state, split)
        right, own_right = ((scores.argmax(1) == labels).double() for scores in (found, own))
        accuracy = float(own_right.mean())
        variance = float((right - own_right).var()) / len(labels) / accuracy**2
        divergence = float((own.exp() * (own - found)).sum(1).mean())
        return float(right.mean()) / accuracy, variance, divergence

    def _reference(self, split: Split, task: str) -> tuple[Any, Any]:
        if (split, task) not in self._references:
            own = self._finetuned[task]
            self._references[split, task] = (
                (self._predictions(task, own, split)[0], None)
                if self.family.classifies
                else (self._losses(task, own, split), self._losses(task, self._base, split))
            )
        return self._references[split, task]

    def items(self, split: Split) -> int:
        """How many of a task are tested, if it has as many."""
        wanted = self.family.test if split == "test" else self.family.validation
        return wanted if self._limit is None else min(wanted, self._limit)

    def _predictions(self, task: str, state: State, split: Split) -> tuple[Tensor, Tensor]:
        limit = self.items(split)
        if self.family.name == "minilm":
            return minilm.predict(
                task, state, split=split, cache=self.cache, limit=limit, bfloat16=True
            )
        return vision.predict(task, state, split=split, cache=self.cache, limit=limit)

    def _losses(self, task: str, state: State, split: Split) -> Tensor:
        limit = self.items(split)
        return language.losses(task, state, split=split, cache=self.cache, limit=limit).double()


def relative_error(vectors: Vectors, coded: Mapping[str, Tensor]) -> float:
    """Return the mean over the tasks of ||tau^ - tau|| / ||tau||."""
    return mean(
        float((coded[task] - vector).norm() / vector.norm())
        for task, vector in vectors.tasks.items()
        if bool(torch.any(vector))
    )
