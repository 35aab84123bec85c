"""Every merge rule over whole vectors, as plainly as it can be written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NAIVE", "Shaped", "by_rows", "by_tensors", "shares"]

Floats = npt.NDArray[np.float32]
#: The slices and shapes of the tensors that make up a flat vector.
Shaped = Sequence[tuple[slice, tuple[int, ...]]]
#: Task vectors (tasks, weights), tensors, names of the tasks, masks, and what else is asked for.
Naive = Callable[..., Floats]


def add(rows: Sequence[Floats]) -> Floats:
    total = np.zeros_like(rows[0]) + rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def ta(vectors: Floats, **_: Any) -> Floats:
    return add(list(vectors))


def average(
    vectors: Floats, *, names: Sequence[str], weights: Mapping[str, float] | None = None, **_: Any
) -> Floats:
    if weights is None:
        return add(list(vectors)) / np.float32(len(vectors))
    total = sum(Fraction(w) for w in weights.values())
    factors = [np.float32(float(Fraction(weights[n]) / total)) for n in names]
    return add([row * factor for row, factor in zip(vectors, factors, strict=True)])


def ties(
    vectors: Floats,
    *,
    keep: float = 0.2,
    combine: str = "sum",
    zero_sign: str = "majority",
    **_: Any,
) -> Floats:
    count = vectors.shape[1]
    wanted = count - int(count * keep)  # the k-th smallest, as the reference has it
    limits = np.sort(np.abs(vectors), axis=1)[:, max(wanted, 1) - 1]
    trimmed = vectors * (np.abs(vectors) >= limits[:, None])
    sign = np.sign(add(list(trimmed)))
    usual = 1.0 if zero_sign == "positive" else (np.sign(sign.sum()) or -1.0)
    sign = np.where(sign == 0, usual, sign)
    agreeing = np.where(sign > 0, trimmed > 0, trimmed < 0)
    total = add(list(np.where(agreeing, trimmed, np.float32(0))))
    if combine == "mean":
        total = total / np.maximum(agreeing.sum(axis=0), 1).astype(np.float32)
    return total


def consensus(vectors: Floats, *, inner: Naive, k: int, masks: Any, **rest: Any) -> Floats:
    used = masks.sum(axis=0) >= k
    return np.where(used, inner(vectors, **rest), np.float32(0))


def by_tensors(rule: Callable[[Floats], Floats], vectors: Floats, tensors: Shaped) -> Floats:
    merged = np.zeros(vectors.shape[1], np.float32)
    for place, _ in tensors:
        merged[place] = rule(vectors[:, place])
    return merged


def by_rows(rule: Callable[[Floats], Floats], vectors: Floats, tensors: Shaped) -> Floats:
    merged = np.zeros(vectors.shape[1], np.float32)
    for place, shape in tensors:
        rows = shape[0] if len(shape) > 1 else 1
        length = (place.stop - place.start) // max(rows, 1)
        for start in range(place.start, place.stop, max(length, 1)):
            merged[start : start + length] = rule(vectors[:, start : start + length])
    return merged


def middle(vectors: Floats, beta: float, gamma: float) -> Floats:
    count = vectors.shape[1]
    kept = []
    for row in vectors:
        ordered = np.sort(np.abs(row))
        low, high = ordered[int(beta * count)], ordered[count - 1 - int(gamma * count)]
        kept.append(np.where((np.abs(row) >= low) & (np.abs(row) <= high), row, np.float32(0)))
    return add(kept)


def breadcrumbs(
    vectors: Floats, *, tensors: Shaped, beta: float = 0.85, gamma: float = 0.007, **_: Any
) -> Floats:
    return by_tensors(lambda v: middle(v, beta, gamma), vectors, tensors)


def breadcrumbs_rows(
    vectors: Floats, *, tensors: Shaped, beta: float = 0.85, gamma: float = 0.007, **_: Any
) -> Floats:
    return by_rows(lambda v: middle(v, beta, gamma), vectors, tensors)


def shares(vectors: Floats) -> list[float]:
    """Each row's share of the squares, as exactly as can be."""
    sums = [sum((Fraction(float(x)) ** 2 for x in row), Fraction(0)) for row in vectors]
    whole = sum(sums)
    return [float(s / whole) for s in sums] if whole else [1 / len(sums)] * len(sums)


