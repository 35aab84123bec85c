"""The arithmetic of a reconstruction in plain torch: what faster paths must equal, to the bit.

Knows torch only. Slow on purpose: one line a step, whole arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["codes", "reconstruct"]


def codes(planes: torch.Tensor, count: int) -> torch.Tensor:
    """Code of each weight.

    Parameters
    ----------
    planes
        uint8, shape (K, at least ceil(count / 8)); bit i % 8 of byte i // 8 of plane k is bit k
        of code i.
    count
        Weights.

    Returns
    -------
    torch.Tensor
        int64, shape (count,), values 0 .. 2**K - 1.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    bits = (planes.unsqueeze(-1) >> shifts) & 1
    flat = bits.flatten(1)[:, :count].long()
    places = torch.arange(planes.shape[0], device=planes.device).unsqueeze(1)
    return (flat << places).sum(0)


def reconstruct(
    base: torch.Tensor,
    planes: torch.Tensor | None,
    vector: torch.Tensor | None,
    levels: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Base + levels[code] * vector in float32, each step rounded, then rounded to `dtype`.

    Parameters
    ----------
    base
        Shape (n,), float32, bfloat16 or float16.
    planes
        uint8, shape (K, at least ceil(n / 8)); None stands for K = 0: the base alone.
    vector
        Shape (n,), a floating dtype; None stands for 1.
    levels
        2**K coefficients.
    dtype
        Of the result.
    """
    if planes is None:
        return base.to(dtype)
    table = torch.tensor(levels, dtype=torch.float32, device=base.device)
    step = table[codes(planes, base.numel())]
    if vector is not None:
        step = step * vector.float()
    return (base.float() + step).to(dtype)
