"""EMR-Merging: elect one vector, then a mask and a scale a task.

Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", arXiv 2405.17461,
section 3.2: the elected sign of a weight is that of the sum, its magnitude the largest among the
tasks of that sign; a task's mask is where its sign agrees, its scale keeps the mean magnitude.
"""

from __future__ import annotations

import torch

from bench.rivals.vectors import SCALE_BITS, Coded, Vectors, entropy, quantized_shared


def emr(vectors: Vectors) -> Coded:
    """Code every task over the elected vector."""
    sign = sum(vectors.tasks.values(), torch.zeros(())).sign()
    largest = torch.zeros_like(vectors.base)
    for vector in vectors.tasks.values():
        torch.maximum(largest, vector * sign, out=largest)
    elected, total = quantized_shared(largest * sign)
    coded = {}
    for task, vector in vectors.tasks.items():
        mask = vector * elected > 0
        masked = elected * mask
        coded[task] = masked * (vector.abs().sum() / masked.abs().sum())
        total += SCALE_BITS
        for piece in vectors.layout.pieces(mask):
            ones = int(piece.sum())
            total += entropy([ones, piece.numel() - ones])
    return Coded(coded, total / (vectors.layout.weights * len(coded)))
