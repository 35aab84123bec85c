"""Reconstruction of an arena into tensors that lie anywhere: a model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tallstore.errors import MismatchError
from tallstore.layout import BLOCK
from tallstore.ops.backend import choose_backend, same_device
from tallstore.ops.checks import check_planes, check_table, check_weights
from tallstore.ops.reconstruction import reconstruct

__all__ = ["Places", "listed", "place", "reconstruct_placed"]

#: Bytes that a thread writes at once, where all addresses are multiples of it.
_ACCESS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Places:
    """Where some runs of an arena's weights go; made by `place`."""

    runs: tuple[tuple[int, torch.Tensor], ...]
    """The first weight of each, and the flat tensor that it goes to."""
    weights: int
    """Of the arena."""
    rows: torch.Tensor
    """int32, shape (blocks,): the run of each block of 1024 weights; the last row is no run."""
    blocks: torch.Tensor | None
    """int32: the blocks that planes are of, in their order; None: all of the arena."""
    addresses: torch.Tensor
    """int64, shape (runs + 1,): where weight 0 of the arena would be."""
    stops: torch.Tensor
    """int64, shape (runs + 1,): the weight after a run's last; 0 for no run."""
    dtype: torch.dtype
    aligned: bool

    @property
    def firsts(self) -> tuple[int, ...]:
        """Where in the planes the codes of each run start."""
        return listed(self.runs) if self.blocks is not None else tuple(n for n, _ in self.runs)


def listed(runs: Sequence[tuple[int, torch.Tensor]]) -> tuple[int, ...]:
    """Where the codes of each run start, where planes have the runs' blocks alone."""
    found, at = [], 0
    for _, out in runs:
        found.append(at)
        at += -(-out.numel() // BLOCK) * BLOCK
    return tuple(found)


def place(runs: Sequence[tuple[int, torch.Tensor]], weights: int, *, alone: bool = False) -> Places:
    """Say where runs of weights go.

    Parameters
    ----------
    runs
        At least one: the first weight of each, a multiple of 1024, and the flat, contiguous
        tensor that it goes to; all of one dtype and on one device. No two share a block of 1024
        weights. The tensors are held on to: an address is only as good as its tensor.
    weights
        Of the arena.
    alone
        Whether planes have the codes of the runs' blocks alone, one run after the other.

    Raises
    ------
    MismatchError
    """
    device = same_device(**{f"run {n}": out for n, (_, out) in enumerate(runs)})
    dtype = runs[0][1].dtype
    blocks = -(-weights // BLOCK)
    rows = torch.full((blocks,), len(runs), dtype=torch.int32, device="cpu")
    addresses, stops = [], []
    for number, (first, out) in enumerate(runs):
        check_weights(out.numel(), **{f"run {number}": out})
        last = -(-(first + out.numel()) // BLOCK)
        taken = rows[first // BLOCK : last]
        if first % BLOCK or first + out.numel() > weights or bool((taken != len(runs)).any()):
            raise MismatchError(
                f"run {number}: weights {first} to {first + out.numel()} of {weights}; blocks of "
                f"{BLOCK} of its own are needed"
            )
        if out.dtype != dtype:
            raise MismatchError(f"run {number}: {out.dtype}, the first is {dtype}")
        taken.fill_(number)
        addresses.append(out.data_ptr() - first * out.element_size())
        stops.append(first + out.numel())
    numbers = None
    if alone:
        spans = [(first // BLOCK, -(-(first + out.numel()) // BLOCK)) for first, out in runs]
        numbers = torch.cat(
            [torch.arange(*span, dtype=torch.int32, device="cpu") for span in spans]
        )
        rows = rows[numbers]
    return Places(
        runs=tuple(runs),
        weights=weights,
        rows=rows.to(device),
        blocks=None if numbers is None else numbers.to(device),
        addresses=torch.tensor([*addresses, 0], dtype=torch.int64, device=device),
        stops=torch.tensor([*stops, 0], dtype=torch.int64, device=device),
        dtype=dtype,
        aligned=all(address % _ACCESS == 0 for address in addresses),
    )


def reconstruct_placed(
    base: torch.Tensor,
    planes: torch.Tensor,
    vector: torch.Tensor | None,
    levels: torch.Tensor,
    places: Places,
    *,
    backend: str | None = None,
) -> None:
    """Fill the tensors of `places` with base + levels[code] * vector; see `reconstruct`.

    On CUDA in one launch, however many tensors there are.

    Parameters
    ----------
    base
        Shape (n,), float32, bfloat16 or float16.
    planes
        uint8, shape (K, at least ceil(n / 8)), LSB-first, K = 1..4; of the blocks of `places`
        alone, if that lists any.
    vector
        Shape (n,), float32, bfloat16 or float16; None stands for 1.
    levels
        float32, shape (runs + 1, 2**K): a row for each run, and one that is not used.
    places
        Where the runs go.
    backend
        See `choose_backend`.

    Raises
    ------
    MismatchError
        Shapes, dtypes or devices clash; nothing was written.
    DeviceError
        The backend cannot run there.
    """
    device = same_device(base=base, planes=planes, vector=vector, levels=levels, rows=places.rows)
    blocks = places.blocks
    count = check_planes(planes, places.weights if blocks is None else blocks.numel() * BLOCK)
    check_weights(places.weights, base=base, vector=vector)
    check_table(levels, 1 << count)
    if levels.shape[0] != len(places.runs) + 1:
        raise MismatchError(f"levels: {levels.shape[0]} rows for {len(places.runs)} runs and one")
    if choose_backend(device, backend) == "triton":
        from tallstore.kernels.placed import reconstruct_placed as launch

        launch(
            base,
            planes,
            vector,
            levels,
            places.rows,
            places.addresses,
            places.stops,
            blocks,
            dtype=places.dtype,
            aligned=places.aligned,
        )
        return
    for row, (first, out), at in zip(levels.tolist(), places.runs, places.firsts, strict=False):
        stop = first + out.numel()
        part = planes[:, at // 8 : (at + out.numel() + 7) // 8]
        step = None if vector is None else vector[first:stop]
        reconstruct(base[first:stop], part, step, row, out, backend=backend)
