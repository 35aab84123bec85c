"""Makes the golden stores: ``python tests/golden/make.py NAME``, once for each format version.

``plain`` and ``zoo`` are of version 1; ``external``, of version 2, refers to the base of ``zoo``,
and ``codes``, of version 2 too, has every form of code.

They are committed, and tests/test_golden.py reads them for ever after: whoever has to run this
again has changed the format, must say so in the commit, and must put the digests that this prints
into that file. Contents are computed from integers, so that they are the same everywhere; the
stores' identities and times are fixed, so that all keys and values are the same for the same zstd.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["CODES", "LAMBDA", "added", "coded", "others", "plain", "plain_task", "zoo"]

LAMBDA = 0.4
#: How each task of ``codes`` is coded, the first while it is packed, the others added.
CODES: dict[str, dict[str, Any]] = {
    "over": {"code": "levels", "over": "shared", "bits": 3, "vector_dtype": "int4"},
    "signs": {"code": "signs", "density": 0.04, "exact": True},
    "seeded": {"code": "seeded", "density": 0.15, "bits": 2, "exact": True, "seed": 7},
    "levels": {"code": "levels", "bits": 4},
    "auto": {"code": "auto", "bits_per_weight": 2.5, "exact": True},
}
State = dict[str, torch.Tensor]


def numbers(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Float32 in [-1, 1): 24 bits of a multiplicative hash, exact in float32."""
    mixed = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(1000 * seed)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    top = ((mixed ^ (mixed >> np.uint64(29))) >> np.uint64(20)) & np.uint64(0xFFFFFF)
    return (top.astype(np.float32) - np.float32(1 << 23)) / np.float32(1 << 23)


