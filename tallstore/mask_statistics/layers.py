"""Which layer of a model a tensor belongs to, by its name."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["layer_names"]


def _numbered(parts: Sequence[str]) -> int:
    """How many parts of a name lead up to its first number, that included; 0 without one."""
    return next((n for n, part in enumerate(parts, 1) if part.isdecimal()), 0)


def layer_names(tensors: Sequence[str]) -> list[str]:
    """The layer of each tensor.

    It is the name up to its first number: ``encoder.layer.3`` of ``encoder.layer.3.output.bias``.
    A name without one gives its top-level module, or the first module below it that leads to no
    numbered layer: beside ``model.layers.0.mlp.weight``, ``model.embed.weight`` gives
    ``model.embed``.
    """
    split = [name.split(".") for name in tensors]
    numbers = [_numbered(parts) for parts in split]
    above = {
        tuple(parts[:n])
        for parts, number in zip(split, numbers, strict=True)
        for n in range(1, number)
    }
    found = []
    for parts, number in zip(split, numbers, strict=True):
        depth = number or 1
        while not number and depth < len(parts) and tuple(parts[:depth]) in above:
            depth += 1
        found.append(".".join(parts[:depth]))
    return found
