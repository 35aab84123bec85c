"""Cosines between the task vectors of a store, decoded span by span."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from tallstore.catalog import VectorRecord
from tallstore.coding import to_float32
from tallstore.decoding import Decoder
from tallstore.documents import BaseDocument, TaskDocument
from tallstore.dtypes import itemsize
from tallstore.engine.snapshot import Snapshot
from tallstore.mask_statistics.results import Matrix
from tallstore.scratch import Scratch
from tallstore.workers import Workers

__all__ = ["cosines"]

#: Weights of each task that are multiplied at once, widened to float64.
_PIECE: Final = 1 << 14


class _TaskVectors:
    """Decodes spans of the task vectors of several tasks. Thread-safe."""

    def __init__(
        self,
        snapshot: Snapshot,
        base: BaseDocument,
        vector: VectorRecord | None,
        tasks: Sequence[TaskDocument],
        *,
        exact: bool,
    ) -> None:
        self._base = base
        self._tasks = tasks
        self._scratch: Final = Scratch()
        self._decoders = [
            Decoder(snapshot, base, task=task, vector=vector, exact=exact, scratch=self._scratch)
            for task in tasks
        ]

    def span(self, arena: int, span: int) -> npt.NDArray[np.float32]:
        """Shape (T, weights): finetuned - base; 0 where a task codes nothing, and in padding."""
        record = self._base.layout.arenas[arena]
        count = min(record.span, record.weights - span * record.span)
        room = self._scratch.take("task vectors", 4 * count * len(self._tasks))
        rows = room.view(np.float32).reshape(len(self._tasks), count)
        rows.fill(0)
        key = False, arena, span
        for row, decoder, task in zip(rows, self._decoders, self._tasks, strict=True):
            runs = [run for run in decoder.runs(key) if run.coded]
            if not runs:
                continue
            dtype = next(code.dtype for code in task.codes if code.arena == arena)
            width = itemsize(dtype)
            whole = self._scratch.take("finetuned", count * width)
            outs = [whole[run.within * width : (run.within + run.count) * width] for run in runs]
            data = decoder.load(key)
            decoder.decode(data, key, list(zip(runs, outs, strict=True)))
            base = to_float32(data.base, record.dtype)
            for run, out in zip(runs, outs, strict=True):
                at = slice(run.within, run.within + run.count)
                np.subtract(to_float32(out, dtype), base[at], out=row[at])
            data.release()
        return rows


def _products(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Scalar products of all pairs of rows, in float64, piece after piece."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
    for start in range(0, rows.shape[1], _PIECE):
        # torch: on a worker it keeps to one thread, so that sums always go in one order.
        piece = torch.from_numpy(rows[:, start : start + _PIECE]).to(torch.float64)
        total.addmm_(piece, piece.T)
    found: npt.NDArray[Any] = total.numpy()
    return found


def cosines(
    snapshot: Snapshot,
    base: BaseDocument,
    vector: VectorRecord | None,
    tasks: Sequence[TaskDocument],
    spans: Sequence[tuple[int, int]],
    *,
    exact: bool,
    workers: Workers,
    progress: Callable[[int], None],
) -> Matrix:
    """Cosines between the task vectors over the weights of some spans.

    Scalar products are summed in float64, in the order of the spans, whichever thread is first.
    Memory: float32 weights of one span of every task, a thread.

    Parameters
    ----------
    exact
        Take the residuals in; else what masks alone reconstruct.
    progress
        Called with the bytes of task vectors dealt with.

    Returns
    -------
    Matrix
        Symmetric; None where a task's vector is zero.
    """
    vectors = _TaskVectors(snapshot, base, vector, tasks, exact=exact)

    def work(item: tuple[int, int]) -> npt.NDArray[np.float64]:
        rows = vectors.span(*item)
        found = _products(rows)
        progress(rows.nbytes)
        return found

    total = np.zeros((len(tasks), len(tasks)))
    for found in workers.each(work, spans):
        total += found
    squares = np.diagonal(total)
    # One root of both, so that the cosine of a vector with itself is 1 to the bit.
    return tuple(
        tuple(
            float(total[min(i, j), max(i, j)] / np.sqrt(one * other)) if one and other else None
            for j, other in enumerate(squares)
        )
        for i, one in enumerate(squares)
    )