def floats(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """`numbers` as a tensor."""
    return torch.from_numpy(numbers(int(np.prod(shape)), seed)).reshape(shape)


def plain() -> dict[str, Any]:
    """Something of nearly everything that `save` takes."""
    storage = torch.arange(24, dtype=torch.float32)
    odd = torch.tensor([0x7F800001, -1, 0], dtype=torch.int32).view(torch.float32)
    return {
        "model": OrderedDict(
            weight=floats((5, 7), 1),
            bias=torch.nn.Parameter(floats((5,), 2)),
            half=floats((3, 3), 3).half(),
            brain=floats((9,), 4).bfloat16(),
            double=floats((4,), 5).double(),
            steps=torch.tensor(12345678901),
            flags=torch.tensor([True, False, True]),
            bytes=torch.arange(10, dtype=torch.uint8),
            complex=torch.tensor([1 + 2j, -0.0 + 1j], dtype=torch.complex64),
            float8=torch.arange(8, dtype=torch.float32).to(torch.float8_e4m3fn),
            empty=torch.zeros(0, 3),
            odd=odd,
            zeros=torch.zeros(3000),
        ),
        "views": [storage.view(4, 6), storage.view(4, 6).t(), storage[3:9]],
        "state": {0: {"step": 3.0, "betas": (0.9, 0.999)}, 1: None},
        "text": "ünïcode \ud800",
        "raw": b"\x00\xff",
        "big": -(2**70),
        "infinity": float("-inf"),
        "z": 1 - 2j,
        "set": {1, 2, 3},
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "scalar": np.float32(1.5),
        "true": True,
    }


def plain_task() -> dict[str, Any]:
    """`plain`, a few steps later."""
    later = plain()
    later["model"]["weight"] = later["model"]["weight"] * 1.001953125
    later["model"]["half"] = -later["model"]["half"]
    later["model"]["steps"] = torch.tensor(12345678902)
    later["extra"] = floats((3,), 6)
    later["text"] = "later"
    return later


def zoo() -> tuple[State, dict[str, State]]:
    """A base and two fine-tunes: one as such, one with what masks cannot hold."""
    base = {
        "embed": floats((19, 6), 10),
        "mlp.weight": floats((33, 33), 11),
        "mlp.bias": floats((33,), 12),
        "norm": floats((7,), 13).bfloat16(),
        "head": floats((2, 33), 14),
        "positions": torch.arange(5),
    }
    one = {
        name: (t.float() + floats(tuple(t.shape), 20 + i) / 64).to(t.dtype)
        if t.is_floating_point()
        else t.clone()
        for i, (name, t) in enumerate(base.items())
    }
    two = {
        name: (t.float() + floats(tuple(t.shape), 40 + i) / 64).to(t.dtype)
        if t.is_floating_point()
        else t + 1
        for i, (name, t) in enumerate(base.items())
    }
    two["head"] = floats((8, 33), 50)
    two["mlp.bias"][4] = float("nan")
    two["embed"] = base["embed"].clone()
    return base, {"one": one, "two": two}


def added() -> State:
    """A task that came later: an exact difference, in another dtype."""
    base, _ = zoo()
    return {
        name: (t.float() + floats(tuple(t.shape), 60) / 64).half()
        if name == "mlp.weight"
        else t.clone()
        for name, t in base.items()
    }


def others() -> dict[str, State]:
    """Two more fine-tunes of the zoo's base, for a store that refers to it."""
    base, _ = zoo()
    tasks: dict[str, State] = {}
    for number, name in enumerate(("three", "four")):
        tasks[name] = {
            key: (t.float() + floats(tuple(t.shape), 70 + 20 * number + i) / 64).to(t.dtype)
            if t.is_floating_point()
            else t.clone()
            for i, (key, t) in enumerate(base.items())
        }
    tasks["four"]["head"] = floats((3, 33), 110)
    return tasks


def coded() -> tuple[State, dict[str, State]]:
    """A base with tensors large enough for every codec, and a fine-tune for each of `CODES`."""
    base = {
        "embed": floats((60, 50), 120),
        "layers.0.weight": floats((90, 50), 121),
        "layers.0.bias": floats((90,), 122),
        "half": floats((33, 33), 123).bfloat16(),
        "steps": torch.arange(4),
    }
    tasks: dict[str, State] = {}
    for number, name in enumerate(CODES):
        tasks[name] = {
            key: (t.float() + floats(tuple(t.shape), 130 + 10 * number + i) ** 3 / 64).to(t.dtype)
            if t.is_floating_point()
            else t.clone()
            for i, (key, t) in enumerate(base.items())
        }
    return base, tasks


def write_coded(path: Path) -> None:
    """A store of `coded`."""
    import tallstore

    base, tasks = coded()
    first = next(iter(CODES))
    tallstore.pack(path, base, {first: tasks.pop(first)}, compress=True, **CODES[first])
    for task, state in tasks.items():
        tallstore.add(path, {task: state}, **CODES[task])


def main() -> None:
    """Write one file and print its digest."""
    import tallstore
    import tallstore.appending
    import tallstore.packing.newstore
    import tallstore.workers
    import tallstore.writing

    here = Path(__file__).resolve().parent
    tallstore.workers.cores = lambda: 1  # one thread: chunks come to LMDB in one order
    os.urandom = lambda size: bytes(range(size))  # the stores' identities
    for module in (tallstore.packing.newstore, tallstore.appending, tallstore.writing):
        module.now = lambda: "2026-01-01T00:00:00+00:00"  # type: ignore[attr-defined]
    os.chdir(here)  # paths that are written down are names alone
    (name,) = sys.argv[1:]
    path = Path(f"{name}.tall")
    path.unlink(missing_ok=True)
    if name == "plain":
        tallstore.save(plain(), path)
        tallstore.save(plain_task(), path, task="later", compress=True)
    elif name == "zoo":
        base, tasks = zoo()
        tallstore.pack(path, base, tasks, tall_lambda=LAMBDA, exact=True)
        tallstore.add(path, {"added": added()})
    elif name == "external":
        os.urandom = lambda size: bytes(range(size, 0, -1))  # another one than the zoo's
        tallstore.pack(
            path, None, others(), tall_lambda=LAMBDA, exact=True, external_base="zoo.tall"
        )
    elif name == "codes":
        write_coded(path)
    else:
        raise SystemExit(f"{name}: plain, zoo, external or codes")
    tallstore.compact(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f'    "{path.name}": "{digest}",  # {path.stat().st_size} bytes')
    print("now put this into DIGESTS of tests/test_golden.py", file=sys.stderr)


if __name__ == "__main__":
    main()
