"""The models of the fault drivers, as functions of seeds."""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["OLD", "State", "base", "other", "tuned"]

State = dict[str, torch.Tensor]

_SHAPES: Final = {
    "embed": (300, 41),
    "layer.0": (130, 64),
    "bias": (130,),
    "scale": (),
    "head": (9, 7),
}


def base(seed: int = 0) -> State:
    """A base of several dtypes and shapes."""
    draw = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=draw) for name, shape in _SHAPES.items()}
    state["half"] = torch.randn(5000, generator=draw).bfloat16()
    state["positions"] = torch.arange(seed, seed + 11)
    return state


def tuned(seed: int) -> State:
    """A fine-tune of it."""
    draw = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (t.float() + 0.01 * torch.randn(t.shape, generator=draw)).to(t.dtype)
        if t.is_floating_point()
        else t.clone()
        for name, t in base().items()
    }


def other(seed: int) -> State:
    """Nothing like the base, and large enough for several transactions and kinds of pages."""
    draw = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(40_000, generator=draw), "b": torch.arange(seed, seed + 50)}


#: What the template's store holds.
OLD: Final[dict[str | None, State]] = {None: base(), **{f"t{n}": tuned(n) for n in range(3)}}
