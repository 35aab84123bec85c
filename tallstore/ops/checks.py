"""What every operation asks of its tensors, before anything is launched."""

from __future__ import annotations

from typing import Final

import torch

from tallstore.errors import MismatchError
from tallstore.layout import BLOCK

__all__ = ["check_part", "check_planes", "check_rows", "check_table", "check_weights"]

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PLANES: Final = 4


def check_weights(count: int, **tensors: torch.Tensor | None) -> None:
    """Refuse what is not `count` weights, one after the other, of a dtype that can be coded.

    Raises
    ------
    MismatchError
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS:
            raise MismatchError(
                f"{name}: dtype {tensor.dtype} has no codes; float32, bfloat16 or float16 is needed"
            )
        if tensor.dim() != 1 or tensor.numel() != count or not tensor.is_contiguous():
            raise MismatchError(
                f"{name}: shape {tuple(tensor.shape)}, a contiguous ({count},) is needed"
            )
        _check_address(name, tensor)


def check_planes(planes: torch.Tensor | None, weights: int) -> int:
    """How many planes there are, checked to be packed bits of at least `weights` weights.

    Raises
    ------
    MismatchError
    """
    if planes is None:
        return 0
    if planes.dtype != torch.uint8 or planes.dim() != 2:
        raise MismatchError(
            f"planes: {planes.dtype}, shape {tuple(planes.shape)}; uint8, (K, bytes), is needed"
        )
    if not 1 <= planes.shape[0] <= _MOST_PLANES:
        raise MismatchError(f"{planes.shape[0]} planes; 1 to {_MOST_PLANES} are possible")
    if planes.shape[1] * 8 < weights:
        raise MismatchError(f"planes of {planes.shape[1]} bytes for {weights} weights")
    if planes.shape[1] > 1 and planes.stride(1) != 1:
        raise MismatchError("planes: the bytes of a plane must lie one after the other")
    return planes.shape[0]


def check_table(levels: torch.Tensor, width: int) -> None:
    """Refuse what is not rows of `width` levels.

    Raises
    ------
    MismatchError
    """
    fits = levels.dim() == 2 and levels.dtype == torch.float32 and levels.is_contiguous()
    if not fits or levels.shape[1] != width or not levels.shape[0]:
        raise MismatchError(
            f"levels: {levels.dtype}, shape {tuple(levels.shape)}; contiguous float32, "
            f"shape (rows, {width}), is needed"
        )


def check_rows(rows: torch.Tensor | None, count: int, weights: int) -> None:
    """Refuse what is not a row, of `count`, for each block of `weights` weights.

    On a GPU the values are the caller's duty: looking at them would make it wait.

    Raises
    ------
    MismatchError
    """
    if rows is None:
        return
    blocks = -(-weights // BLOCK)
    if rows.dtype != torch.int32 or rows.dim() != 1 or rows.numel() < blocks:
        raise MismatchError(
            f"rows: {rows.dtype}, shape {tuple(rows.shape)}; int32, at least ({blocks},), is needed"
        )
    here = rows.device.type == "cpu" and rows.numel()
    if here and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise MismatchError(f"rows: a row outside the {count} of the levels")


def check_part(start: int, stop: int, weights: int) -> None:
    """Refuse a part of `weights` weights that does not start at a block.

    Raises
    ------
    MismatchError
    """
    if start % BLOCK or not 0 <= start <= stop <= weights:
        raise MismatchError(
            f"weights {start} to {stop} of {weights}: a part starts at a multiple of {BLOCK}"
        )


def _check_address(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type != "meta" and tensor.data_ptr() % tensor.element_size():
        raise MismatchError(
            f"{name}: starts at an address that is no multiple of its {tensor.element_size()}-byte "
            "elements; clone it"
        )
