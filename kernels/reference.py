"""Every operation of the kernels in plain torch: what faster paths must equal, to the bit.

Knows torch only. Slow on purpose: one line a step, whole arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from .sums import LevelSums, TallSums

__all__ = [
    "SCALED",
    "add_residual",
    "at_least",
    "codes",
    "count_uses",
    "dequantize",
    "encode_levels",
    "encode_tall",
    "level_sums",
    "overlaps",
    "pack",
    "reconstruct",
    "tall_sums",
    "use_histogram",
]

#: Weights of a quantized vector that share a scale.
SCALED: Final = 256

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def codes(planes: torch.Tensor, count: int) -> torch.Tensor:
    """Code of each weight.

    Parameters
    ----------
    planes
        uint8, shape (K, at least ceil(count / 8)); bit i % 8 of byte i // 8 of plane k is bit k
        of code i.
    count
        Weights.

    Returns
    -------
    torch.Tensor
        int64, shape (count,), values 0 .. 2**K - 1.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    bits = (planes.unsqueeze(-1) >> shifts) & 1
    flat = bits.flatten(1)[:, :count].long()
    places = torch.arange(planes.shape[0], device=planes.device).unsqueeze(1)
    return (flat << places).sum(0)


def reconstruct(
    base: torch.Tensor,
    planes: torch.Tensor | None,
    vector: torch.Tensor | None,
    levels: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Base + levels[code] * vector in float32, each step rounded, then rounded to `dtype`.

    Parameters
    ----------
    base
        Shape (n,), float32, bfloat16 or float16.
    planes
        uint8, shape (K, at least ceil(n / 8)); None stands for K = 0: the base alone.
    vector
        Shape (n,), a floating dtype; None stands for 1.
    levels
        2**K coefficients.
    dtype
        Of the result.
    """
    if planes is None:
        return base.to(dtype)
    table = torch.tensor(levels, dtype=torch.float32, device=base.device)
    step = table[codes(planes, base.numel())]
    if vector is not None:
        step = step * vector.float()
    return (base.float() + step).to(dtype)


def pack(flags: torch.Tensor) -> torch.Tensor:
    """Bits of a bool tensor of shape (n,), LSB-first: uint8, shape (ceil(n / 8),), padded by 0."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.numel() % 8))
    places = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def encode_tall(
    base: torch.Tensor, vector: torch.Tensor, finetuned: torch.Tensor, *, tall_lambda: float
) -> torch.Tensor:
    """``|base - finetuned| > |(base + vector) - finetuned| * lambda``: the TALL mask of a task.

    Parameters
    ----------
    base, vector, finetuned
        Shape (n,), floating dtypes; float32 arithmetic, each step rounded, in this order.
    tall_lambda
        The threshold's factor, rounded to float32.

    Returns
    -------
    torch.Tensor
        bool, shape (n,).
    """
    from_base, from_merged = _errors(base, vector, finetuned)
    factor = torch.tensor(tall_lambda, dtype=torch.float32, device=base.device)
    return from_base.abs() > from_merged.abs() * factor


def _errors(
    base: torch.Tensor, vector: torch.Tensor, finetuned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from_base = base.float() - finetuned.float()
    return from_base, (base.float() + vector.float()) - finetuned.float()


def tall_sums(
    base: torch.Tensor, vector: torch.Tensor, finetuned: torch.Tensor, mask: torch.Tensor
) -> TallSums:
    """The sums of one tensor, as `sums.reduce_sums` gives them, with one row.

    Parameters
    ----------
    base, vector, finetuned
        As in `encode_tall`.
    mask
        What it returned.
    """
    from_base, from_merged = _errors(base, vector, finetuned)
    error = torch.where(mask, from_merged, from_base)
    return TallSums(
        ones=mask.sum()[None],
        moved=from_base.double().square().sum()[None],
        error=error.double().square().sum()[None],
        same=_same(base, finetuned),
        finite=from_base.isfinite().all()[None],
    )


def _same(base: torch.Tensor, finetuned: torch.Tensor) -> torch.Tensor:
    if base.dtype != finetuned.dtype:
        return torch.zeros(1, dtype=torch.bool, device=base.device)
    word = _WORDS[base.element_size()]
    return (base.view(word) == finetuned.view(word)).all()[None]


def encode_levels(
    base: torch.Tensor,
    vector: torch.Tensor | None,
    finetuned: torch.Tensor,
    levels: Sequence[float],
) -> torch.Tensor:
    """The first c of those that minimize ``|(finetuned - base) - levels[c] * vector|``.

    Parameters
    ----------
    base, finetuned
        Shape (n,), floating dtypes; float32 arithmetic, each step rounded.
    vector
        The same; None stands for 1.
    levels
        2**K coefficients, rounded to float32.

    Returns
    -------
    torch.Tensor
        int64, shape (n,): 0 .. 2**K - 1. A distance that is NaN counts as infinite.
    """
    return _distances(base, vector, finetuned, levels).argmin(0)


def _distances(
    base: torch.Tensor,
    vector: torch.Tensor | None,
    finetuned: torch.Tensor,
    levels: Sequence[float],
) -> torch.Tensor:
    table = torch.tensor(levels, dtype=torch.float32, device=base.device).unsqueeze(1)
    steps = table if vector is None else table * vector.float()
    distances = ((finetuned.float() - base.float()) - steps).abs()
    return distances.nan_to_num(nan=float("inf"), posinf=float("inf"))


def level_sums(
    base: torch.Tensor,
    vector: torch.Tensor | None,
    finetuned: torch.Tensor,
    levels: Sequence[float],
    code: torch.Tensor,
) -> LevelSums:
    """The sums of one tensor, as `sums.reduce_sums` gives them, with one row.

    Parameters
    ----------
    base, vector, finetuned, levels
        As in `encode_levels`.
    code
        What it returned.
    """
    error = _distances(base, vector, finetuned, levels).gather(0, code[None])
    moved = finetuned.float() - base.float()
    scale = torch.ones_like(moved) if vector is None else vector.float()
    chosen = torch.nn.functional.one_hot(code, len(levels)).bool()
    zero = torch.zeros((), dtype=torch.float64, device=base.device)

    def by_code(values: torch.Tensor) -> torch.Tensor:
        return torch.where(chosen, values.double().unsqueeze(1), zero).sum(0)[None]

    return LevelSums(
        counts=chosen.sum(0)[None],
        products=by_code(moved.double() * scale.double()),
        squares=by_code(scale.double().square()),
        moved=moved.double().square().sum()[None],
        error=error.double().square().sum()[None],
        same=_same(base, finetuned),
        finite=error.isfinite().all()[None],
    )


def _flags(masks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Packed masks, shape (T, bytes), as 0 and 1: uint8, shape (T, stop - start)."""
    places = torch.arange(8, dtype=torch.uint8, device=masks.device)
    return ((masks.unsqueeze(-1) >> places) & 1).flatten(1)[:, start:stop]


def count_uses(masks: torch.Tensor, *, stop: int, start: int = 0) -> torch.Tensor:
    """How many of T packed masks, uint8 of shape (T, bytes), have the bit of each weight set.

    Returns
    -------
    torch.Tensor
        uint8, shape (stop - start,).
    """
    return _flags(masks, start, stop).sum(0, dtype=torch.uint8)


def at_least(masks: torch.Tensor, least: int, *, stop: int, start: int = 0) -> torch.Tensor:
    """The packed mask of the weights with at least `least` uses (arXiv 2405.07813, section 4.3)."""
    return pack(count_uses(masks, stop=stop, start=start) >= least)


def use_histogram(masks: torch.Tensor, *, stop: int, start: int = 0) -> torch.Tensor:
    """How many weights have 0, 1, .. T uses: int64, shape (T + 1,)."""
    uses = count_uses(masks, stop=stop, start=start)
    return torch.bincount(uses, minlength=masks.shape[0] + 1)


def overlaps(masks: torch.Tensor, *, stop: int, start: int = 0) -> torch.Tensor:
    """How many weights each two masks share: int64, shape (T, T)."""
    # Sums of ones are exact in float64 up to 2**53.
    flags = _flags(masks, start, stop).double()
    return (flags @ flags.T).long()


def add_residual(predicted: torch.Tensor, zigzag: torch.Tensor) -> torch.Tensor:
    """``unordered(ordered(predicted) + unzigzag(zigzag))``, modulo the word.

    Parameters
    ----------
    predicted
        Shape (n,), elements of 1, 2, 4 or 8 bytes; the bit patterns of floats are ordered as the
        floats are, others as they stand.
    zigzag
        Shape (n,), any dtype of that size.

    Returns
    -------
    torch.Tensor
        The shape and dtype of `predicted`.
    """
    word = _WORDS[predicted.element_size()]
    top = 8 * word.itemsize - 1
    bits, folded = predicted.view(word).long(), zigzag.view(word).long()
    # The words are signed: what a shift brings in from the left is masked off.
    difference = ((folded >> 1) & ((1 << top) - 1)) ^ -(folded & 1)
    if not predicted.is_floating_point():
        return (bits + difference).to(word).view(predicted.dtype)
    # Negative floats with every bit flipped, the others with the sign.
    least = torch.iinfo(word).min
    ordered = bits ^ ((bits >> top) | least)
    total = (ordered + difference).to(word).long()
    return (total ^ (~(total >> top) | least)).to(word).view(predicted.dtype)


def dequantize(
    values: torch.Tensor, scales: torch.Tensor, count: int, *, bits: int, signed: bool
) -> torch.Tensor:
    """``float32(q) * scale`` of the first `count` weights, one rounding.

    Parameters
    ----------
    values
        uint8, shape (at least ceil(count * bits / 8),): a weight a byte, or two, the first in the
        lower half; two's complement where `signed`.
    scales
        bfloat16, shape (at least ceil(count / SCALED),).
    bits
        8 or 4.

    Returns
    -------
    torch.Tensor
        float32, shape (count,).
    """
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], dim=1).flatten()
    number = values[:count].int()
    if signed:
        half = 1 << bits - 1
        number = (number ^ half) - half
    places = torch.arange(count, device=values.device) // SCALED
    return number.float() * scales.float()[places]
