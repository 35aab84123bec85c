"""TALL masks: one bit a weight says where a shared vector applies to a task.

Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
arXiv 2405.07813, section 4.1 (equation 5 for the mask) with the vectors of Task Arithmetic
(Ilharco et al., arXiv 2212.04089) and of TIES (Yadav et al., arXiv 2306.01708, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.rivals.vectors import Coded, Vectors, entropy, largest, quantized_shared


def task_arithmetic(vectors: Vectors) -> Tensor:
    """Sum the task vectors."""
    return torch.stack(list(vectors.tasks.values())).sum(0)


def ties(vectors: Vectors, *, keep: float = 0.2) -> Tensor:
    """Trim to the largest 20 %, elect a sign a weight, sum those that agree (disjoint sum)."""
    trimmed = []
    for vector in vectors.tasks.values():
        kept = largest(vector, int(keep * vector.numel()))
        trimmed.append(vector * kept)
    stacked = torch.stack(trimmed)
    sign = stacked.sum(0).sign()
    return torch.where(stacked.sign() == sign, stacked, 0.0).sum(0)


def tall(vectors: Vectors, *, merge: str, tall_lambda: float) -> Coded:
    """Apply the shared vector wherever |tau| > lambda * |v - tau|."""
    merged = task_arithmetic(vectors) if merge == "ta" else ties(vectors)
    shared, total = quantized_shared(merged)
    coded = {}
    for task, vector in vectors.tasks.items():
        mask = vector.abs() > tall_lambda * (shared - vector).abs()
        coded[task] = shared * mask
        for piece in vectors.layout.pieces(mask):
            ones = int(piece.sum())
            total += entropy([ones, piece.numel() - ones])
    return Coded(coded, total / (vectors.layout.weights * len(coded)))
