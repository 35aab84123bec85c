"""Train the tasks of a zoo side by side, a process and a core each.

Small models gain little from a second thread and lose much where another program takes its core
for a moment, since every operation then waits for the slower half.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path


def in_processes(
    make: Callable[[str, Path], Path],
    names: Sequence[str],
    root: Path,
    *,
    made: Callable[[str, Path], bool],
    jobs: int | None,
) -> Iterator[tuple[str, Path]]:
    """Yield each name with ``make(name, root)``, in the order of the names, as soon as it is there.

    Parameters
    ----------
    make
        A function of a module, so that another process finds it.
    names, root
        What it is called with.
    made
        Whether ``make`` will find everything there; if it does for all, no process is started.
    jobs
        Processes; as many as this one may use cores if not given.
    """
    if all(made(name, root) for name in names):
        yield from ((name, make(name, root)) for name in names)
        return
    workers = len(os.sched_getaffinity(0)) if jobs is None else jobs
    # Not forked: PyTorch's threads do not live through a fork.
    with ProcessPoolExecutor(min(workers, len(names)), get_context("spawn")) as pool:
        yield from zip(names, pool.map(make, names, [root] * len(names)), strict=True)
