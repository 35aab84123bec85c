"""Codes that drop most weights: magnitude pruning, DARE, ComPEFT, T-Switch, UltraDelta."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.rivals.vectors import SCALE_BITS, Coded, Vectors, entropy, kept_count, largest

VALUE_BITS = 8


def _eight_bits(values: Tensor) -> Tensor:
    if not values.numel():  # so few of a small tensor's weights are none
        return values
    scale = values.abs().max() / 127
    return values if scale == 0 else (values / scale).round() * scale


def magnitude(vectors: Vectors, *, density: float) -> Coded:
    """Keep the largest weights of each tensor, in 8 bits, and leave the others the base.

    Han et al., "Learning both Weights and Connections", arXiv 1506.02626, section 3, applied to
    task vectors. Eight bits lose nothing that shows and cost half of what sixteen would.
    """
    coded, total = {}, 0.0
    for task, vector in vectors.tasks.items():
        out = torch.zeros_like(vector)
        both = zip(vectors.layout.pieces(vector), vectors.layout.pieces(out), strict=True)
        for piece, target in both:
            mask = largest(piece, kept_count(piece.numel(), density))
            target[mask] = _eight_bits(piece[mask])
            kept = int(mask.sum())
            total += entropy([kept, piece.numel() - kept]) + VALUE_BITS * kept + SCALE_BITS
        coded[task] = out
    return Coded(coded, total / (vectors.layout.weights * len(coded)))


def dare(vectors: Vectors, *, density: float, seed: int) -> Coded:
    """Drop weights at random and divide the others by the share that stays.

    Yu et al., "Language Models are Super Mario", arXiv 2311.03099, section 3.1. The places are
    charged nothing, since the generator's seed gives them; the values are in 16 bits.
    """
    coded, total = {}, 0.0
    for index, (task, vector) in enumerate(vectors.tasks.items()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        mask = torch.rand(vector.shape, generator=generator) < density
        coded[task] = torch.where(mask, vector.bfloat16().float() / density, 0.0)
        total += 16 * int(mask.sum())
    return Coded(coded, total / (vectors.layout.weights * len(coded)))


def compeft(vectors: Vectors, *, density: float, alpha: float) -> Coded:
    """Signs of the largest weights of the whole vector times alpha standard deviations.

    Yadav et al., "ComPEFT: Compression for Communicating Parameter Efficient Updates via
    Sparsification and Quantization", arXiv 2311.13171, section 2 (algorithm 1): top k % by
    magnitude, ternary, scale alpha * std(tau), alpha by validation.
    """
    coded, total = {}, 0.0
    for task, vector in vectors.tasks.items():
        mask = largest(vector, kept_count(vector.numel(), density))
        kept = int(mask.sum())
        coded[task] = vector.sign() * mask * (alpha * vector.std())
        total += entropy([kept, vector.numel() - kept]) + kept + SCALE_BITS
    return Coded(coded, total / (vectors.layout.weights * len(coded)))


def t_switch(vectors: Vectors, *, density: float) -> Coded:
    """Signs of the largest weights of each tensor, scaled to the tensor's norm.

    Qi et al., "Less is More: Efficient Model Merging with Binary Task Switch", arXiv 2412.00054,
    section 4.1: activation switch, polarity switch, and a knob that restores the norm.
    """
    coded, total = {}, 0.0
    for task, vector in vectors.tasks.items():
        out = torch.zeros_like(vector)
        both = zip(vectors.layout.pieces(vector), vectors.layout.pieces(out), strict=True)
        for piece, target in both:
            mask = largest(piece, kept_count(piece.numel(), density))
            kept = int(mask.sum())
            if kept:
                target.copy_(piece.sign() * mask * (piece.norm() / math.sqrt(kept)))
            total += entropy([kept, piece.numel() - kept]) + kept + SCALE_BITS
        coded[task] = out
    return Coded(coded, total / (vectors.layout.weights * len(coded)))


def ultradelta(
    vectors: Vectors, *, density: float, factor: float, seed: int, bits: int = 4, step: float = 0.01
) -> Coded:
    """Quantize each tensor, drop at random within each value, rescale.

    Wang et al., "Breaking the Compression Ceiling: Data-Free Pipeline for Ultra-Efficient Delta
    Compression", arXiv 2505.13563, section 3: tensors in thirds by standard deviation, the low
    third sparser by ``step`` and the high one denser by as much; uniform quantization to ``bits``;
    dropping within each value; 1/(1 - s) times a further factor, which the paper reads off the
    trace norm and which is chosen by validation here. Dropping within each value is dropping at
    random with less variance: a seed gives the places once the values are known, which takes the
    codes of all weights, so the places are charged with the values: the entropy of what is left.
    """
    coded, total = {}, 0.0
    weights = vectors.layout.weights
    for index, (task, vector) in enumerate(vectors.tasks.items()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        pieces = list(vectors.layout.pieces(vector))
        order = sorted(range(len(pieces)), key=lambda i: float(pieces[i].std(correction=0)))
        densities, passed = [0.0] * len(pieces), 0
        step_here = min(step, density / 2)
        for i in order:
            passed += pieces[i].numel()
            third = min(2, (3 * passed - 1) // weights)
            densities[i] = min(1.0, density + (third - 1) * step_here)
        out = torch.zeros_like(vector)
        for piece, target, rate in zip(pieces, vectors.layout.pieces(out), densities, strict=True):
            low, high = piece.min(), piece.max()
            if low == high:
                continue
            size = (high - low) / (2**bits - 1)
            symbols = ((piece - low) / size).round()
            # In a random order sorted by symbol, each symbol's first share stays.
            shuffled = torch.randperm(piece.numel(), generator=generator)
            by_symbol = shuffled[symbols[shuffled].argsort(stable=True)]
            counts = torch.bincount(symbols.long(), minlength=2**bits)
            starts = counts.cumsum(0) - counts
            rank = torch.arange(piece.numel()) - starts.repeat_interleave(counts)
            stays = rank < (counts * rate).round().repeat_interleave(counts)
            kept = by_symbol[stays]
            target[kept] = (symbols[kept] * size + low) / density * factor
            left = torch.bincount(symbols[kept].long(), minlength=2**bits)
            total += entropy([*left.tolist(), piece.numel() - len(kept)]) + 2 * SCALE_BITS
        coded[task] = out
    return Coded(coded, total / (weights * len(coded)))
