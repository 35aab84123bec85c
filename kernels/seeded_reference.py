"""Seeded support in plain torch: values alone are kept, a hash says which weights they are for.

The meaning of `kernels/seeded.py`. Knows torch only; no shared vector. A tensor is cut into groups
of `stride` weights, group g being weights g * stride .. min((g + 1) * stride, numel) - 1, and one
weight of each group has a value. The others are the base.

Which one **[contract]**, in unsigned 32-bit arithmetic, modulo 2**32 but for the last product::

    mix(x):   x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
    key0    = mix(mix(mix(0x243F6A88 ^ low(seed)) ^ high(seed)) ^ number)
    key1    = mix(mix(mix(0x85A308D3 ^ low(seed)) ^ high(seed)) ^ number)
    h       = mix(mix(low(g) ^ key0) ^ key1 ^ high(g))
    position in group g = (h * size(g)) >> 32

where low and high are the halves of 64 bits, number is the tensor's, size(g) the weights of group
g, and the product h * size(g) has 64 bits. The two first constants are those of pi.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from . import reference
from .sparse_reference import BLOCK, UNTOUCHED, pack

__all__ = [
    "SeededCode",
    "SeededTensor",
    "apply",
    "build",
    "expand",
    "expanded_levels",
    "key",
    "mix",
    "restore",
    "support",
    "switch",
    "value_groups",
]

_LOW: Final = 0xFFFFFFFF
_STARTS: Final = (0x243F6A88, 0x85A308D3)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededTensor:
    """What places the values of one tensor."""

    seed: int
    """0 .. 2**64 - 1."""
    number: int
    """Of the tensor, 0 .. 2**32 - 1; with the seed it makes the key."""
    stride: int
    """N: one weight in N has a value; 1 .. 2**31 - 1."""
    offset: int
    """Its first weight in the arena, a multiple of `BLOCK`."""
    numel: int
    """Its weights."""

    @property
    def groups(self) -> int:
        """Values it has; the last group may be short."""
        return -(-self.numel // self.stride)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeededCode:
    """Values of some tensors of an arena; made by `build`."""

    tensors: tuple[SeededTensor, ...]
    """In the order of their values."""
    planes: torch.Tensor
    """uint8, shape (B, bytes), LSB-first: the codes of the values, all 2**B of them values. The
    groups of each tensor start at the next multiple of `BLOCK` groups."""
    table: torch.Tensor
    """float32, shape (tensors, 2**B): the levels."""
    index: torch.Tensor
    """int64, shape (tensors, 5): offset, numel, stride, first group among the values, key0 |
    key1 << 32."""
    owners: torch.Tensor
    """int32, one a block of `BLOCK` groups: which tensor the block is of."""
    weights: int
    """Weights of the arena."""

    @property
    def bits(self) -> int:
        """B, bits a value."""
        return self.planes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.planes.nbytes + self.table.nbytes + self.index.nbytes + self.owners.nbytes

    def to(self, device: torch.device | str) -> SeededCode:
        """The same code on a device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)


_TENSORS: Final = ("planes", "table", "index", "owners")


def mix(x: torch.Tensor) -> torch.Tensor:
    """Mix 32 bits, one to one. int64 in and out, values 0 .. 2**32 - 1."""
    x = x ^ x >> 16
    x = x * 0x7FEB352D & _LOW
    x = x ^ x >> 15
    x = x * 0x846CA68B & _LOW
    return x ^ x >> 16


def key(seed: int, number: int) -> tuple[int, int]:
    """Two words of 32 bits for a tensor; see the module."""
    h = torch.tensor(_STARTS, device="cpu")
    for word in (seed & _LOW, seed >> 32, number):
        h = mix(h ^ word)
    first, second = h.tolist()
    return first, second


