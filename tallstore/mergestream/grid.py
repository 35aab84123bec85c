"""Choosing alpha, and k, by the caller's evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from tallstore.errors import OptionError, TallstoreError

__all__ = ["ALPHAS", "KS", "EvaluateMerge", "check_alphas", "check_ks", "score_of"]

#: What is tried where nobody says: the grid of arXiv 2405.07813.
ALPHAS: Final = tuple(n / 10 for n in range(1, 11))
#: Numbers of tasks that are tried for Consensus Merging, as far as there are so many.
KS: Final = (1, 2, 3)

#: ``evaluate(state_dict) -> score``, higher is better.
EvaluateMerge = Callable[[Any], float]


def check_alphas(
    value: float | Sequence[float] | None, *, usual: float, evaluate: bool
) -> tuple[float, ...]:
    """The alphas to try, ascending.

    Raises
    ------
    OptionError
        One is no finite number above 0, or there are several and nothing to choose by.
    """
    if value is None:
        return ALPHAS if evaluate else (usual,)
    given = (value,) if isinstance(value, (int, float)) else tuple(value)
    numbers = all(
        isinstance(g, (int, float)) and not isinstance(g, bool) and math.isfinite(g) and g > 0
        for g in given
    )
    if not given or not numbers:
        raise OptionError(
            f"alpha={value!r}: finite numbers above 0, such as 0.1 .. 1.0; 0 would be the base"
        )
    if len(given) > 1 and not evaluate:
        raise OptionError(f"alpha={value!r}: choosing one of several takes evaluate(state_dict)")
    return tuple(sorted({float(g) for g in given}))


def check_ks(
    value: int | Sequence[int] | None, *, evaluate: bool, tasks: int
) -> tuple[int | None, ...]:
    """The k to try, in order; None stands for the rule's own.

    Raises
    ------
    OptionError
        There are several and nothing to choose by; that each makes sense, the rule checks.
    """
    if value is None:
        return tuple(k for k in KS if k <= tasks) if evaluate else (None,)
    given = tuple(value) if isinstance(value, Sequence) else (value,)
    if not given:
        raise OptionError(f"k={value!r}: at least one number of tasks, such as 2")
    if len(given) > 1 and not evaluate:
        raise OptionError(f"k={value!r}: choosing one of several takes evaluate(state_dict)")
    return tuple(dict.fromkeys(given))


def score_of(evaluate: EvaluateMerge, state: Any, what: str) -> float:
    """What the caller says of a merge; raises OptionError if that is no number."""
    try:
        score = float(evaluate(state))
    except TallstoreError:
        raise
    except Exception as exc:
        raise OptionError(f"evaluate(...) failed at {what}: {type(exc).__name__}: {exc}") from exc
    if math.isnan(score):
        raise OptionError(f"evaluate(...) gave NaN at {what}; give a number")
    return score
