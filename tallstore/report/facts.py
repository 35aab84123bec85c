"""What a report tells of a store, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from tallstore.catalog import TaskRecord
from tallstore.mask_statistics import MaskStatistics
from tallstore.progress import Report
from tallstore.store import TallStore
from tallstore.wording import plural

__all__ = ["ReportFacts", "TaskFacts", "gather"]


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """One task."""

    name: str
    record: TaskRecord
    stored: int
    """Bytes in the store, the shared vector apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts:
    """A store. Nothing here depends on where it lies, nor on when it is looked at."""

    name: str
    """Of the file."""
    written_by: str
    created: str
    identity: str
    """Of the base."""
    weights: int
    """Of the base."""
    external: str
    """Name of the store that has the base, where that is another one; else empty."""
    base_original: int
    """0 where the base is in another store."""
    base_stored: int
    vector_stored: int
    vector_about: str
    """How the shared vector was made; empty where there is none."""
    file: int
    """Bytes of the whole file."""
    tasks: tuple[TaskFacts, ...]
    statistics: MaskStatistics | None
    """None where no task has masks."""

    @property
    def originals(self) -> int:
        """Bytes of all checkpoints in it as they came."""
        return self.base_original + sum(task.record.nbytes for task in self.tasks)


def gather(store: TallStore, *, cosine: bool, report: Report | None) -> ReportFacts:
    """Read it all from a store, and count its masks."""
    base, vector, elsewhere = store.base, store.vector, store.external_base
    tasks = store.tasks
    masked = any(record.code == "tall" for record in tasks.values())
    about = ""
    if vector is not None:
        about = f"{vector.rule}, {vector.dtype}, merged from {plural(len(vector.tasks), 'task')}"
    return ReportFacts(
        name=store.path.name,
        written_by=store.written_by,
        created=base.created,
        identity=base.identity,
        weights=base.weights,
        external="" if elsewhere is None else elsewhere.name,
        base_original=base.nbytes if elsewhere is None else 0,
        base_stored=store.stored_bytes(),
        vector_stored=store.vector_bytes(),
        vector_about=about,
        file=store.file_bytes()[1],
        tasks=tuple(
            TaskFacts(name, record, store.stored_bytes(name)) for name, record in tasks.items()
        ),
        statistics=store.statistics(cosine=cosine, report=report) if masked else None,
    )
