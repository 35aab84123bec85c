"""What a base or a task is made of, read from its document; without torch, so that `info` is quick.

`tallstore.loading` builds on this to read weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tallstore.catalog import Catalog
from tallstore.documents import (
    CODE,
    MAX_DOCUMENT,
    OWN,
    BaseDocument,
    Contents,
    ExternalReference,
    SegmentStats,
    TaskDocument,
)
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError, UnknownTaskError, WrongBaseError
from tallstore.specs import TensorSpec

__all__ = ["Description", "describe", "read_base"]

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Description:
    """The documents of the base and, where a task is described, of the task."""

    what: str
    """For messages: the store's path and the task."""
    base: BaseDocument
    task: TaskDocument | None

    @property
    def contents(self) -> Contents:
        """Of the task, or of the base where no task is described."""
        return (self.task or self.base).contents

    def segment_stats(self) -> Mapping[str, SegmentStats]:
        """What coding did to each coded tensor, by name."""
        if self.task is None:
            return {}
        by_segment = {stats.segment: stats for stats in self.task.stats}
        found: dict[str, SegmentStats] = {}
        for tensor in self.contents.tensors:
            for part in self.task.parts[tensor.segment]:
                if part.kind == CODE and part.segment in by_segment:
                    found[tensor.name] = by_segment[part.segment]
        return found

    @property
    def gain(self) -> float | None:
        """Of all coded tensors together; see `SegmentStats.gain`."""
        return None if self._whole is None else self._whole.gain

    @property
    def cosine(self) -> float | None:
        """Of all coded tensors together; see `SegmentStats.cosine`."""
        return None if self._whole is None else self._whole.cosine

    @property
    def _whole(self) -> SegmentStats | None:
        stats = () if self.task is None else self.task.stats
        if not stats or any(s.projection is None for s in stats):
            return None
        moved = math.fsum(s.moved**2 for s in stats)
        error = math.fsum((s.relative_error * s.moved) ** 2 for s in stats)
        projection = math.fsum(s.projection or 0.0 for s in stats)
        relative = math.sqrt(error / moved) if moved else 0.0
        return SegmentStats(0, 1.0, relative, math.sqrt(moved), projection)

    def kept(self, tensor: TensorSpec) -> str:
        """How a tensor is kept: ``"base"``, ``"coded"``, ``"own"``, ``"coded, own"`` if in parts.

        ``"base"`` stands for weights that are the base's, which cost a task nothing.
        """
        if self.task is None:
            return "base"
        kinds = {part.kind for part in self.task.parts[tensor.segment]}
        words = [word for kind, word in ((CODE, "coded"), (OWN, "own")) if kind in kinds]
        return ", ".join(words) or "base"

    def code_of(self, tensor: TensorSpec) -> str | None:
        """What codes a tensor, in a few words: ``"signs"``, ``"levels, 2 bits"``; None: nothing."""
        if self.task is None:
            return None
        coded = [p.segment for p in self.task.parts[tensor.segment] if p.kind == CODE]
        if not coded:
            return None
        if self.task.codings is None:
            arena = self.base.layout.places[coded[0]].arena
            masked = any(c.arena == arena and c.planes is not None for c in self.task.codes)
            return "mask" if masked else None
        found = self.task.codings.get(coded[0])
        return None if found is None else found.describe()


def describe(
    snapshot: Snapshot, catalog: Catalog, *, task: str | None, base: BaseDocument | None = None
) -> Description:
    """The documents of a task, or of the base where `task` is None.

    Parameters
    ----------
    base
        The base's document, if it was read already.

    Raises
    ------
    UnknownTaskError
        There is no such task; the message lists those there are.
    WrongBaseError, CorruptStoreError
        The store contradicts itself.
    """
    base = base or read_base(snapshot, catalog)
    if task is None:
        return Description(f"{snapshot.path}: base", base, None)
    what = f"{snapshot.path}: task {task!r}"
    record = catalog.tasks.get(task)
    if record is None:
        raise UnknownTaskError(_no_task(str(snapshot.path), task, list(catalog.tasks)))
    if catalog.base is not None and record.base != catalog.base.identity:
        raise WrongBaseError(
            f"{what}: written against base {record.base[:16]}..., the store's is "
            f"{catalog.base.identity[:16]}...; restore the store from a copy"
        )
    data = _document(snapshot, record.document, what)
    return Description(
        what, base, TaskDocument.from_bytes(data, base=base, plain=record.plain, what=what)
    )


def read_base(snapshot: Snapshot, catalog: Catalog) -> BaseDocument:
    """The base's document; raises CorruptStoreError where there is none."""
    if catalog.base is None:
        raise CorruptStoreError(f"{snapshot.path}: the store holds no base")
    what = f"{snapshot.path}: base"
    path, identity = catalog.base.external, catalog.base.identity
    data = _document(snapshot, catalog.base.document, what)
    external = None if path is None else ExternalReference(path, identity)
    return BaseDocument.from_bytes(data, external=external, what=what)


def _document(snapshot: Snapshot, number: int, what: str) -> bytes:
    record = snapshot.stream(number)
    if record.raw > MAX_DOCUMENT:
        raise CorruptStoreError(f"{what}: its document is over the size cap")
    data = np.empty(record.raw, np.uint8)
    snapshot.read(record, 0, data)
    return data.tobytes()


def _no_task(path: str, task: str, known: list[str]) -> str:
    if not known:
        return f"{path}: no task {task!r}; the store holds the base alone"
    shown = ", ".join(repr(name) for name in known[:_SHOWN])
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"{path}: no task {task!r}; there are {shown}{more}"
