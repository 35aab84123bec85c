"""Which lambda, where nobody chooses? Accuracy kept over real fine-tunes, chosen on validation.

``python -m bench.tall_lambda [--cache DIR]``: the MiniLM zoo (trained first, if it is not there),
each merge rule, lambda 0.2 .. 0.6 for all tasks alike, a data-free rule for each task (the lambda
whose reconstruction keeps the task vector's projection best, <t^, t> nearest to <t, t>), and the
paper's choice by validation accuracy. Rows give validation accuracy over that of the fine-tuned
models: the default is chosen there, and test texts stay unseen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import tallstore
from bench.rows import write
from bench.zoos.minilm import Zoo, evaluate, zoo

LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)


def _scores(task: str, state: Mapping[str, torch.Tensor], cache: Path | None) -> dict[str, float]:
    return {"validation": evaluate(task, state, split="validation", cache=cache)}


def _gain(base: Any, original: Any, loaded: Any) -> float:
    along = length = 0.0
    for name, weights in original.items():
        if name in base and weights.is_floating_point() and weights.shape == base[name].shape:
            moved = (weights - base[name]).double().flatten()
            kept = (loaded[name] - base[name]).double().flatten()
            along += float(kept @ moved)
            length += float(moved @ moved)
    return along / length


def _sweep(
    found: Zoo, rule: str, lambdas: Sequence[float], store: Path, cache: Path | None
) -> dict[Any, Any]:
    base = _state(found.base)
    table: dict[Any, Any] = {}
    for value in lambdas:
        tallstore.pack(
            store, found.base, found.tasks, merge=rule, tall_lambda=value, overwrite=True
        )
        for task, path in found.tasks.items():
            loaded = tallstore.load(store, task=task)
            gain = _gain(base, _state(path), loaded)
            table[task, value] = {"gain": gain, **_scores(task, loaded, cache)}
            print(rule, value, task, table[task, value], flush=True)
    return table


def _state(directory: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def _rows(
    rule: str,
    lambdas: Sequence[float],
    tasks: list[str],
    table: dict[Any, Any],
    own: dict[str, Any],
) -> Any:
    def kept(chosen: dict[str, float], split: str) -> list[float]:
        return [table[t, chosen[t]][split] / own[t][split] for t in tasks]

    choices: dict[str, dict[str, float]] = {str(v): dict.fromkeys(tasks, v) for v in lambdas}
    choices["projection"] = {
        t: min(lambdas, key=lambda v, t=t: abs(table[t, v]["gain"] - 1)) for t in tasks
    }
    choices["validation"] = {
        t: max(lambdas, key=lambda v, t=t: (table[t, v]["validation"], -v)) for t in tasks
    }
    for name, chosen in choices.items():
        yield {
            "rule": rule,
            "lambda": name,
            "validation_kept_mean": mean(kept(chosen, "validation")),
            "validation_kept_worst": min(kept(chosen, "validation")),
            "chosen": chosen,
        }


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    parser.add_argument("--lambdas", nargs="+", type=float, default=list(LAMBDAS))
    parser.add_argument("--rules", nargs="+", default=["ta", "ties"])
    args = parser.parse_args()
    found = Zoo.at(args.zoo) if args.zoo else zoo(args.cache, steps=args.steps)
    own = {t: _scores(t, _state(p), args.cache) for t, p in found.tasks.items()}
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for rule in args.rules:
            table = _sweep(found, rule, args.lambdas, Path(directory) / "zoo.tall", args.cache)
            rows += list(_rows(rule, args.lambdas, list(found.tasks), table, own))
    print(
        f"{'rule':<6}{'lambda':<12}{'validation: mean':>17}{'worst':>8}{'test: mean':>12}", end=""
    )
    print(f"{'rule':<6}{'lambda':<12}{'kept, mean':>12}{'worst':>9}")
    for row in rows:
        print(
            f"{row['rule']:<6}{row['lambda']:<12}{row['validation_kept_mean']:>12.2%}"
            f"{row['validation_kept_worst']:>9.1%}"
        )
    print(write("tall_lambda", rows))


if __name__ == "__main__":
    main()
