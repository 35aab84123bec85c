"""What encoders sum over blocks, and its reduction to tensors.

Knows torch only. A block's sums are float32, over a tree; blocks add up in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

__all__ = ["LevelSums", "TallSums", "reduce_sums"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TallSums:
    """Sums over the weights of each of B blocks, or of R tensors, of one task's TALL mask.

    Squares below float32's smallest number count as zero, and above its largest as infinity:
    differences from about 1e-19 to 1e19 are summed faithfully.
    """

    ones: torch.Tensor
    """Weights that take the shared vector. int32, shape (B,)."""
    moved: torch.Tensor
    """Squared norm of the task vector. float32, shape (B,)."""
    error: torch.Tensor
    """Squared norm of reconstruction minus weights, the reconstruction unrounded. float32, (B,)."""
    same: torch.Tensor
    """Whether every weight equals the base's, bit for bit; false between two dtypes. bool, (B,)."""
    finite: torch.Tensor
    """Whether every weight can be coded: no difference is NaN or infinite. bool, shape (B,)."""

    def to(self, device: torch.device | str) -> TallSums:
        """The same sums on a device."""
        return TallSums(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @classmethod
    def empty(cls, blocks: int, device: torch.device | str) -> TallSums:
        """Room for the sums of a number of blocks, uninitialized."""
        return cls(
            ones=torch.empty(blocks, dtype=torch.int32, device=device),
            moved=torch.empty(blocks, device=device),
            error=torch.empty(blocks, device=device),
            same=torch.empty(blocks, dtype=torch.bool, device=device),
            finite=torch.empty(blocks, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelSums:
    """Sums over the weights of each of B blocks, or of R tensors, of one task's codes.

    With t the task vector and v the shared one (1 where there is none), the level that fits a
    code best is ``products / squares``, and the squared error of any levels c is
    ``moved + sum(c**2 * squares - 2 * c * products)``.
    """

    counts: torch.Tensor
    """Weights of each code. int32, shape (B, 2**K)."""
    products: torch.Tensor
    """Sum of t * v over the weights of each code. float32, shape (B, 2**K)."""
    squares: torch.Tensor
    """Sum of v**2 over the weights of each code. float32, shape (B, 2**K)."""
    moved: torch.Tensor
    """Sum of t**2. float32, shape (B,)."""
    error: torch.Tensor
    """Sum of (t - level * v)**2, with the levels encoded with. float32, shape (B,)."""
    same: torch.Tensor
    """As in `TallSums`."""
    finite: torch.Tensor
    """As in `TallSums`."""

    @classmethod
    def empty(cls, blocks: int, planes: int, device: torch.device | str) -> LevelSums:
        """Room for the sums of a number of blocks, uninitialized."""
        each = (blocks, 1 << planes)
        return cls(
            counts=torch.empty(each, dtype=torch.int32, device=device),
            products=torch.empty(each, device=device),
            squares=torch.empty(each, device=device),
            moved=torch.empty(blocks, device=device),
            error=torch.empty(blocks, device=device),
            same=torch.empty(blocks, dtype=torch.bool, device=device),
            finite=torch.empty(blocks, dtype=torch.bool, device=device),
        )


Sums = TypeVar("Sums", TallSums, LevelSums)


def reduce_sums(sums: Sums, ranges: Sequence[tuple[int, int]]) -> Sums:
    """Sums over ranges of blocks, such as those of each tensor; the same on every run.

    Parameters
    ----------
    sums
        Of B blocks.
    ranges
        R pairs of first block and block past the end, 0 .. B; they may be empty or overlap.

    Returns
    -------
    TallSums or LevelSums
        R rows: counts int64, sums float64, flags true where they were in every block.
    """
    reduced = {field.name: _reduce(getattr(sums, field.name), ranges) for field in fields(sums)}
    return type(sums)(**reduced)


def _reduce(partials: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    if partials.dtype == torch.bool:
        rows = [partials[low:high].all(0) for low, high in ranges]
        dtype = torch.bool
    else:
        dtype = torch.float64 if partials.is_floating_point() else torch.int64
        rows = [partials[low:high].sum(0, dtype=dtype) for low, high in ranges]
    nothing = partials.new_empty((0, *partials.shape[1:]), dtype=dtype)
    return torch.stack(rows) if rows else nothing
