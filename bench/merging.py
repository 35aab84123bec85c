"""How good: one merged model of eight fine-tunes, by every rule, beside what it was merged from.

``python -m bench.merging [--cache DIR] [--zoo DIR]``: the MiniLM zoo, packed with the exact tier
over task arithmetic's vector and over TIES', lambda 0.4. Each rule merges the encoder; each task is
then classified by the merged encoder and the task's own head. Alpha, and k of Consensus Merging,
are chosen by the mean over the tasks of accuracy over the fine-tuned model's, on the first
`--validation` validation texts of each task; accuracy is reported on the first `--test` test texts
of each (splits are in random order), which are seen once, with what was chosen.

Sums are scaled by 0.1 .. 1.0, the paper's range. Means are a sum over the number of tasks, so they
are scaled by 1, which is the plain mean, to 3.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file

import tallstore
from bench.rows import write
from bench.zoos.minilm import Zoo, evaluate, zoo
from tallstore.merging import RULES, merge_rule

SUMS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
MEANS = (1.0, 2.0, 3.0)
KS = (1, 2)
Score = Callable[[str, Mapping[str, Any]], float]


def _heads(found: Zoo) -> dict[str, dict[str, torch.Tensor]]:
    base = load_file(found.base / "model.safetensors")
    states = {t: load_file(p / "model.safetensors") for t, p in found.tasks.items()}
    return {t: {n: w for n, w in s.items() if n not in base} for t, s in states.items()}


def _row(what: str, scores: Mapping[str, float], own: Mapping[str, float], **facts: Any) -> Any:
    kept = [scores[t] / own[t] for t in scores]
    return {
        "what": what,
        "accuracy_mean": mean(scores.values()),
        "kept_mean": mean(kept),
        "kept_worst": min(kept),
        **facts,
        "accuracy": dict(scores),
    }


def _merged(store: Path, rule: str, heads: Any, validation: Score, own: Mapping[str, float]) -> Any:
    def kept(state: Any) -> float:
        found = mean(validation(t, {**state, **heads[t]}) / own[t] for t in heads)
        print(f"  {rule}: {found:.4f}", flush=True)
        return found

    made = merge_rule(rule)
    alphas = MEANS if made.usual_alpha == 1 else SUMS
    ks = KS if made.masks else None
    return tallstore.merge(store, rule=rule, alpha=alphas, k=ks, private="base", evaluate=kept)


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    parser.add_argument("--validation", type=int, default=48, help="texts a task")
    parser.add_argument("--test", type=int, default=250, help="texts a task")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    args = parser.parse_args()
    found = Zoo.at(args.zoo) if args.zoo else zoo(args.cache, steps=args.steps)
    heads = _heads(found)

    def validation(task: str, state: Mapping[str, Any]) -> float:
        limit = args.validation
        return evaluate(task, state, split="validation", cache=args.cache, limit=limit)

    def test(task: str, state: Mapping[str, Any]) -> float:
        return evaluate(task, state, split="test", cache=args.cache, limit=args.test)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        stores = {rule: Path(folder) / f"{rule}.tall" for rule in ("ta", "ties")}
        for rule, store in stores.items():
            tallstore.pack(store, found.base, found.tasks, merge=rule, exact=True)
        with tallstore.open(stores["ta"]) as opened:
            own = {t: test(t, opened.load(t)) for t in heads}
            own_validation = {t: validation(t, opened.load(t)) for t in heads}
            base = opened.load()
        rows.append(_row("fine-tuned, one model a task", own, own))
        rows.append(
            _row("base and the task's head", {t: test(t, {**base, **heads[t]}) for t in heads}, own)
        )
        for rule, store in stores.items():
            with tallstore.open(store) as opened:
                scores = {t: test(t, opened.load(t, fidelity="codes")) for t in heads}
            rows.append(_row(f"TALL masks over {rule}, one bit a weight and task", scores, own))
        for rule in args.rules:
            store = stores["ties" if rule.endswith("ties") else "ta"]
            merge = _merged(store, rule, heads, validation, own_validation)
            scores = {t: test(t, {**merge.state, **heads[t]}) for t in heads}
            facts = {"alpha": merge.alpha, "k": merge.k, "validation_kept_mean": merge.score}
            rows.append(_row(rule, scores, own, **facts, vectors=merge.vectors))
            print(rows[-1], flush=True)
    print(f"{'':<50}{'alpha':>6}{'k':>3}{'accuracy':>10}{'kept':>8}{'worst':>8}")
    for row in rows:
        print(
            f"{row['what']:<50}{row.get('alpha') or '':>6}{row.get('k') or '':>3}"
            f"{row['accuracy_mean']:>10.1%}{row['kept_mean']:>8.1%}{row['kept_worst']:>8.1%}"
        )
    facts = {"validation_texts_a_task": args.validation, "test_texts_a_task": args.test}
    print(write("merging", [{**facts, "sums": SUMS, "means": MEANS, "ks": KS}, *rows]))


if __name__ == "__main__":
    main()
