"""What codes predict of a run of weights, on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from tallstore.codecs import Bytes
from tallstore.coding import Floats, from_float32, to_float32
from tallstore.dtypes import itemsize, torch_dtype
from tallstore.ops import reconstruct
from tallstore.scratch import Scratch
from tallstore.spans import Touches

__all__ = ["predict", "scatter"]


def predict(
    base: Bytes,
    base_dtype: str,
    planes: Bytes | None,
    vector: torch.Tensor | None,
    table: torch.Tensor | None,
    rows: torch.Tensor | None,
    out: Bytes,
    dtype: str,
    scratch: Scratch,
) -> None:
    """Fill `out` with what codes predict, as bytes of `dtype`.

    Parameters
    ----------
    base
        Its bytes, of `base_dtype`.
    planes
        uint8, shape (K, bytes); None: the base is the prediction.
    vector
        Shape (n,); None stands for 1.
    table, rows
        As `tallstore.ops.reconstruct` takes levels and rows.
    """
    if planes is None or table is None:
        same = dtype == base_dtype
        np.copyto(out, base if same else from_float32(to_float32(base, base_dtype), dtype))
        return
    reconstruct(
        torch.from_numpy(base).view(torch_dtype(base_dtype)),
        torch.from_numpy(planes),
        vector,
        table,
        torch.from_numpy(out).view(torch_dtype(dtype)),
        rows=rows,
        scratch=scratch,
    )


def scatter(
    base: Bytes, base_dtype: str, touched: Touches, levels: Floats, out: Bytes, dtype: str
) -> None:
    """Fill `out` with the base, moved where codes touch it: what `predict` gives, to the bit.

    Parameters
    ----------
    touched
        Of the weights of `base`, counted from its first.
    levels
        float32, by code.
    """
    same = dtype == base_dtype
    np.copyto(out, base if same else from_float32(to_float32(base, base_dtype), dtype))
    moves = levels[touched.codes]
    with np.errstate(over="ignore"):
        if same and dtype == "float32":
            weights = out.view(np.float32)
            weights[touched.at] += moves
            return
        size, width = itemsize(base_dtype), itemsize(dtype)
        there = np.ascontiguousarray(base.reshape(-1, size)[touched.at]).reshape(-1)
        moved = from_float32(to_float32(there, base_dtype) + moves, dtype)
    out.reshape(-1, width)[touched.at] = moved.reshape(-1, width)
