"""Task-vector quantization (TVQ): every weight rounded to one of 2**bits values.

Kim et al., "Task Vector Quantization for Memory-Efficient Model Merging", arXiv 2503.06921,
section 4.1: asymmetric uniform quantization of each tensor between its least and largest value.
"""

from __future__ import annotations

import torch

from bench.rivals.vectors import SCALE_BITS, Coded, Vectors, entropy


def tvq(vectors: Vectors, *, bits: int) -> Coded:
    """Quantize every tensor; the symbols are charged their entropy, which is below ``bits``."""
    coded, total = {}, 0.0
    for task, vector in vectors.tasks.items():
        out = torch.zeros_like(vector)
        both = zip(vectors.layout.pieces(vector), vectors.layout.pieces(out), strict=True)
        for piece, target in both:
            low, high = piece.min(), piece.max()
            if low == high:
                continue  # as those of the base that training leaves alone
            size = (high - low) / (2**bits - 1)
            symbols = ((piece - low) / size).round()
            target.copy_(symbols * size + low)
            total += entropy(torch.bincount(symbols.long())) + 2 * SCALE_BITS
        coded[task] = out
    return Coded(coded, total / (vectors.layout.weights * len(coded)))
