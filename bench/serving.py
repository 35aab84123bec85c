"""How fast a task is live: switched in place, beside reloading its checkpoint; one run.

``python -m bench.serving [--cache DIR] [--zoo DIR] [--code CODE ...] [--processes N]``. The MiniLM
zoo in float32, warm files. A switch with resident codes against ``safetensors`` +
``load_state_dict`` and ``torch.load`` + ``load_state_dict`` of the same task into a model that is
there already, by turns. A turn is twice through all the tasks, of which the second time counts:
then all is warm, for each of them alike. What is switched to is checked first, to the bit. Where
its memory lies is another matter in each process: the row is that of the median one, and tells the
others' ratios.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import tallstore
from bench.numbaless import without_numba
from bench.rows import write
from bench.timing import by_turns
from bench.zoos.minilm import Zoo, classifier, zoo
from tallstore.serving import TaskSwitcher

CODES: Mapping[str, dict[str, Any]] = {
    "tall": {"code": "tall"},
    "signs": {"code": "signs"},
    "signs 2 %": {"code": "signs", "density": 0.02},
    "seeded": {"code": "seeded"},
    "auto": {"code": "auto", "bits_per_weight": 0.15},
}
MINE = ("switch", "switch without numba")
RIVALS = ("safetensors + load_state_dict", "torch.load + load_state_dict")


def _check(switcher: TaskSwitcher, store: Path) -> None:
    for task in switcher.tasks:
        switcher.switch(task)
        wanted = tallstore.load(store, task=task)
        found = switcher.model.state_dict()
        if not all(torch.equal(found[name], tensor) for name, tensor in wanted.items()):
            raise SystemExit(f"{task}: switching gives other weights than loading")


def _switching(switcher: TaskSwitcher, within: Callable[[], Any]) -> Callable[[], None]:
    """Switch to one task after the other."""
    turn = itertools.cycle(switcher.tasks)

    def switch() -> None:
        with within():
            switcher.switch(next(turn))

    return switch


def _reloading(
    states: dict[str, Path], base: Path, suffix: str, read: Callable[[Path], Any]
) -> Callable[[], None]:
    """Reload one task after the other, each into a model of its own that is there."""
    models = {
        task: classifier(load_file(path / "model.safetensors"), base)
        for task, path in states.items()
    }
    turn = itertools.cycle(states)

    def reload() -> None:
        task = next(turn)
        models[task].load_state_dict(read(states[task] / f"model.{suffix}"))

    return reload


def measure(found: Zoo, code: str, folder: Path) -> dict[str, Any]:
    """The row of one code."""
    store = folder / "zoo.tall"
    originals = {}
    for task, path in found.tasks.items():
        originals[task] = folder / task
        originals[task].mkdir(exist_ok=True)
        state = load_file(path / "model.safetensors")
        torch.save(state, originals[task] / "model.pt")
        target = originals[task] / "model.safetensors"
        target.unlink(missing_ok=True)
        target.symlink_to(path / "model.safetensors")
    first = next(iter(found.tasks.values())) / "model.safetensors"
    with ExitStack() as stack:
        switches = []
        for within in (nullcontext, without_numba):
            with within():
                model = classifier(load_file(first), found.base)
                switcher = stack.enter_context(TaskSwitcher(model, store))
                _check(switcher, store)
            switches.append(_switching(switcher, within))
        times = by_turns(
            {
                **dict(zip(MINE, switches, strict=True)),
                RIVALS[0]: _reloading(originals, found.base, "safetensors", load_file),
                RIVALS[1]: _reloading(originals, found.base, "pt", torch.load),
            },
            repeats=7,
            # Right after another's models the caches hold those.
            burst=2 * len(found.tasks),
            before=len(found.tasks),
        )
        need = switcher.need()
    mine = times["switch"]["median"]
    rival = min(times[name]["median"] for name in RIVALS)
    for name, spent in times.items():
        warm, first = (spent[key] * 1e3 for key in ("median", "first"))
        print(f"{code:<10}{name:<34}{warm:>9.1f} ms, first of a burst {first:.1f} ms", flush=True)
    print(f"{'':<10}{rival / mine:.1f} times faster than the faster of the two", flush=True)
    return {
        "what": "switch",
        "code": code,
        "seconds": times,
        "faster": rival / mine,
        "tasks": len(found.tasks),
        "base_bytes": need.base,
        "vector_bytes": need.vector,
        "codes_bytes": need.codes,
    }


def _of_processes(found: Zoo, code: str, folder: Path, count: int) -> dict[str, Any]:
    """The row of the median of some processes, one after the other."""
    tallstore.pack(folder / "zoo.tall", found.base, found.tasks, **CODES[code])
    rows = []
    for _ in range(count):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            rows.append(alone.submit(measure, found, code, folder).result())
    rows.sort(key=lambda row: row["faster"])
    return {**rows[len(rows) // 2], "of_processes": [row["faster"] for row in rows]}


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    parser.add_argument("--code", nargs="+", choices=CODES, default=list(CODES))
    parser.add_argument("--processes", type=int, default=3, help="processes that measure a code")
    args = parser.parse_args()
    found = Zoo.at(args.zoo) if args.zoo else zoo(args.cache)
    rows: list[dict[str, Any]] = []
    for code in args.code:
        with tempfile.TemporaryDirectory(dir=args.cache) as name:
            rows.append(_of_processes(found, code, Path(name), args.processes))
    print(write("serving", rows))


if __name__ == "__main__":
    main()
