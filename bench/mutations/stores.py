"""The stores that are damaged, and what they hold, as a function of seeds alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import tallstore
from tallstore.engine.manifest import Manifest
from tallstore.engine.newfile import NewFile
from tallstore.engine.session import WriteSession
from tallstore.packing.encodings import AS_IS

__all__ = [
    "CHUNKS",
    "NEW",
    "State",
    "Wanted",
    "deep_chunk",
    "make_codes",
    "make_deep",
    "make_zoo",
    "task",
]

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Wanted:
    """What a store holds."""

    now: dict[str | None, State]
    """By task; the base under None."""
    earlier: dict[str | None, list[State]]
    """What other commits held, of which traces may be left: removed tasks, or other forms."""
    code: str | None
    """How the task that is added to it is coded; None: saved."""


_TASKS: Final = 10
#: Streams of the engine's own store, whose tree is three levels deep.
CHUNKS: Final = 700
#: Name of the task that is written to damaged stores.
NEW: Final = "new"


def _base(seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(120, 64, generator=draw),
        "norm": torch.randn(33, generator=draw).bfloat16(),
        "half": torch.randn(40, 17, generator=draw).half(),
        "steps": torch.arange(300),
    }


def task(seed: int, number: int) -> State:
    """A fine-tune of the base, with a head of its own."""
    draw = torch.Generator().manual_seed(1000 * seed + number)
    tuned = {
        name: (w.float() + 0.01 * torch.randn(w.shape, generator=draw)).to(w.dtype)
        if w.is_floating_point()
        else w
        for name, w in _base(seed).items()
    }
    return tuned | {"head": torch.randn(3 + number % 3, 64, generator=draw)}


def _big(seed: int) -> State:
    return {"big": torch.randn(600_000, generator=torch.Generator().manual_seed(seed))}


def make_zoo(path: Path, seed: int) -> Wanted:
    """A store with a history: tasks packed, added, removed; free pages, and a list of them."""
    tasks = {f"t{number}": task(seed, number) for number in range(_TASKS)}
    tallstore.pack(path, _base(seed), tasks, exact=True)
    tallstore.save(_big(seed), path, task="big")
    with tallstore.open(path, "a") as store:
        store.remove("t2", "big")
    tallstore.save(task(seed, 20), path, task="t20")
    tallstore.save(task(seed, 21), path, task="t21")
    with tallstore.open(path, "a") as store:
        store.remove("t3")
    kept = [number for number in range(_TASKS) if number not in (2, 3)]
    now: dict[str | None, State] = {f"t{n}": task(seed, n) for n in [*kept, 20, 21]}
    return Wanted(
        {None: _base(seed), **now},
        {"t2": [task(seed, 2)], "t3": [task(seed, 3)], "big": [_big(seed)]},
        None,
    )


def make_codes(path: Path, seed: int) -> Wanted:
    """A store with a history of every code, with the exact tier and without."""
    shared = {f"t{number}": task(seed, number) for number in range(4)}
    tallstore.pack(path, _base(seed), shared, code="levels", over="shared", bits=3,
                   vector_dtype="int4", exact=True)  # fmt: skip
    added: dict[str, dict[str, Any]] = {
        "t4": {"code": "signs", "density": 0.05, "exact": True},
        "t5": {"code": "seeded", "density": 0.1},
        "t6": {"code": "auto", "bits_per_weight": 1.5, "exact": True},
        "t7": {"code": "levels", "bits": 2},
        "t8": {"code": "signs"},
        "t9": {"code": "exact"},
    }
    for name, options in added.items():
        tallstore.add(path, {name: task(seed, int(name[1:]))}, **options)
    before = _held(path)
    with tallstore.open(path, "a") as store:
        store.remove("t3", "t8")
    tallstore.strip(path, ["t1"])
    now = _held(path)
    earlier = {n: [state] for n, state in before.items() if n not in now or n == "t1"}
    return Wanted(now, earlier, "seeded")


def _held(path: Path) -> dict[str | None, State]:
    with tallstore.open(path) as store:
        return {name: store.load(name) for name in (None, *store.tasks)}


def deep_chunk(seed: int, number: int) -> bytes:
    """The content of one stream of `make_deep`."""
    draw = np.random.default_rng([seed, number])
    return draw.bytes(1500 + number % 7 if number % 50 else 9000)


def make_deep(path: Path, seed: int) -> None:
    """A store of the engine's, without models: many chunks that fill the leaves."""
    new = NewFile(path)
    identity = seed.to_bytes(16, "little")
    with WriteSession(new.environment, Manifest(store=identity)) as session:
        for number in range(CHUNKS):
            stream = session.stream(1 << 20)
            data = np.frombuffer(deep_chunk(seed, number), np.uint8)
            stream.put(0, data, encoding=AS_IS)
        live = frozenset(range(1, CHUNKS + 1))
        # A manifest that has pages of its own.
        body = {"noise": np.random.default_rng(seed).bytes(4000).hex()}
        session.commit(body, live=live, written_by="bench.mutations")
    new.publish(timeout=10)
