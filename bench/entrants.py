"""Who runs in the frontier: every code with its settings, and what is left to validation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

import tallstore
from bench.rivals.bitdelta import bitdelta
from bench.rivals.emr import emr
from bench.rivals.lowrank import tsv
from bench.rivals.masks import tall
from bench.rivals.pruning import compeft, dare, magnitude, t_switch, ultradelta
from bench.rivals.quantization import tvq
from bench.rivals.vectors import Coded, Vectors

BUDGETS: Final = (0.03, 0.06, 0.15, 0.35, 1.0, 2.0, 2.6)
#: Training takes minutes a zoo and budget: where the others leave something to be had.
DISTILLED: Final = (0.06, 0.15, 0.35, 1.0, 1.6)
STEPS: Final = 100


@dataclass(frozen=True)
class Entrant:
    """One code at one setting.

    ``make(vectors)`` is called with ``seed=`` if the code is ``random``, and with each of
    ``values`` as the keyword ``chosen``; the best of them on validation is taken.
    """

    name: str
    setting: str
    make: Callable[..., Coded]
    random: bool = False
    calibrated: bool = False
    """Whether ``make`` takes ``calibrate``: a few inputs of each task, without labels."""
    distilled: bool = False
    """Whether it trains with them, and so is given more, in batches."""
    chosen: str = ""
    values: tuple[float, ...] = ()


def stored(
    vectors: Vectors,
    *,
    bits_per_weight: float,
    seed: int,
    calibrate: Any = None,
    distil: int | None = None,
) -> Coded:
    """Pack a zoo with ``code="auto"`` and load every task back from the file.

    What tasks have of their own is left out on both sides, as it is for the rivals; bits are all
    bytes of the file that belong to a task, its document included.
    """
    # Tensors of their own: views of one storage are one to the store.
    base = _apart(vectors.layout.tensors(vectors.base))
    tasks = {t: _apart(vectors.layout.tensors(vectors.base + v)) for t, v in vectors.tasks.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zoo.tall"
        tallstore.pack(
            path,
            base,
            tasks,
            code="auto",
            bits_per_weight=bits_per_weight,
            seed=seed,
            calibrate=calibrate,
            distil=distil,
        )
        with tallstore.open(path) as store:
            taken = sum(store.stored_bytes(task) for task in tasks)
            loaded = {t: vectors.layout.flat(store.load(t)) - vectors.base for t in tasks}
    return Coded(loaded, 8 * taken / (vectors.layout.weights * len(tasks)))


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _nothing(vectors: Vectors) -> Coded:
    return Coded({t: torch.zeros_like(v) for t, v in vectors.tasks.items()}, 0.0)


def _ours() -> list[Entrant]:
    return [
        Entrant(
            name,
            f"auto, {b:g} bits",
            partial(stored, bits_per_weight=b),
            random=True,
            calibrated=calibrated,
        )
        for name, calibrated in (("tallstore", False), ("tallstore, calibrated", True))
        for b in BUDGETS
    ] + [
        Entrant(
            "tallstore, distilled",
            f"auto, {b:g} bits",
            partial(stored, bits_per_weight=b, distil=STEPS),
            random=True,
            calibrated=True,
            distilled=True,
        )
        for b in DISTILLED
    ]


def _shared() -> list[Entrant]:
    lambdas = (0.2, 0.3, 0.4, 0.5, 0.6)
    return [
        *(
            Entrant(
                f"TALL+{merge.upper()}",
                "vector in 8 bits",
                partial(tall, merge=merge),
                chosen="tall_lambda",
                values=lambdas,
            )
            for merge in ("ta", "ties")
        ),
        Entrant("EMR-Merging", "vector in 8 bits", emr),
    ]


def _dropping() -> list[Entrant]:
    found = []
    for density in (0.005, 0.03, 0.1):
        make = partial(magnitude, density=density)
        found.append(Entrant("magnitude pruning", f"{density:.1%}, 8 bits", make))
    for density in (0.01, 0.05):
        make = partial(dare, density=density)
        found.append(Entrant("DARE", f"{density:.1%}, 16 bits", make, random=True))
    # ComPEFT's own grid begins at 0.5 (its section 3.1); more makes up for what is dropped.
    alphas = (1.0, 2.0, 4.0)
    for density in (0.01, 0.05, 0.2):
        make = partial(compeft, density=density)
        found.append(Entrant("ComPEFT", f"{density:.1%}", make, chosen="alpha", values=alphas))
    for density in (0.01, 0.05, 0.2):
        found.append(Entrant("T-Switch", f"{density:.1%}", partial(t_switch, density=density)))
    for density in (0.02, 0.1):
        make = partial(ultradelta, density=density)
        factors = (0.5, 1.0)
        setting = f"{density:.0%}, 4 bits"
        found.append(Entrant("UltraDelta", setting, make, True, chosen="factor", values=factors))
    return found


def _dense() -> list[Entrant]:
    return [
        Entrant("BitDelta", "no distillation", bitdelta),
        *(Entrant("TVQ", f"{bits} bits", partial(tvq, bits=bits)) for bits in (2, 3, 4)),
        *(
            Entrant("TSV-Compress", f"{share:.0%} of the weights", partial(tsv, share=share))
            for share in (0.01, 0.03, 0.12)
        ),
    ]


def entrants() -> list[Entrant]:
    """List everything that runs, ours first."""
    plain = Entrant("base alone", "", _nothing)
    return [*_ours(), plain, *_shared(), *_dropping(), *_dense()]