def value_groups(tensors: Sequence[SeededTensor]) -> list[int]:
    """Where the values of each tensor start, and, last, how many there are with their padding."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.groups // BLOCK) * BLOCK)
    return starts


def build(
    tensors: Sequence[SeededTensor], planes: torch.Tensor, table: torch.Tensor, weights: int
) -> SeededCode:
    """A code with its index, on the device of its planes.

    Parameters
    ----------
    tensors
        Apart from each other in the arena.
    planes
        uint8, shape (B, at least a bit for each of the last of `value_groups`), B = 1..4.
    table
        float32, shape (tensors, 2**B).
    weights
        Weights of the arena.
    """
    starts = value_groups(tensors)
    index, owners = [], []
    for i, (tensor, start) in enumerate(zip(tensors, starts, strict=False)):
        first, second = key(tensor.seed, tensor.number)
        # As a signed number: the device has no other of 64 bits here.
        both = first | (second - (second >> 31 << 32)) << 32
        index.append((tensor.offset, tensor.numel, tensor.stride, start, both))
        owners += [i] * ((starts[i + 1] - start) // BLOCK)
    return SeededCode(
        tensors=tuple(tensors),
        planes=planes,
        table=table,
        index=torch.tensor(index, dtype=torch.int64, device=planes.device).reshape(-1, 5),
        owners=torch.tensor(owners, dtype=torch.int32, device=planes.device),
        weights=weights,
    )


def support(tensor: SeededTensor) -> torch.Tensor:
    """Which weights of a tensor have a value: int64, shape (groups,), ascending."""
    first, second = key(tensor.seed, tensor.number)
    group = torch.arange(tensor.groups, device="cpu")
    size = (tensor.numel - group * tensor.stride).clamp(max=tensor.stride)
    h = mix(mix(group & _LOW ^ first) ^ second ^ group >> 32)
    return group * tensor.stride + (h * size >> 32)


def _touched(code: SeededCode) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The touched weights of the arena, their tensors and codes: int64."""
    starts = value_groups(code.tensors)
    codes = reference.codes(code.planes, starts[-1])
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    at, owner, value = [none], [none], [none]
    for i, tensor in enumerate(code.tensors):
        at.append(tensor.offset + support(tensor))
        owner.append(torch.full((tensor.groups,), i, device="cpu"))
        value.append(codes[starts[i] : starts[i] + tensor.groups].cpu())
    device = code.planes.device
    return torch.cat(at).to(device), torch.cat(owner).to(device), torch.cat(value).to(device)


def apply(code: SeededCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """Make the touched weights of `out` base + level, rounded; leave the others as they are.

    Parameters
    ----------
    code
        Of an arena of n weights.
    base
        Shape (n,), float32, bfloat16 or float16.
    out
        Shape (n,), one of the three dtypes; may be `base` itself.
    """
    at, owner, value = _touched(code)
    out[at] = (base[at].float() + code.table[owner, value]).to(out.dtype)


def restore(code: SeededCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """Make the touched weights of `out` the base again, rounded; leave the others as they are."""
    at, _, _ = _touched(code)
    out[at] = base[at].to(out.dtype)


def switch(old: SeededCode, new: SeededCode, base: torch.Tensor, out: torch.Tensor) -> None:
    """From `old` to `new` in place: `restore` the one, then `apply` the other."""
    restore(old, base, out)
    apply(new, base, out)


def expand(code: SeededCode) -> torch.Tensor:
    """Planes over the weights: code 0 where untouched, 1 + the code of the value elsewhere.

    uint8, shape (B + 1, bytes of `sparse_reference.plane_bytes`), zeros past the last weight;
    for the levels of `expanded_levels`.

    Raises
    ------
    ValueError
        B is 4: 17 codes need 5 planes, and a reconstruction takes 4.
    """
    if code.bits > 3:
        raise ValueError("seeded values of 4 bits have no planes: 16 levels and none need 5 of 4")
    at, _, value = _touched(code)
    return pack(at, value + 1, code.bits + 1, code.weights)


def expanded_levels(code: SeededCode) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels for the planes of `expand`: a table and the row of each block of the arena.

    Returns
    -------
    torch.Tensor
        float32, shape (tensors, 2**(B + 1)): `UNTOUCHED`, the levels, `UNTOUCHED` where there is
        no code. One row of `UNTOUCHED` where there is no tensor.
    torch.Tensor
        int32, shape (ceil(weights / BLOCK),).
    """
    count, levels = code.table.shape
    table = torch.full((max(1, count), 2 * levels), UNTOUCHED, device=code.table.device)
    table[:count, 1 : levels + 1] = code.table
    rows = torch.zeros(-(-code.weights // BLOCK), dtype=torch.int32, device=code.table.device)
    for i, tensor in enumerate(code.tensors):
        rows[tensor.offset // BLOCK : -(-(tensor.offset + tensor.numel) // BLOCK)] = i
    return table, rows
