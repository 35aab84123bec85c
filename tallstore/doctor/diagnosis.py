"""What was found, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Diagnosis", "Facts", "Problem", "Section"]

#: Values by name, as JSON has them.
Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be."""

    what: str
    cure: str
    serious: bool = True
    """Whether something does not work; else it is good to know."""


@dataclass(frozen=True, slots=True)
class Section:
    """What was found of one thing."""

    facts: Facts
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found."""

    sections: Mapping[str, Section] = field(default_factory=dict)
    """By name: programs, gpu, machine, place, and store where one was named."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All of them, serious ones first."""
        found = [problem for section in self.sections.values() for problem in section.problems]
        return tuple(sorted(found, key=lambda problem: not problem.serious))

    @property
    def ok(self) -> bool:
        """Whether everything works."""
        return not any(problem.serious for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """As `tallstore doctor --json` prints it."""
        return {
            "ok": self.ok,
            **{name: dict(section.facts) for name, section in self.sections.items()},
            "problems": [
                {"what": p.what, "cure": p.cure, "serious": p.serious} for p in self.problems
            ],
        }