def weigh(vectors: Floats, weights: Sequence[float]) -> Floats:
    return add([row * np.float32(w) for row, w in zip(vectors, weights, strict=True)])


def varm(vectors: Floats, *, tensors: Shaped, **_: Any) -> Floats:
    return by_tensors(lambda v: weigh(v, shares(v)), vectors, tensors)


def sce_tensor(vectors: Floats, select: float) -> Floats:
    if select < 1:
        wide = vectors.astype(np.float64)
        center = sum(wide) / len(wide)
        variance = (sum((row - center) ** 2 for row in wide) / len(wide)).astype(np.float32)
        wanted = int(select * np.count_nonzero(variance))
        limit = np.sort(variance)[::-1][wanted - 1] if wanted else np.float32(np.inf)
        vectors = np.where(variance >= limit, vectors, np.float32(0))
    weights = shares(vectors)
    sign = np.where(add(list(vectors)) >= 0, 1, -1)
    left = np.sign(vectors) == sign
    total = weigh(np.where(left, vectors, np.float32(0)), weights)
    divisor = weigh(left.astype(np.float32), weights)
    return total / np.where(divisor == 0, np.float32(1), divisor)


def sce(vectors: Floats, *, tensors: Shaped, select: float = 0.1, **_: Any) -> Floats:
    return by_tensors(lambda v: sce_tensor(v, select), vectors, tensors)


def kept(seed: int, task: str, place: int, drop: float) -> bool:
    """splitmix64, one weight at a time."""
    top = 1 << 64
    key = hashlib.blake2b(f"{seed}/0/{task}".encode(), digest_size=8).digest()
    word = (int.from_bytes(key, "little") + (place + 1) * 0x9E3779B97F4A7C15) % top
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % top
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % top
    return (word ^ (word >> 31)) >= int(drop * top)


def thin(vectors: Floats, names: Sequence[str], places: Any, drop: float, seed: int) -> Floats:
    flags = np.array([[kept(seed, n, int(p), drop) for p in places] for n in names])
    return np.where(flags, vectors / np.float32(1 - drop), np.float32(0))


def dare(
    vectors: Floats,
    *,
    names: Sequence[str],
    places: Any,
    drop: float = 0.9,
    seed: int = 0,
    **_: Any,
) -> Floats:
    return ta(thin(vectors, names, places, drop, seed))


def dare_ties(
    vectors: Floats,
    *,
    names: Sequence[str],
    places: Any,
    drop: float = 0.9,
    seed: int = 0,
    keep: float = 1.0,
    **_: Any,
) -> Floats:
    return ties(thin(vectors, names, places, drop, seed), keep=keep)


def consensus_ta(vectors: Floats, *, masks: Any, k: int = 2, **_: Any) -> Floats:
    return consensus(vectors, inner=ta, k=k, masks=masks)


def consensus_ties(
    vectors: Floats, *, masks: Any, k: int = 2, keep: float = 0.2, **_: Any
) -> Floats:
    return consensus(vectors, inner=ties, k=k, masks=masks, keep=keep)


def ties_mean(vectors: Floats, *, keep: float = 0.2, **_: Any) -> Floats:
    return ties(vectors, keep=keep, combine="mean")


NAIVE: Mapping[str, Naive] = {
    "ta": ta,
    "average": average,
    "ties": ties,
    "ties-mean": ties_mean,
    "consensus-ta": consensus_ta,
    "consensus-ties": consensus_ties,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs-rows": breadcrumbs_rows,
    "varm": varm,
    "sce": sce,
    "dare": dare,
    "dare-ties": dare_ties,
}
