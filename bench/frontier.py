"""The frontier: what every code keeps of real fine-tunes, at honestly counted bits.

``python -m bench.frontier [--zoos NAME ...] [--cache DIR]`` trains the zoos that are not there,
runs every entrant of `bench.entrants` on each, and writes ``bench/results/frontier-ZOO.json``,
the README's table and ``bench/results/frontier.svg``. ``--plot`` makes table and picture from the
files alone; ``--codes`` and ``--settings`` run some again and keep the rows of the others.

Choices a paper leaves to validation are made on validation items, by what is kept; what is
reported is measured on test items, once. Codes that take a seed run with three. Bits are those of
one weight and task, with what all tasks share divided among them; the base, and what a task has of
its own (heads), are counted for nobody. "Calibrated": biases are corrected with a few training
inputs of each task, without labels (128 images, 64 texts, 32 windows); "distilled": values are
trained for 100 steps on more of them (all training images, 512 texts, 256 windows). All else sees
no data but for those choices. ``error`` is the standard error of the mean over the tasks: by the
choice of test items, and by the seed where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch

from bench.entrants import Entrant, entrants
from bench.frontierview import plot, table
from bench.judging import FAMILIES, Judge, Kept, relative_error
from bench.rivals.vectors import Coded
from bench.rows import RESULTS, context, write


def _made(judge: Judge, entrant: Entrant, seed: int, value: float | None) -> Coded:
    given: dict[str, Any] = {"seed": seed} if entrant.random else {}
    if entrant.calibrated:
        some = judge.family.pupil if entrant.distilled else {}
        given["calibrate"] = partial(judge.family.calibration, cache=judge.cache, **some)
    if value is not None:
        given[entrant.chosen] = value
    return entrant.make(judge.vectors, **given)


def _chosen(judge: Judge, entrant: Entrant) -> float | None:
    """Return the value that keeps most on validation; of equals the first."""
    kept = {
        value: judge.judge(_made(judge, entrant, 0, value).vectors, "validation").mean
        for value in entrant.values
    }
    return max(kept, key=lambda value: kept[value]) if kept else None


def _row(judge: Judge, entrant: Entrant, seeds: Sequence[int]) -> dict[str, Any]:
    value = _chosen(judge, entrant)
    found: list[tuple[Coded, Kept]] = []
    for seed in seeds if entrant.random else (0,):
        coded = _made(judge, entrant, seed, value)
        found.append((coded, judge.judge(coded.vectors, "test")))
        error = relative_error(judge.vectors, coded.vectors)
    kept = [k.mean for _, k in found]
    by_items = mean(k.error**2 for _, k in found)
    by_seed = variance(kept) / len(kept) if len(kept) > 1 else 0.0
    tasks = {t: mean(k.tasks[t] for _, k in found) for t in found[0][1].tasks}
    return {
        "zoo": judge.family.name,
        "code": entrant.name,
        "setting": entrant.setting,
        "chosen": {entrant.chosen: value} if value is not None else {},
        "bits": mean(c.bits for c, _ in found),
        "kept_mean": mean(kept),
        "error": math.sqrt(by_items + by_seed),
        "kept_worst": mean(k.worst for _, k in found),
        "divergence": mean(k.divergence for _, k in found),
        "relative_error": error,
        "seeds": len(found),
        "kept": tasks,
    }


def run(
    name: str, cache: Path | None, seeds: Sequence[int], limit: int | None, some: Sequence[Entrant]
) -> list[Any]:
    """Run codes on one zoo, printing each row as soon as it is known."""
    judge = Judge(FAMILIES[name], cache, limit)
    commit = context()["commit"]
    rows = []
    for entrant in some:
        rows.append({**_row(judge, entrant, seeds), "commit": commit})
        print(
            "{zoo:<9} {code:<18} {setting:<20} {bits:7.4f} bits {kept_mean:8.2%} ± {error:.2%} "
            "worst {kept_worst:8.2%} divergence {divergence:.5f}".format(**rows[-1]),
            flush=True,
        )
    facts = {
        "tasks": list(judge.zoo.tasks),
        "weights": judge.vectors.layout.weights,
        "test_items_a_task": judge.items("test"),
        "validation_items_a_task": judge.items("validation"),
    }
    return [facts, *rows]


def _rows_of_others(path: Path, some: Sequence[Entrant]) -> list[Any]:
    """Read what a file has of codes that do not run this time."""
    if not path.exists():
        return []
    mine = {(entrant.name, entrant.setting) for entrant in some}
    rows = json.loads(path.read_text())["rows"][1:]
    return [row for row in rows if (row["code"], row["setting"]) not in mine]


def _ordered(rows: Sequence[Any]) -> list[Any]:
    """Rows in the order of the entrants, whenever they were made."""
    order = [(entrant.name, entrant.setting) for entrant in entrants()]
    return sorted(rows, key=lambda row: order.index((row["code"], row["setting"])))


def main() -> None:
    """Measure, print the table, write rows and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--zoos", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    known = list(dict.fromkeys(entrant.name for entrant in entrants()))
    parser.add_argument("--codes", nargs="+", choices=known, default=known, help="run these alone")
    settings = list(dict.fromkeys(entrant.setting for entrant in entrants()))
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="test items a task at most, for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw what there is")
    args = parser.parse_args()
    if not args.plot:
        torch.set_num_threads(args.threads)
        some = [e for e in entrants() if e.name in args.codes and e.setting in args.settings]
        for name in args.zoos:
            facts, *rows = run(name, args.cache, args.seeds, args.limit, some)
            rows += _rows_of_others(args.results / f"frontier-{name}.json", some)
            rows = [facts, *_ordered(rows)]
            print(write(f"frontier-{name}", rows, results=args.results), flush=True)
    files = (args.results / f"frontier-{name}.json" for name in FAMILIES)
    there = [p for p in files if p.exists()]
    found = {p.stem: _ordered(json.loads(p.read_text())["rows"][1:]) for p in there}
    print(table(_ordered([row for rows in found.values() for row in rows])))
    plot(found, args.results / "frontier.svg")


if __name__ == "__main__":
    main()
