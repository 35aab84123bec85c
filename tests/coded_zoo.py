"""A base and fine-tunes with something of everything that coding meets; and the codes there are."""

from __future__ import annotations

from typing import Any

import torch
from zoo import State

__all__ = ["CODES", "coded_zoo", "name_of"]

#: Options of `tallstore.pack`: every code, with every number of bits.
CODES: list[dict[str, Any]] = [
    {"code": "tall"},
    {"code": "signs", "density": 0.1},
    {"code": "signs", "density": 0.6},
    *({"code": "seeded", "density": 0.15, "bits": bits, "seed": bits} for bits in (1, 2, 3, 4)),
    {"code": "seeded", "density": 1.0, "bits": 2},
    *({"code": "levels", "bits": bits} for bits in (1, 2, 3, 4)),
    *({"code": "levels", "bits": bits, "over": "shared"} for bits in (1, 2, 3, 4)),
    {"code": "levels", "bits": 2, "over": "shared", "vector_dtype": "int8"},
    {"code": "levels", "bits": 2, "over": "shared", "vector_dtype": "int4"},
    {"code": "levels", "bits": 2, "over": "shared", "merge": "ta", "vector_dtype": "float32"},
    {"code": "auto", "bits_per_weight": 1.8},
    {"code": "auto", "bits_per_weight": 3},
    {"code": "auto", "max_error": 0.5},
    {"code": "auto", "max_error": 0.9},
]

#: Sizes off and on every boundary: of bytes, of blocks.
_SHAPES = {
    "a": (37, 16),
    "one": (1,),
    "b": (33, 65),
    "embed": (280, 8),
    "c": (1024,),
    "still": (50,),
    "d": (3001,),
    "scale": (),
    "norm": (7,),
}


def name_of(options: dict[str, Any]) -> str:
    """For the ids of tests."""
    return ",".join(str(value) for value in options.values())


def coded_zoo(
    dtype: torch.dtype = torch.float32, tuned: torch.dtype | None = None
) -> tuple[State, dict[str, State]]:
    """A base of three floating dtypes and integers, and fine-tunes of it.

    `y` has changed integers, a weight that is not a number, and fewer rows of an embedding; `x` has
    more. Both have a head of their own, and a tensor that did not move.

    Parameters
    ----------
    dtype
        Of most of the base.
    tuned
        Of the same in the tasks; None: as in the base.
    """
    draw = torch.Generator().manual_seed(0)
    base: State = {n: torch.randn(s, generator=draw).to(dtype) for n, s in _SHAPES.items()}
    other = torch.bfloat16 if dtype != torch.bfloat16 else torch.float32
    base["double"] = torch.randn(10, generator=draw, dtype=torch.float64)
    base["other"] = torch.randn(2000, generator=draw).to(other)
    base["ids"] = torch.arange(9)
    tasks = {}
    for name in "xy":
        task: State = {}
        for key, tensor in base.items():
            moved = tensor.float() + 0.02 * torch.randn(tensor.shape, generator=draw)
            kind = tuned if tuned is not None and tensor.dtype == dtype else tensor.dtype
            still = key == "still" and kind == tensor.dtype
            task[key] = tensor.clone() if still or key == "ids" else moved.to(kind)
        task["head"] = torch.randn(5, 7, generator=draw)
        tasks[name] = task
    x, y = tasks.values()
    x["embed"] = torch.cat([x["embed"], torch.ones(9, 8).to(x["embed"].dtype)])
    y["embed"] = y["embed"][:260].clone()
    y["ids"] = torch.arange(9) * 2
    y["b"][0, 0] = float("nan")
    return base, tasks
