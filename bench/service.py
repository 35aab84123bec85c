"""A small real service: one process, one model, the MiniLM zoo, clients that ask for any task.

``python -m bench.service [--cache DIR] [--zoo DIR] [--clients N] [--seconds S]``. Client threads
ask, in random order, for texts of a task to be classified; the model is switched to it, and every
answer is checked: its logits are, to the bit, those of the task's own fine-tuned model (a store
with the exact tier), or of the model that the store's codes stand for (masks, signs). Requests a
second, and the time from asking to the answer, waiting for others included.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import tallstore
from bench.rows import write
from bench.zoos.minilm import Zoo, classifier, encoded, zoo
from tallstore.serving import Switch, TaskSwitcher

#: Texts a request, and different requests a task.
TEXTS, REQUESTS = 4, 16
STORES: Mapping[str, dict[str, Any]] = {
    "exact tier": {"exact": True},
    "masks": {},
    "signs": {"code": "signs"},
}

Request = tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]


class Service:
    """Answers requests with the one model."""

    def __init__(self, switcher: TaskSwitcher) -> None:
        self._switcher = switcher
        self.switches = 0

    def classify(self, task: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The logits of some texts, by a task's model."""
        with self._switcher.use(task) as model, torch.inference_mode():
            logits: torch.Tensor = model(ids, mask)
            return logits


def _requests(found: Zoo, store: Path, *, exact: bool, cache: Path | None) -> list[Request]:
    """What clients ask, with the answers of each task's own model."""
    made = []
    for task, path in found.tasks.items():
        own = load_file(path / "model.safetensors") if exact else tallstore.load(store, task=task)
        model = classifier(own, found.base)
        texts = encoded(task, TEXTS * REQUESTS, cache)
        for number in range(REQUESTS):
            rows = range(number * TEXTS, (number + 1) * TEXTS)
            ids, mask, _ = texts.batch(rows)
            with torch.inference_mode():
                made.append((task, ids, mask, model(ids, mask)))
    return made


def _client(
    service: Service, requests: list[Request], seed: int, until: float, took: list[float]
) -> None:
    draw = random.Random(seed)
    while time.perf_counter() < until:
        task, ids, mask, wanted = draw.choice(requests)
        began = time.perf_counter()
        logits = service.classify(task, ids, mask)
        took.append(time.perf_counter() - began)
        if not torch.equal(logits, wanted):
            raise SystemExit(f"{task}: another answer than its own model's")


def serve(
    found: Zoo, name: str, folder: Path, *, clients: int, seconds: float, cache: Path | None
) -> dict[str, Any]:
    """The row of one store."""
    store = folder / f"{name}.tall"
    options = STORES[name]
    tallstore.pack(store, found.base, found.tasks, **options)
    requests = _requests(found, store, exact="exact" in options, cache=cache)
    first = next(iter(found.tasks.values())) / "model.safetensors"
    model = classifier(load_file(first), found.base)
    switches: list[Switch] = []
    failures: list[BaseException] = []
    with TaskSwitcher(model, store) as switcher:
        switch = switcher._switch
        switcher._switch = lambda *a, **k: switches.append(switch(*a, **k)) or switches[-1]  # type: ignore[method-assign]
        service = Service(switcher)
        took: list[float] = []
        until = time.perf_counter() + seconds

        def client(seed: int) -> None:
            try:
                _client(service, requests, seed, until, took)
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        need = switcher.need()
    written = [done for done in switches if done.source != "live"]
    row = {
        "what": "service",
        "store": name,
        "tasks": len(found.tasks),
        "clients": clients,
        "texts_a_request": TEXTS,
        "requests": len(took),
        "requests_per_second": len(took) / seconds,
        "p50_ms": float(np.quantile(took, 0.5)) * 1e3,
        "p99_ms": float(np.quantile(took, 0.99)) * 1e3,
        "switches": len(written),
        "switch_p50_ms": float(np.median([done.ms for done in written])),
        "bytes_beside_the_model": need.on_device("all"),
    }
    print(
        f"{name:<12}{row['requests_per_second']:>8.1f} requests/s, p50 {row['p50_ms']:.0f} ms, p99 "
        f"{row['p99_ms']:.0f} ms, {len(written)} switches of {row['switch_p50_ms']:.1f} ms for "
        f"{len(took)} requests, all answers right, {need.on_device('all') / 1e6:.0f} MB",
        flush=True,
    )
    return row


def main() -> None:
    """Serve, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    args = parser.parse_args()
    found = Zoo.at(args.zoo) if args.zoo else zoo(args.cache)
    rows = []
    for name in args.stores:
        with tempfile.TemporaryDirectory(dir=args.cache) as folder:
            rows.append(
                serve(
                    found,
                    name,
                    Path(folder),
                    clients=args.clients,
                    seconds=args.seconds,
                    cache=args.cache,
                )
            )
    print(write("service", rows))


if __name__ == "__main__":
    main()
