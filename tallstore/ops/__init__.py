"""The arithmetic of codes: on CUDA tensors by Triton kernels, on CPU tensors by the CPU path.

The only importer of `tallstore.kernels`. Every operation takes ``backend=``; all backends give
the same bits.
"""

from __future__ import annotations

from tallstore.ops.backend import Backend, choose_backend
from tallstore.ops.counting import (
    at_least,
    count_uses,
    mask_overlaps,
    tally,
    unpack,
    use_histogram,
)
from tallstore.ops.encoding import LevelSums, TallSums, encode_levels, encode_tall, reduce_sums
from tallstore.ops.placed import Places, listed, place, reconstruct_placed
from tallstore.ops.quantized import dequantize
from tallstore.ops.reconstruction import TALL_LEVELS, reconstruct
from tallstore.ops.residual import add_residual
from tallstore.ops.sparse import (
    DENSE_FROM,
    AnySparseCode,
    SeededCode,
    SparseCode,
    apply_sparse,
    compress_planes,
    density,
    expand_sparse,
    locate_seeded,
    restore_sparse,
    switch_sparse,
)

__all__ = [
    "DENSE_FROM",
    "TALL_LEVELS",
    "AnySparseCode",
    "Backend",
    "LevelSums",
    "Places",
    "SeededCode",
    "SparseCode",
    "TallSums",
    "add_residual",
    "apply_sparse",
    "at_least",
    "choose_backend",
    "compress_planes",
    "count_uses",
    "density",
    "dequantize",
    "encode_levels",
    "encode_tall",
    "expand_sparse",
    "listed",
    "locate_seeded",
    "mask_overlaps",
    "place",
    "reconstruct",
    "reconstruct_placed",
    "reduce_sums",
    "restore_sparse",
    "switch_sparse",
    "tally",
    "unpack",
    "use_histogram",
]
