"""Which tensors of a model share memory, told from addresses, shapes and strides alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

__all__ = ["address", "overlaps_itself", "sharing"]

#: Steps that numpy may take to tell whether two tensors share an element. Views that models are
#: made of, columns and every second row, take a few.
_STEPS: Final[Any] = 1_000_000


def address(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two tensors have in common that are the same elements."""
    return (
        tensor.data_ptr(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
        *tensor.shape,
        *tensor.stride(),
    )


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor are one in memory: it is expanded, or made by as_strided."""
    reach, doubtful = 1, False
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            doubtful = doubtful or step < reach
            reach += (size - 1) * step
    if not doubtful or not tensor.numel():
        return False
    if tensor.numel() > reach:
        return True
    # As large as the memory that the tensor spans, a byte for an element.
    met = np.zeros(reach, np.bool_)
    np.lib.stride_tricks.as_strided(met, tuple(tensor.shape), tensor.stride())[...] = True
    return int(np.count_nonzero(met)) < tensor.numel()


def sharing(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Names of tensors that have some elements in common, but are not the same.

    Views that lie between each other, such as columns of a matrix, have none. Where that would
    take too long to tell, they are said to have some.
    """
    names: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            names[address(tensor)].append(name)
    alike = list(names.values())
    extents = sorted((*_extent(tensors[some[0]]), number) for number, some in enumerate(alike))
    open_: list[tuple[int, int]] = []
    for first, after, number in extents:
        open_ = [(end, other) for end, other in open_ if end > first]
        for _, other in open_:
            if _share(tensors[alike[other][0]], tensors[alike[number][0]]):
                one, two = sorted((other, number))  # as the model has them
                yield from ((a, b) for a in alike[one] for b in alike[two])
        open_.append((after, number))


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor in memory, and the one after its last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        return np.shares_memory(_array(one), _array(other), max_work=_STEPS)
    except np.exceptions.TooHardError:
        return True


class _Memory:
    """Memory as numpy takes it; nothing is ever read there, so it may be a device's."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    size = tensor.element_size()
    return np.asarray(
        _Memory(
            {
                "version": 3,
                "data": (tensor.data_ptr(), True),
                "typestr": f"|V{size}",
                "shape": tuple(tensor.shape),
                "strides": tuple(step * size for step in tensor.stride()),
            }
        )
    )
