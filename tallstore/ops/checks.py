"""What every operation asks of its tensors, before anything is launched."""

from __future__ import annotations

from typing import Final

import torch

from tallstore.errors import MismatchError

__all__ = ["check_plane", "check_planes", "check_weights"]

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


def check_plane(name: str, plane: torch.Tensor, weights: int) -> None:
    """Refuse what is not one packed plane of `weights` weights.

    Raises
    ------
    MismatchError
    """
    fits = plane.dtype == torch.uint8 and plane.dim() == 1 and plane.is_contiguous()
    if not fits or plane.numel() != (weights + 7) // 8:
        raise MismatchError(
            f"{name}: {plane.dtype}, shape {tuple(plane.shape)}; contiguous uint8, "
            f"({(weights + 7) // 8},), is needed"
        )


def _check_address(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type != "meta" and tensor.data_ptr() % tensor.element_size():
        raise MismatchError(
            f"{name}: starts at an address that is no multiple of its {tensor.element_size()}-byte "
            "elements; clone it"
        )
