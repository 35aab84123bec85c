"""What a checkpoint is made of: segments of raw elements, and tensors that view them.

A *segment* is a flat run of elements of one dtype: the used part of one torch storage, or one
tensor of a checkpoint file. Tensors that share storage are views of one segment, so aliasing
survives. These records are what sources give, what documents on disk hold, and what loading
builds tensors from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallstore.dtypes import itemsize

__all__ = ["JSON", "FileSpec", "SegmentSpec", "TensorSpec", "contiguous_stride"]

#: What strict JSON can hold.
JSON = Any


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride, in elements, of a C-contiguous tensor of `shape`, as torch reports it."""
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """A flat run of `numel` elements of `dtype`."""

    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * itemsize(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor: a strided view of a segment.

    Parameters
    ----------
    name
        Unique within its checkpoint: the key of a state dict, or the dotted path in a nest.
    segment
        Index of the segment it views.
    dtype, shape, stride, offset
        As torch has them; stride and offset count elements of `dtype` from the segment's start.
    conj, neg
        The lazy conjugate and negative bits.
    parameter, requires_grad
        Whether it was a `torch.nn.Parameter`, and its flag.
    """

    name: str
    segment: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    conj: bool = False
    neg: bool = False
    parameter: bool = False
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def geometry(self) -> tuple[object, ...]:
        """What must agree for two tensors to be the same view of like segments."""
        return (self.dtype, self.shape, self.stride, self.offset)


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A file that belongs to a checkpoint and is kept byte for byte: config, tokenizer."""

    path: str
    """Relative, with forward slashes."""
    nbytes: int
    """Size in bytes."""
