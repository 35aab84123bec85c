"""The stores that are damaged, and what they hold, as a function of seeds alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

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
    "contents",
    "deep_chunk",
    "make_deep",
    "make_zoo",
    "removed",
    "task",
]

State = dict[str, torch.Tensor]

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


def contents(seed: int) -> dict[str | None, State]:
    """What `make_zoo` leaves in its store, the base under None."""
    kept = [number for number in range(_TASKS) if number not in (2, 3)]
    return {None: _base(seed)} | {f"t{number}": task(seed, number) for number in [*kept, 20, 21]}


def removed(seed: int) -> dict[str | None, State]:
    """What `make_zoo` stored and removed again."""
    return {"t2": task(seed, 2), "t3": task(seed, 3), "big": _big(seed)}


def _big(seed: int) -> State:
    return {"big": torch.randn(600_000, generator=torch.Generator().manual_seed(seed))}


def make_zoo(path: Path, seed: int) -> None:
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
