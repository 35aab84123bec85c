"""Unpacking, and counting over the packed masks of several tasks, wherever the masks are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from tallstore import counting
from tallstore.counting import Tally
from tallstore.errors import MismatchError, OptionError
from tallstore.kernels import reference
from tallstore.layout import BLOCK
from tallstore.ops.backend import choose_backend, same_device
from tallstore.ops.checks import check_planes

__all__ = [
    "Tally",
    "at_least",
    "count_uses",
    "mask_overlaps",
    "tally",
    "unpack",
    "use_histogram",
]

#: Tasks that the kernels count over.
_MOST: Final = 64


def unpack(planes: torch.Tensor, out: torch.Tensor, *, backend: str | None = None) -> None:
    """Fill `out` with the codes of packed weights.

    Parameters
    ----------
    planes
        uint8, shape (K, at least ceil(n / 8)), K = 1..4, LSB-first.
    out
        Shape (n,): uint8 for codes 0 .. 2**K - 1, or bool where K = 1.
    backend
        See `choose_backend`; the CPU has the reference alone.

    Raises
    ------
    MismatchError
        Shapes, dtypes or devices clash; nothing was written.
    DeviceError
        The backend cannot run there.
    """
    device = same_device(planes=planes, out=out)
    count = check_planes(planes, out.numel())
    allowed = (torch.uint8, torch.bool) if count == 1 else (torch.uint8,)
    if out.dtype not in allowed or out.dim() != 1 or not out.is_contiguous():
        raise MismatchError(
            f"out: {out.dtype}, shape {tuple(out.shape)}; contiguous "
            f"{' or '.join(map(str, allowed))}, one dimension, is needed"
        )
    if choose_backend(device, backend) == "triton":
        from tallstore.kernels.unpack import unpack as launch

        launch(planes, out)
    else:
        out.copy_(reference.codes(planes, out.numel()))


def count_uses(masks: torch.Tensor, out: torch.Tensor, *, backend: str | None = None) -> None:
    """Fill `out` with how many masks use each weight.

    Parameters
    ----------
    masks
        uint8, shape (T, at least ceil(n / 8)), LSB-first; T = 1..64 on CUDA.
    out
        uint8, shape (n,).
    backend
        See `choose_backend`; the CPU has the reference alone.

    Raises
    ------
    MismatchError, OptionError, DeviceError
    """
    device = same_device(masks=masks, out=out)
    if out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous():
        raise MismatchError(f"out: {out.dtype}, shape {tuple(out.shape)}; uint8, (n,), is needed")
    if _on_triton(masks, out.numel(), device, backend):
        from tallstore.kernels.count import count_uses as launch

        launch(masks, out)
    else:
        out.copy_(reference.count_uses(masks, stop=out.numel()))


def at_least(
    masks: torch.Tensor, k: int, weights: int, *, backend: str | None = None
) -> torch.Tensor:
    """The weights that at least `k` masks use, packed: the mask of Consensus Merging.

    arXiv 2405.07813, equation 6.

    Parameters
    ----------
    masks
        As for `count_uses`, of at least `weights` weights.
    k
        0 gives ones, more than T zeros.

    Returns
    -------
    torch.Tensor
        uint8, shape (ceil(weights / 8),), LSB-first; the last byte's bits past `weights` are 0.

    Raises
    ------
    MismatchError, OptionError, DeviceError
    """
    if k < 0:
        raise OptionError(f"k={k}: a number of masks, 0 or more, is needed")
    if _on_triton(masks, weights, masks.device, backend):
        from tallstore.kernels.count import at_least as launch

        size = (weights + 7) // 8
        out = torch.empty(size, dtype=torch.uint8, device=masks.device)
        launch(masks, min(k, masks.shape[0] + 1), out, stop=weights)
        return out
    return reference.at_least(masks, k, stop=weights)


def use_histogram(
    masks: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """How many weights 0, 1, .. T masks use: int64, shape (T + 1,).

    Parameters
    ----------
    masks
        As for `count_uses`.
    start, stop
        The weights to count; `start` is a multiple of 1024.

    Raises
    ------
    MismatchError, OptionError, DeviceError
    """
    stop = _stop(masks, start, stop)
    if _on_triton(masks, stop, masks.device, backend):
        from tallstore.kernels.count import use_histogram as launch

        count = masks.shape[0] + 1
        out = torch.empty(count, dtype=torch.int64, device=masks.device)
        launch(masks, out, start=start, stop=stop)
        return out
    return reference.use_histogram(masks, start=start, stop=stop)


def mask_overlaps(
    masks: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """How many weights each two masks both use: int64, shape (T, T), symmetric.

    Parameters
    ----------
    masks, start, stop
        As for `use_histogram`.

    Raises
    ------
    MismatchError, OptionError, DeviceError
    """
    stop = _stop(masks, start, stop)
    if _on_triton(masks, stop, masks.device, backend):
        from tallstore.kernels.overlaps import overlaps as launch

        count = masks.shape[0]
        out = torch.empty((count, count), dtype=torch.int64, device=masks.device)
        launch(masks, out, start=start, stop=stop)
        return out
    return reference.overlaps(masks, start=start, stop=stop)


def tally(
    masks: torch.Tensor, starts: Sequence[int], weights: int, *, backend: str | None = None
) -> Tally:
    """Ones, ones of one mask alone, and use, for each run of weights; see `counting.tally`.

    Parameters
    ----------
    masks
        As for `count_uses`, of at least `weights` weights.
    starts
        First weight of each run, ascending from 0: multiples of 1024.

    Raises
    ------
    MismatchError, OptionError, DeviceError
    """
    if choose_backend(masks.device, backend) == "cpu":
        return counting.tally(list(masks.numpy()), starts, weights)
    alone = at_least(masks, 1, weights, backend=backend)
    alone ^= at_least(masks, 2, weights, backend=backend)
    single = masks[:, : alone.numel()] & alone
    columns = []
    for start, stop in zip(starts, [*starts[1:], weights], strict=True):
        part = {"start": start, "stop": stop, "backend": backend}
        columns.append(
            torch.stack(
                [
                    mask_overlaps(masks, **part).diagonal(),  # type: ignore[arg-type]
                    mask_overlaps(single, **part).diagonal(),  # type: ignore[arg-type]
                    use_histogram(masks, **part)[1:],  # type: ignore[arg-type]
                ]
            )
        )
    found = np.asarray(torch.stack(columns, 2).cpu())
    return Tally(*found)


def _stop(masks: torch.Tensor, start: int, stop: int | None) -> int:
    end = masks.shape[-1] * 8 if stop is None else stop
    if start % BLOCK or not 0 <= start <= end:
        raise MismatchError(f"weights {start} to {end}: a part starts at a multiple of {BLOCK}")
    return end


def _on_triton(
    masks: torch.Tensor, weights: int, device: torch.device, backend: str | None
) -> bool:
    """Whether the kernels do it, after the masks were looked at."""
    if masks.dtype != torch.uint8 or masks.dim() != 2 or not masks.shape[0]:
        raise MismatchError(
            f"masks: {masks.dtype}, shape {tuple(masks.shape)}; uint8, (tasks, bytes), is needed"
        )
    if masks.shape[1] * 8 < weights:
        raise MismatchError(f"masks of {masks.shape[1]} bytes for {weights} weights")
    if masks.shape[1] > 1 and masks.stride(1) != 1:
        raise MismatchError("masks: the bytes of a mask must lie one after the other")
    triton = choose_backend(device, backend) == "triton"
    if triton and masks.shape[0] > _MOST:
        raise OptionError(
            f"{masks.shape[0]} masks; {_MOST} can be counted together on {device}: name fewer "
            "tasks, or count on the CPU"
        )
    return triton
