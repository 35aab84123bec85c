"""How fast tasks are coded and loaded, by code, on real fine-tunes.

``python -m bench.coding [--cache DIR] [--zoo DIR]``. Packing the MiniLM zoo (8 tasks of 22.7 M
weights, float32, warm files) in weights x tasks a second, surveys and merging included; then
loading one task beside ``torch.load`` of its original, by turns. What is loaded is checked against
the error that the store records.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

import tallstore
from bench.rows import write
from bench.timing import by_turns
from bench.zoos.minilm import Zoo, zoo

CODES: tuple[dict[str, Any], ...] = (
    {"code": "tall"},
    {"code": "signs", "density": 0.02},
    {"code": "signs", "density": 0.05},
    {"code": "seeded", "density": 0.1, "bits": 2},
    {"code": "auto", "bits_per_weight": 0.15},
    {"code": "levels", "bits": 1},
    {"code": "levels", "bits": 2},
    {"code": "levels", "bits": 2, "over": "shared"},
    {"code": "levels", "bits": 4},
)
REPEATS = 3


def _check(store: Path, task: str, base: Path, original: Path) -> None:
    """What is loaded errs as the store says."""
    found = tallstore.load(store, task=task)
    start, actual = load_file(base), load_file(original)
    error = moved = 0.0
    for name, first in start.items():
        if first.is_floating_point():
            error += float((found[name] - actual[name]).double().square().sum())
            moved += float((first - actual[name]).double().square().sum())
    with tallstore.open(store) as opened:
        recorded = opened.tasks[task].relative_error
    assert recorded is not None
    assert math.isclose(math.sqrt(error / moved), recorded, rel_tol=1e-3), (error, moved, recorded)


def measure(found: Zoo, options: dict[str, Any], folder: Path) -> Any:
    """Pack the zoo, load one task; a row."""
    store, pickle = folder / "zoo.tall", folder / "original.pt"
    base = found.base / "model.safetensors"
    tasks = {name: path / "model.safetensors" for name, path in found.tasks.items()}
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        tallstore.pack(store, base, tasks, overwrite=True, **options)
        seconds.append(time.perf_counter() - began)
    task = next(iter(tasks))
    _check(store, task, base, tasks[task])
    torch.save(load_file(tasks[task]), pickle)
    with tallstore.open(store) as opened:
        weights = sum(record.weights for record in opened.tasks.values())
        bits = 8 * sum(map(opened.stored_bytes, tasks)) / weights
        times = by_turns(
            {
                "tallstore": lambda: opened.load(task),
                "torch": lambda: torch.load(pickle, weights_only=True),
            },
            burst=3,
        )
    rate = weights / median(seconds)
    ratio = times["tallstore"]["median"] / times["torch"]["median"]
    what = " ".join(f"{value}" for value in options.values())
    print(f"{what:<24}{bits:>7.3f} bits{rate / 1e6:>9.1f} M a second"
          f"{times['tallstore']['median'] * 1e3:>9.1f} ms  x{ratio:.2f}", flush=True)  # fmt: skip
    return {
        "options": options,
        "bits_per_weight_and_task": bits,
        "pack_seconds": seconds,
        "weight_tasks_per_second": rate,
        "load_seconds": times,
        "load_ratio": ratio,
    }


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    args = parser.parse_args()
    found = Zoo.at(args.zoo) if args.zoo else zoo(args.cache)
    print(f"{'':<24}{'disk':>12}{'pack':>20}{'load':>12}, beside torch.load")
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(found, options, Path(folder)) for options in CODES]
    print(write("coding", rows))


if __name__ == "__main__":
    main()
