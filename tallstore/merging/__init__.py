"""Merge rules: how task vectors become one vector. One small file a rule.

`pack` merges the shared vector with them, and `merge` a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from tallstore.errors import OptionError
from tallstore.merging.average import Average
from tallstore.merging.breadcrumbs import Breadcrumbs, breadcrumbs_rows
from tallstore.merging.consensus import Consensus, consensus_ta, consensus_ties
from tallstore.merging.dare import Dare, dare_ta, dare_ties
from tallstore.merging.profile import Profile
from tallstore.merging.rule import Floats, MergeRule, Scope, Stretch
from tallstore.merging.sce import Sce
from tallstore.merging.task_arithmetic import TaskArithmetic
from tallstore.merging.ties import Ties
from tallstore.merging.varm import Varm

__all__ = [
    "RULES",
    "Average",
    "Breadcrumbs",
    "Consensus",
    "Dare",
    "Floats",
    "MergeRule",
    "Profile",
    "Recipe",
    "Sce",
    "Scope",
    "Stretch",
    "TaskArithmetic",
    "Ties",
    "Varm",
    "merge_rule",
]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a rule of a name is made."""

    make: Callable[..., MergeRule]
    options: tuple[str, ...] = ()
    """What `make` takes, all of it optional."""


def ties_mean(*, keep: float = 0.2) -> Ties:
    """TIES with a disjoint mean."""
    return Ties(keep=keep, combine="mean", name="ties-mean")


#: Every rule by its name. Static: a new rule is a file and a line here.
RULES: Final = MappingProxyType[str, Recipe](
    {
        "ta": Recipe(TaskArithmetic),
        "average": Recipe(Average, ("weights",)),
        "ties": Recipe(Ties, ("keep",)),
        "ties-mean": Recipe(ties_mean, ("keep",)),
        "consensus-ta": Recipe(consensus_ta, ("k",)),
        "consensus-ties": Recipe(consensus_ties, ("k", "keep")),
        "breadcrumbs": Recipe(Breadcrumbs, ("beta", "gamma")),
        "breadcrumbs-rows": Recipe(breadcrumbs_rows, ("beta", "gamma")),
        "varm": Recipe(Varm),
        "sce": Recipe(Sce, ("select",)),
        "dare": Recipe(dare_ta, ("drop", "seed")),
        "dare-ties": Recipe(dare_ties, ("drop", "seed", "keep")),
    }
)


def merge_rule(rule: str | MergeRule, **options: Any) -> MergeRule:
    """The rule called `rule`; a rule passes through.

    Parameters
    ----------
    rule
        A name in `RULES`, or a rule.
    options
        For a name, what to give its recipe; what is None is left at its default.

    Raises
    ------
    OptionError
        There is no rule of that name, or it does not take an option, or not that value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not isinstance(rule, str):
        if given:
            raise OptionError(
                f"{', '.join(given)}: goes with a rule's name; this rule is made already"
            )
        return rule
    if rule not in RULES:
        raise OptionError(f"no merge rule is called {rule!r}; there are {', '.join(RULES)}")
    recipe = RULES[rule]
    for name in given:
        if name not in recipe.options:
            takers = ", ".join(other for other in RULES if name in RULES[other].options)
            raise OptionError(
                f"rule {rule!r} takes no {name}; it takes {', '.join(recipe.options) or 'nothing'}"
                f"{f', and {name} goes with {takers}' if takers else ''}"
            )
    return recipe.make(**given)
