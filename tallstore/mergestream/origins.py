"""What a merge starts from: which tasks, their masks, and where their vectors come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tallstore.catalog import Catalog
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import OptionError
from tallstore.merging import Average, Consensus, MergeRule, TaskArithmetic

__all__ = ["check_masks", "chosen_tasks", "origin", "over_shared", "remarks", "shared_divisor"]


def chosen_tasks(
    snapshot: Snapshot, catalog: Catalog, tasks: Sequence[str] | None
) -> tuple[str, ...]:
    """The tasks to merge, in order; all of the store's where none are named.

    Raises
    ------
    OptionError
        There are none, or one is named twice. Unknown names are refused where they are read.
    """
    if isinstance(tasks, str):
        raise OptionError(f"tasks={tasks!r}: a list of names, such as [{tasks!r}]")
    names = tuple(catalog.tasks if tasks is None else tasks)
    if not names:
        raise OptionError(f"{snapshot.path}: no tasks to merge; add some, or name them")
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise OptionError(f"tasks: {twice!r} is named twice")
    return names


def check_masks(snapshot: Snapshot, catalog: Catalog, tasks: Sequence[str], rule: str) -> None:
    """Refuse tasks without TALL masks for the store's vector, by name."""
    vector = catalog.vector
    bare = [task for task in tasks if catalog.tasks[task].code != "tall"]
    if bare or vector is None:
        raise OptionError(
            f"{snapshot.path}: {rule} counts TALL masks, and {_names(bare or tasks)} has none, "
            "being stored as an exact difference; pack the originals again, all together, or "
            "name other tasks"
        )
    other = [task for task in tasks if task not in vector.tasks]
    if other:
        raise OptionError(
            f"{snapshot.path}: the masks of {_names(other)} were made for another shared vector "
            f"than the store's, which is of {_names(vector.tasks)}; pack the originals again, all "
            "together, or name other tasks"
        )


def _names(tasks: Sequence[str]) -> str:
    return ", ".join(map(repr, tasks))


def _inner(rule: MergeRule) -> MergeRule:
    return rule.inner if isinstance(rule, Consensus) else rule


def shared_divisor(catalog: Catalog, tasks: Sequence[str], rule: MergeRule) -> int | None:
    """What to divide the stored shared vector by, to have what the rule merges; None: not that.

    Masks alone do not give task vectors back: each is the shared vector where its mask is 1, so
    that their sum counts a weight as often as tasks use it. Where no exact tier tells better, and
    the stored vector is the very one that the rule would merge of these tasks, it is taken.
    """
    vector = catalog.vector
    if vector is None or len(tasks) == 1 or set(vector.tasks) != set(tasks):
        return None
    if all(catalog.tasks[task].exact for task in tasks):
        return None
    inner = _inner(rule)
    if isinstance(inner, Average) and not inner.weights and vector.rule == "ta":
        return len(tasks)
    same = (inner.name, dict(inner.parameters())) == (vector.rule, dict(vector.parameters))
    return 1 if same else None


def over_shared(rule: MergeRule) -> MergeRule:
    """The rule where its vector is merged already: the sum of one row."""
    inner = _inner(rule)
    done = TaskArithmetic(name=inner.name, usual_alpha=inner.usual_alpha)
    return replace(rule, inner=done) if isinstance(rule, Consensus) else done


def origin(catalog: Catalog, tasks: Sequence[str], shared: int | None) -> str:
    """``"exact"``, ``"masks"``, ``"exact and masks"``, or ``"shared vector"``."""
    if shared is not None:
        return "shared vector"
    exact = [catalog.tasks[task].exact for task in tasks]
    return "exact" if all(exact) else "exact and masks" if any(exact) else "masks"


def remarks(
    catalog: Catalog, tasks: Sequence[str], rule: MergeRule, shared: int | None
) -> list[str]:
    """What whoever merges should know."""
    found = []
    vector = catalog.vector
    lossy = [task for task in tasks if not catalog.tasks[task].exact]
    if shared is not None and vector is not None:
        found.append(
            f"merged from the stored shared vector ({vector.rule}, {vector.dtype}): masks alone "
            "do not give task vectors back"
        )
    elif lossy:
        found.append(
            f"task vectors of {', '.join(lossy)} come from masks alone, which are lossy; pack "
            "with exact=True (--exact) to merge from the originals"
        )
    if isinstance(rule, Consensus):
        if vector is not None and vector.rule != rule.inner.name:
            found.append(
                f"the masks were made for a vector of {vector.rule}; the paper makes them for "
                f"that of {rule.inner.name}"
            )
        if rule.k > len(tasks):
            found.append(f"k {rule.k} of {len(tasks)} tasks: the merge is the base")
    return found
