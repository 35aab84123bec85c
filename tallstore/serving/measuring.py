"""How long switching takes on a user's own zoo."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from tallstore.progress import Meter, Report
from tallstore.serving.results import Need, Residency, Switch
from tallstore.serving.skeleton import skeleton
from tallstore.serving.switcher import TaskSwitcher
from tallstore.store import TallStore

__all__ = ["Measured", "SwitchTimes", "measure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchTimes:
    """Times of one task, in milliseconds."""

    task: str
    first: float
    """The first switch to it."""
    switch: float
    """Median of the others."""
    slowest: float
    load: float
    """Median of `tallstore.load` to the same device, which makes new tensors."""
    hits: int
    """Of `repeats` switches, those that found the code on the device."""
    moved: int
    """Bytes of memory that a switch reads and writes; the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What `measure` found."""

    device: str
    resident: Residency
    repeats: int
    need: Need
    tasks: tuple[SwitchTimes, ...]


def measure(
    store: TallStore,
    *,
    tasks: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    resident: Residency = "all",
    budget: int | None = None,
    fidelity: str | None = None,
    repeats: int = 7,
    report: Report | None = None,
) -> Measured:
    """Switch a module with the tasks' tensors between them by turns, and load each beside it.

    Parameters
    ----------
    tasks, device, resident, budget, fidelity
        See `TaskSwitcher`.
    repeats
        Switches to each task after the first.
    report
        Told of progress.

    Raises
    ------
    TallstoreError
        As `TaskSwitcher` and `TallStore.load` do.
    """
    names = tuple(store.tasks) if tasks is None else tuple(tasks)
    model = skeleton(store, names[0], device=device) if names else torch.nn.Module()
    found: dict[str, list[Switch]] = defaultdict(list)
    loads: dict[str, list[float]] = defaultdict(list)
    with TaskSwitcher(
        model, store, tasks=tasks, resident=resident, budget=budget, fidelity=fidelity
    ) as switcher:
        sizes = {task: store.tasks[task].nbytes for task in switcher.tasks}
        progress = Meter(report).stage("switch", (repeats + 1) * sum(sizes.values()))
        for turn in range(repeats + 1):
            for task in switcher.tasks:
                found[task].append(switcher.switch(task, rewrite=len(switcher.tasks) == 1))
                if turn:
                    began = time.perf_counter()
                    store.load(task, device=device, fidelity=fidelity)
                    loads[task].append((time.perf_counter() - began) * 1e3)
                progress(sizes[task])
        return Measured(
            device=str(switcher.device),
            resident=resident,
            repeats=repeats,
            need=switcher.need(),
            tasks=tuple(_times(task, found[task], loads[task]) for task in switcher.tasks),
        )


def _times(task: str, switches: list[Switch], loads: list[float]) -> SwitchTimes:
    first, *others = switches
    return SwitchTimes(
        task=task,
        first=first.ms,
        switch=median(done.ms for done in others),
        slowest=max(done.ms for done in others),
        load=median(loads),
        hits=sum(done.hit for done in others),
        moved=int(median(done.moved for done in others)),
    )
