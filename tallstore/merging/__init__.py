"""Merge rules: how task vectors become the one shared vector. One small file a rule."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Final

from tallstore.errors import OptionError
from tallstore.merging.rule import Floats, MergeRule
from tallstore.merging.task_arithmetic import TaskArithmetic
from tallstore.merging.ties import Ties

__all__ = ["RULES", "Floats", "MergeRule", "TaskArithmetic", "Ties", "merge_rule"]

#: Every rule by its name. Static: a new rule is a file and a line here.
RULES: Final = MappingProxyType[str, Callable[[], MergeRule]]({"ta": TaskArithmetic, "ties": Ties})


def merge_rule(rule: str | MergeRule) -> MergeRule:
    """The rule called `rule`, with its defaults; a rule passes through.

    Raises
    ------
    OptionError
        There is no rule of that name.
    """
    if not isinstance(rule, str):
        return rule
    try:
        return RULES[rule]()
    except KeyError:
        raise OptionError(
            f"no merge rule is called {rule!r}; there are {', '.join(RULES)}"
        ) from None
