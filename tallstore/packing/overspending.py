"""What to say where codes take more than the budget that they were chosen for."""

from __future__ import annotations

from typing import Final

from tallstore.catalog import Catalog
from tallstore.describing import describe
from tallstore.engine.snapshot import Snapshot

__all__ = ["overspent"]

#: By how much of the budget.
_MUCH: Final = 0.1


def overspent(snapshot: Snapshot, catalog: Catalog, budget: float) -> str | None:
    """A remark on the task that takes most, if that is much more than was asked for.

    A budget is of codes, as they are foreseen: what a table of symbols takes is not, nor is the
    document, which tells the levels of every tensor.

    Parameters
    ----------
    budget
        Bits a weight.
    """
    most: tuple[float, str, float] | None = None
    for name, record in catalog.tasks.items():
        task = describe(snapshot, catalog, task=name).task
        if task is None or not record.coded:
            continue
        streams = {n for code in task.codes for n in code.streams if n != code.exact}
        codes, document = (
            8 * sum(snapshot.stream(n).stored for n in some) / record.coded
            for some in (streams, {record.document})
        )
        most = max(most or (0.0, "", 0.0), (codes + document, name, document))
    if most is None or most[0] <= (1 + _MUCH) * budget:
        return None
    bits, name, document = most
    return (
        f"{name}: codes take {bits - document:.3g} bits a weight where {budget:g} was asked for, "
        f"and {document:.3g} more for the levels of its tensors, which no budget counts; of small "
        "tensors, and small models, that is much. Ask for less where the sum is to be met"
    )
