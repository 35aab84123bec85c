"""How fast masks are counted: the statistics of a store of random masks.

``python -m bench.statistics [--tasks 8 20] [--weights 100000000] [--density 0.3]``. Makes a store
whose masks are random bits of that density, in a temporary directory (that takes 4 bytes of memory
for each weight and task), and times the whole of `TallStore.statistics` (reading, checking,
decoding, counting) as well as the counting alone, over masks in memory.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import tallstore
from bench.rows import write
from bench.timing import by_turns
from tallstore.bits import pack_bits
from tallstore.counting import overlaps, tally
from tallstore.layout import SPAN
from tallstore.scratch import Scratch
from tallstore.workers import workers

_LAYERS = 24


def _make(path: Path, tasks: int, weights: int, density: float) -> None:
    """A store whose tasks each move a random part of the weights, which is their mask."""
    rng = np.random.default_rng(0)
    size = weights // _LAYERS
    base = {f"layers.{n}.weight": torch.zeros(size) for n in range(_LAYERS)}

    def tuned() -> dict[str, Any]:
        found = {}
        for name in base:
            moved = rng.random(size, np.float32) < density
            found[name] = torch.from_numpy(rng.standard_normal(size, np.float32) * moved)
        return found

    # A tiny lambda: every weight that moved has its bit, so the density is what was asked for.
    tallstore.pack(path, base, {f"t{n}": tuned() for n in range(tasks)}, tall_lambda=1e-9)


def _spans(tasks: int, density: float) -> list[list[npt.NDArray[np.uint8]]]:
    """Masks of four spans, in memory."""
    rng = np.random.default_rng(1)
    return [
        [pack_bits(rng.random(SPAN, np.float32) < density) for _ in range(tasks)] for _ in range(4)
    ]


def _count(spans: Sequence[Sequence[npt.NDArray[np.uint8]]], scratch: Scratch) -> None:
    def work(masks: Sequence[npt.NDArray[np.uint8]]) -> None:
        tally(masks, [0], SPAN, scratch=scratch)
        overlaps(masks, scratch=scratch)

    with workers() as pool:
        for _ in pool.each(work, list(spans) * 8):
            pass


def measure(folder: Path, tasks: int, weights: int, density: float) -> dict[str, Any]:
    """Time one store, and the counting alone."""
    path = folder / "masks.tall"
    _make(path, tasks, weights, density)
    spans, scratch = _spans(tasks, density), Scratch()
    with tallstore.open(path) as store:
        found = store.statistics()
        assert len(found.tasks) == tasks
        mean = sum(task.density or 0.0 for task in found.tasks.values()) / tasks
        assert abs(mean - density) < 0.01, mean
        total = tasks * found.use.weights
        runs = {
            "statistics": lambda: store.statistics(),
            "counting": lambda: _count(spans, scratch),
        }
        seconds = by_turns(runs, repeats=7, warmup=1)
        stored = sum(store.stored_bytes(name) for name in store.tasks)
    path.unlink()
    counted = 8 * len(spans) * tasks * SPAN
    row = {
        "what": f"{tasks} tasks x {found.use.weights / 1e6:.0f} M weights, density {density}",
        "tasks": tasks,
        "weights": found.use.weights,
        "density": mean,
        "stored_bytes": stored,
        "statistics": seconds["statistics"],
        "statistics_giga_weight_tasks_per_second": total / seconds["statistics"]["median"] / 1e9,
        "counting": seconds["counting"],
        "counting_giga_weight_tasks_per_second": counted / seconds["counting"]["median"] / 1e9,
    }
    print(
        f"{row['what']:<44}{row['statistics_giga_weight_tasks_per_second']:>7.2f} G/s whole pass"
        f"{row['counting_giga_weight_tasks_per_second']:>7.2f} G/s counting alone",
        flush=True,
    )
    return row


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 20])
    parser.add_argument("--weights", type=int, default=100_000_000)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--dir", type=Path, help="where to make the store")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        rows = [measure(Path(name), n, args.weights, args.density) for n in args.tasks]
    print(write("statistics", rows))


if __name__ == "__main__":
    main()
