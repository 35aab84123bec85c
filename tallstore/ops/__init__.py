"""The arithmetic of codes: on CUDA tensors by Triton kernels, on CPU tensors by the CPU path.

The only importer of `tallstore.kernels`. Every operation takes ``backend=``; all backends give
the same bits.
"""

from __future__ import annotations

from tallstore.ops.backend import Backend, choose_backend
from tallstore.ops.reconstruction import TALL_LEVELS, reconstruct

__all__ = ["TALL_LEVELS", "Backend", "choose_backend", "reconstruct"]
