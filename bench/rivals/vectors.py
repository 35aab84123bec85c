"""Task vectors laid end to end, and what a code makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in a flat vector."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def weights(self) -> int:
        """How many weights a vector has."""
        return sum(shape.numel() for shape in self.shapes)

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Lay tensors end to end, as float32."""
        return torch.cat([tensors[name].detach().float().flatten() for name in self.names])

    def pieces(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield a flat view of each tensor of a vector."""
        yield from torch.split(flat, [shape.numel() for shape in self.shapes])

    def tensors(self, flat: Tensor) -> dict[str, Tensor]:
        """Give views of a vector, named and shaped."""
        shaped = zip(self.names, self.shapes, self.pieces(flat), strict=True)
        return {name: piece.view(shape) for name, shape, piece in shaped}


@dataclass(frozen=True)
class Vectors:
    """The base and the task vectors of a zoo, over the tensors that every task shares with it."""

    layout: Layout
    base: Tensor
    tasks: dict[str, Tensor]

    @classmethod
    def of(cls, base: Mapping[str, Tensor], finetuned: Mapping[str, Mapping[str, Tensor]]) -> Any:
        """Subtract the base from fine-tuned models; tensors of other shapes are left out."""
        names = tuple(
            name
            for name, tensor in base.items()
            if tensor.is_floating_point()
            and all(name in s and s[name].shape == tensor.shape for s in finetuned.values())
        )
        layout = Layout(names, tuple(base[name].shape for name in names))
        start = layout.flat(base)
        tasks = {task: layout.flat(state) - start for task, state in finetuned.items()}
        return cls(layout, start, tasks)

    def state(self, own: Mapping[str, Tensor], vector: Tensor) -> dict[str, Tensor]:
        """Give a model: base plus a task vector, and what the task has of its own."""
        return {**own, **self.layout.tensors(self.base + vector)}


@dataclass(frozen=True)
class Coded:
    """Approximate task vectors and what they cost, in bits a weight and task."""

    vectors: dict[str, Tensor]
    bits: float


def entropy(counts: Sequence[float] | Tensor) -> float:
    """Return the bits that so many of each symbol take together, coded at their entropy."""
    found = torch.as_tensor(counts, dtype=torch.float64)
    found = found[found > 0]
    return float((found * (found.sum().log2() - found.log2())).sum())


def largest(piece: Tensor, count: int) -> Tensor:
    """Tell which weights of a flat tensor are its ``count`` largest in magnitude."""
    if count >= piece.numel():
        return piece != 0
    size = piece.abs()
    # Not topk: a tensor's k-th value is found in linear time.
    threshold = size.kthvalue(piece.numel() - count).values
    return size > threshold


def kept_count(numel: int, density: float) -> int:
    """Return how many weights a density leaves of a tensor, at least one."""
    return max(1, math.floor(density * numel + 0.5))


SCALE_BITS = 32.0  # what any float that a code needs is charged
BLOCK = 256


def quantized_shared(vector: Tensor, bits: int = 8) -> tuple[Tensor, float]:
    """Round a vector that all tasks share to integers with a float a block of 256.

    No paper stores it so, but none has to spend 32 bits on it either: nothing is lost, and the
    rivals that need one are charged the less for it.

    Returns
    -------
    tuple
        The vector as decoded, and its cost in bits for all tasks together.
    """
    padded = torch.nn.functional.pad(vector, (0, -vector.numel() % BLOCK)).view(-1, BLOCK)
    most = 2 ** (bits - 1) - 1
    scale = padded.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most
    decoded = ((padded / scale).round() * scale).flatten()[: vector.numel()]
    return decoded, vector.numel() * bits + padded.shape[0] * SCALE_BITS
