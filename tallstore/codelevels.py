"""The levels of a task's codes, as reconstruction takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tallstore.codes import TALL_LEVELS, ArenaCode, level_rows
from tallstore.documents import CODE, TaskDocument
from tallstore.spancodes import code_bits

__all__ = ["Levels", "levels_of"]


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of the codes over an arena."""

    table: torch.Tensor
    """float32, shape (R, 2**K)."""
    rows: Mapping[int, int] | None
    """The row of each of the base's segments; None: row 0 everywhere."""

    def row(self, segment: int) -> int:
        """The row of a segment; row 0 of one without codes, which has no levels to apply."""
        return 0 if self.rows is None else self.rows.get(segment, 0)


def levels_of(code: ArenaCode, task: TaskDocument) -> Levels:
    """The levels of a task's codes over an arena."""
    if task.codings is None:
        return Levels(torch.tensor([TALL_LEVELS], dtype=torch.float32, device="cpu"), None)
    planes = code_bits(code)
    rows, table = level_rows(task.codings, planes)
    # What the exact tier alone makes good: without it, the base.
    bare = {p.segment for parts in task.parts for p in parts if p.kind == CODE} - rows.keys()
    if bare:
        rows.update(dict.fromkeys(bare, len(table)))
        table.append([-0.0] * (1 << planes))
    return Levels(torch.tensor(table, dtype=torch.float32, device="cpu"), rows)
