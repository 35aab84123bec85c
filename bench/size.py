"""How big: stores of real fine-tunes against their original files.

``python -m bench.size [--cache DIR] [--zoo DIR]``. The MiniLM zoo of 8 tasks in float32 and cast to
bfloat16, by masks, by ``auto`` at 0.15 bit and with the exact tier; and 20 tasks, the 8 and 12
averages of pairs of them (full-rank task vectors of real weights, though not fine-tunes of their
own). Stores by ``auto`` have their base compressed.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import tallstore
from bench.rows import write
from bench.zoos.minilm import Zoo, zoo

State = dict[str, torch.Tensor]
AUTO: dict[str, Any] = {"code": "auto", "bits_per_weight": 0.15, "compress": True}


def _states(found: Zoo) -> tuple[State, dict[str, State]]:
    base = load_file(found.base / "model.safetensors")
    return base, {t: load_file(p / "model.safetensors") for t, p in found.tasks.items()}


def _averages(tasks: dict[str, State], count: int) -> dict[str, State]:
    pairs = itertools.islice(itertools.combinations(tasks, 2), count)
    found = {}
    for one, other in pairs:
        shared = {n: (w + tasks[other][n]) / 2 if w.is_floating_point() else w
                  for n, w in tasks[one].items() if not n.startswith("classifier")}  # fmt: skip
        found[f"{one}-{other}"] = shared
    return found


def _cast(state: State) -> State:
    return {n: w.bfloat16() if w.is_floating_point() else w for n, w in state.items()}


def measure(name: str, base: State, tasks: dict[str, State], **options: Any) -> Any:
    """Write originals and store; compare file sizes."""
    with tempfile.TemporaryDirectory() as folder:
        originals = 0
        for task, state in tasks.items():
            path = Path(folder) / f"{task}.safetensors"
            save_file(state, path)
            originals += path.stat().st_size
        store = Path(folder) / "zoo.tall"
        tallstore.pack(store, base, tasks, **options)
        with tallstore.open(store) as opened:
            weights = sum(t.weights for t in opened.tasks.values())
            bits = 8 * sum(opened.stored_bytes(t) for t in tasks) / weights
            row = {
                "what": name,
                "tasks": len(tasks),
                "options": options,
                "exact_bits": _exact_bits(opened) if options.get("exact") else None,
                "original_bytes": originals,
                "store_bytes": store.stat().st_size,
                "ratio": originals / store.stat().st_size,
                "bits_per_weight_and_task": bits,
                "base_bytes": opened.stored_bytes(),
                "vector_bytes": opened.vector_bytes(),
                "density_mean": sum(t.density or 0 for t in opened.tasks.values()) / len(tasks),
            }
    exact = row["exact_bits"]
    print(f"{name:<34}{originals / 1e6:>9.1f} MB{row['store_bytes'] / 1e6:>9.1f} MB"
          f"   1/{row['ratio']:.2f}{bits:>9.2f} bits"
          f"{f', exact tier {exact:.2f}' if exact else ''}", flush=True)  # fmt: skip
    return row


def _exact_bits(store: tallstore.TallStore) -> float:
    """Bits a coded weight and task of the exact tier's streams alone."""
    stored = coded = 0
    for name, record in store.tasks.items():
        task = store.describe(name).task
        assert task is not None
        streams = [code.exact for code in task.codes if code.exact is not None]
        stored += sum(store.stream_bytes(stream) for stream in streams)
        coded += record.coded
    return 8 * stored / coded


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    args = parser.parse_args()
    base, tasks = _states(Zoo.at(args.zoo) if args.zoo else zoo(args.cache))
    more = tasks | _averages(tasks, 20 - len(tasks))
    half_base, half = _cast(base), {t: _cast(s) for t, s in tasks.items()}
    print(f"{'':<34}{'originals':>12}{'store':>12}{'ratio':>9}{'a weight, task':>16}")
    rows = [
        measure("8 tasks, float32, masks", base, tasks),
        measure("20 tasks, float32, masks", base, more),
        measure("8 tasks, bfloat16, masks", half_base, half),
        measure("8 tasks, float32, auto", base, tasks, **AUTO),
        measure("20 tasks, float32, auto", base, more, **AUTO),
        measure("8 tasks, bfloat16, auto", half_base, half, **AUTO),
        measure("8 tasks, float32, exact tier", base, tasks, exact=True),
        measure("8 tasks, bfloat16, exact tier", half_base, half, exact=True),
    ]
    print(write("size", rows))


if __name__ == "__main__":
    main()
