"""BitDelta: the sign of every weight and one magnitude a matrix.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", arXiv 2402.10193, section 3.1,
without the distillation of the scales (section 3.1, stage 2), which needs data. As in the paper
the vectors (biases, norms) are kept; here in 16 bits.
"""

from __future__ import annotations

import torch

from bench.rivals.vectors import SCALE_BITS, Coded, Vectors, entropy


def bitdelta(vectors: Vectors) -> Coded:
    """Code each matrix as sign times mean magnitude, the least-squares choice."""
    coded, total = {}, 0.0
    for task, vector in vectors.tasks.items():
        out = torch.empty_like(vector)
        pieces = zip(
            vectors.layout.shapes,
            vectors.layout.pieces(vector),
            vectors.layout.pieces(out),
            strict=True,
        )
        for shape, piece, target in pieces:
            if len(shape) < 2:
                target.copy_(piece.half())
                total += 16 * piece.numel() if bool(piece.any()) else 0
            else:
                target.copy_(torch.where(piece > 0, 1.0, -1.0) * piece.abs().mean())
                ones = int((piece > 0).sum())
                total += entropy([ones, piece.numel() - ones]) + SCALE_BITS
        coded[task] = out
    return Coded(coded, total / (vectors.layout.weights * len(coded)))
