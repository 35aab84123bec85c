"""From weights to codes and residuals, on the CPU, in float32.

Works on pieces that fit the cache; the callers cut. numpy throughout: bfloat16 comes and goes as
uint16 bit patterns, since numpy has no such dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from tallstore import compiling
from tallstore.bits import count_bits, pack_bits
from tallstore.codecs.ordered import ordered, unordered, unzigzag, zigzag
from tallstore.dtypes import itemsize, torch_dtype

__all__ = [
    "Bytes",
    "CodeStats",
    "add_residual",
    "from_float32",
    "residual",
    "tall_mask",
    "to_float32",
]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_UNSIGNED: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: Words of a piece that stays in the cache.
_PIECE: Final = 1 << 14
_ORDERED: Final = frozenset({"float16", "bfloat16", "float32", "float64"})
#: Of which there are compiled loops too.
_LOOPED: Final = frozenset({"float16", "bfloat16", "float32"})


def to_float32(raw: Bytes, dtype: str) -> Floats:
    """Bytes of a codable dtype as float32; a view where they are float32 already."""
    if dtype == "float32":
        return raw.view(np.float32)
    if dtype == "float16":
        return raw.view(np.float16).astype(np.float32)
    wide = raw.view(np.uint16).astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def from_float32(values: Floats, dtype: str) -> Bytes:
    """Float32 rounded to nearest even into the bytes of a codable dtype."""
    if dtype == "float32":
        return np.ascontiguousarray(values).view(np.uint8)
    if not values.size:  # torch gives nothing a stride that it then refuses
        return np.empty(0, np.uint8)
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(torch_dtype(dtype))
    raw: Bytes = tensor.view(torch.uint8).numpy()
    return raw


@dataclass(slots=True)
class CodeStats:
    """Sums over the coded weights of one tensor of one task."""

    weights: int = 0
    ones: int = 0
    moved: float = 0.0
    """Squared norm of the task vector."""
    error: float = 0.0
    """Squared norm of reconstruction minus weights."""
    projection: float = 0.0
    """Inner product of the coded task vector with the task vector; not summed for masks."""
    norm: float = 0.0
    """Squared norm of the coded task vector; not summed for masks."""
    own_moved: float = 0.0
    own_projection: float = 0.0
    """`moved` and `projection` of the checkpoint itself, where its codes are of other weights."""
    same: bool = True
    """Whether every weight equals the base's, bit for bit."""
    finite: bool = True
    """Whether every weight is finite, in the base too."""

    def add(self, other: CodeStats) -> None:
        """Take in the sums of another piece."""
        self.weights += other.weights
        self.ones += other.ones
        self.moved += other.moved
        self.error += other.error
        self.projection += other.projection
        self.norm += other.norm
        self.own_moved += other.own_moved
        self.own_projection += other.own_projection
        self.same &= other.same
        self.finite &= other.finite

    @property
    def density(self) -> float:
        """Fraction of ones."""
        return self.ones / self.weights if self.weights else 0.0

    @property
    def relative_error(self) -> float:
        """Norm of the error over the norm of the task vector; 0 where nothing moved."""
        return float(np.sqrt(self.error / self.moved)) if self.moved else 0.0


def _square_sum(values: Floats) -> float:
    # In float64 over short rows: float32 sums of a few million squares lose digits.
    return float(np.einsum("i,i->", values, values, dtype=np.float64, casting="same_kind"))


def tall_mask(
    base: Floats, merged: Floats, finetuned: Floats, *, tall_lambda: float
) -> tuple[npt.NDArray[np.bool_], Floats, Floats]:
    """The TALL mask of one task: ``|base - finetuned| > |merged - finetuned| * lambda``.

    The paper's rule (arXiv 2405.07813, equation 5) in the reference's order of operations, all in
    float32, strictly greater.

    Parameters
    ----------
    base, finetuned
        Float32, shape (n,).
    merged
        base + shared vector, rounded to float32, with the vector as it is stored.
    tall_lambda
        The threshold's factor, rounded to float32.

    Returns
    -------
    mask
        Bool, shape (n,).
    from_base, from_merged
        base - finetuned and merged - finetuned: what the reconstruction errs by where the bit is
        0 and 1.
    """
    from_base = base - finetuned
    from_merged = merged - finetuned
    scaled = np.abs(from_merged)
    np.multiply(scaled, np.float32(tall_lambda), out=scaled)
    return np.abs(from_base) > scaled, from_base, from_merged


def encode_tall(
    base: Floats, merged: Floats, finetuned: Floats, *, tall_lambda: float
) -> tuple[Bytes, CodeStats]:
    """Packed TALL mask of one piece, and its sums; `same` is left to the caller."""
    mask, from_base, from_merged = tall_mask(base, merged, finetuned, tall_lambda=tall_lambda)
    moved = _square_sum(from_base)
    np.copyto(from_base, from_merged, where=mask)
    error = _square_sum(from_base)
    packed = pack_bits(mask)
    # Finite weights so far apart that their difference is not cannot be coded either.
    finite = bool(np.isfinite(moved + error))
    return packed, CodeStats(base.size, count_bits(packed), moved, error, same=False, finite=finite)


def residual(actual: Bytes, predicted: Bytes, dtype: str) -> Bytes:
    """The exact tier: zigzag of the integer difference of two runs of bit patterns.

    Parameters
    ----------
    actual, predicted
        Bytes of elements of `dtype`, of 1, 2, 4 or 8 bytes each.

    Returns
    -------
    numpy.ndarray
        uint8, the same size: ``z = (d << 1) ^ (d >> all)`` of ``d = ordered(actual) -
        ordered(predicted)`` modulo the word, little endian.
    """
    kind = _UNSIGNED[itemsize(dtype)]
    one, other, out = actual.view(kind), predicted.view(kind), np.empty_like(actual)
    words = out.view(kind)
    for at in _pieces(words.size):
        if dtype in _ORDERED:
            words[at] = zigzag(ordered(one[at]) - ordered(other[at]))
        else:
            words[at] = zigzag(one[at] - other[at])
    return out


def _pieces(count: int) -> Iterator[slice]:
    """Of whole arrays each step would take new memory, which costs more than the arithmetic."""
    for start in range(0, count, _PIECE):
        yield slice(start, start + _PIECE)


def add_residual(predicted: Bytes, folded: Bytes, dtype: str, out: Bytes | None = None) -> Bytes:
    """The inverse of `residual`: the actual bytes, in `out` if it is given.

    That may be `predicted` itself.
    """
    kind = _UNSIGNED[itemsize(dtype)]
    out = np.empty_like(predicted) if out is None else out
    known, differences, words = predicted.view(kind), folded.view(kind), out.view(kind)
    if dtype in _LOOPED and compiling.loaded() and _aligned(known, differences, words):
        from tallstore.codecs.orderedloops import add

        top = np.uint32(1 << 8 * words.itemsize - 1)
        places = (array.ctypes.data for array in (known, differences, words))
        add(*places, words.size, top, np.empty(0, kind))
        return out
    for at in _pieces(words.size):
        if dtype in _ORDERED:
            words[at] = unordered(ordered(known[at]) + unzigzag(differences[at]))
        else:
            words[at] = known[at] + unzigzag(differences[at])
    return out


def _aligned(*arrays: npt.NDArray[Any]) -> bool:
    return all(array.flags.aligned for array in arrays)
