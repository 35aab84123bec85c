"""TSV-Compress: the leading singular vectors of each matrix.

Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging",
arXiv 2412.00081, section 4.2: the first k singular triplets of each layer's task matrix; what is
not a matrix is kept. Factors and vectors are in 16 bits here.
"""

from __future__ import annotations

import torch

from bench.rivals.vectors import Coded, Vectors

FACTOR_BITS = 16


def tsv(vectors: Vectors, *, share: float) -> Coded:
    """Keep so many singular triplets that the factors have ``share`` of a matrix's weights."""
    coded, total = {}, 0.0
    for task, vector in vectors.tasks.items():
        out = torch.zeros_like(vector)
        pieces = zip(
            vectors.layout.shapes,
            vectors.layout.pieces(vector),
            vectors.layout.pieces(out),
            strict=True,
        )
        for shape, piece, target in pieces:
            if not bool(piece.any()):
                continue
            matrix = piece.view(shape[0], -1) if len(shape) > 1 else piece.view(1, -1)
            rows, columns = matrix.shape
            rank = int(share * matrix.numel() / (rows + columns))
            if len(shape) < 2:
                target.copy_(piece.half())
                total += FACTOR_BITS * piece.numel()
            elif rank:
                # A sketch a little wider than wanted, refined twice: exact to what matters here.
                torch.manual_seed(0)
                width = min(rows, columns, rank + 8)
                left, sizes, right = torch.svd_lowrank(matrix, q=width, niter=2)
                half = (left[:, :rank] * sizes[:rank]).bfloat16().float()
                target.copy_((half @ right[:, :rank].bfloat16().float().T).flatten())
                total += FACTOR_BITS * rank * (rows + columns)
        coded[task] = out
    return Coded(coded, total / (vectors.layout.weights * len(coded)))
