"""Where a module, or a dict, keeps its tensors, and whether they are there still."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Spots"]


@dataclass(frozen=True, slots=True)
class _Spot:
    """An entry of a dict that holds a tensor."""

    held: Any
    leaf: str
    owner: torch.nn.Module | None
    """That the dict belongs to."""


#: A dict of submodules, the key of one, the submodule, and its path.
_Link = tuple[Mapping[str, Any], str, torch.nn.Module, str]


class Spots:
    """Knows which tensor stands where in a model.

    Parameters
    ----------
    home
        The module, or the dict.
    tensors
        Its tensors by name, as they are now.
    """

    def __init__(
        self, home: torch.nn.Module | Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self._tensors = dict(tensors)
        # They stay where the weights are written to, whatever becomes of the others.
        self._bound = {name: tensor.detach() for name, tensor in tensors.items()}
        self._links: list[_Link] = []
        self._spots: dict[str, _Spot] = {}
        if isinstance(home, torch.nn.Module):
            modules = self._walk(home)
            for name in tensors:
                path, _, leaf = name.rpartition(".")
                owner = modules.get(path)
                # A module may give its state dict names of other making: those have no spot.
                for held in () if owner is None else (owner._parameters, owner._buffers):
                    if held.get(leaf) is tensors[name]:
                        self._spots[name] = _Spot(held, leaf, owner)
        else:
            self._spots = {name: _Spot(home, name, None) for name in tensors}
        self._watched: list[str] = []
        self._checks: list[tuple[Any, str, torch.Tensor, Any]] = []
        self._ways: list[_Link] = []
        self.watch(tensors)

    def _walk(self, home: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """Modules by path, those that are in several places by all of them."""
        found = dict(home.named_modules(remove_duplicate=False))
        for path, module in found.items():
            above, _, key = path.rpartition(".")
            if path:
                self._links.append((found[above]._modules, key, module, path))
        return found

    def watch(self, names: Collection[str]) -> None:
        """Look at these from now on, and at no others: what is not written may be anywhere."""
        self._watched = [n for n in self._spots if n in names]
        self._checks = [self._check(name) for name in self._watched]
        paths = {path for name in names for path in _above(name)}
        self._ways = [link for link in self._links if link[3] in paths]

    def _check(self, name: str) -> tuple[Any, str, torch.Tensor, Any]:
        spot = self._spots[name]
        return spot.held.get, spot.leaf, self._tensors[name], self._bound[name].is_set_to

    def gone(self) -> list[str]:
        """Names of those that are not where they were, in microseconds."""
        try:
            # A tensor without elements is never set to another, and looked at more closely below.
            there = all(
                [get(leaf) is one and same(one) for get, leaf, one, same in self._checks]
            ) and all([held.get(key) is module for held, key, module, _ in self._ways])
        except (RuntimeError, TypeError):
            there = False  # of another device or dtype
        return [] if there else self._lost()

    def _lost(self) -> list[str]:
        tensors, bound, spots = self._tensors, self._bound, self._spots
        lost = {
            name
            for name in self._watched
            if spots[name].held.get(spots[name].leaf) is not tensors[name]
            or _moved(tensors[name], bound[name])
        }
        for held, key, module, path in self._ways:
            if held.get(key) is not module:
                lost |= {name for name in self._watched if name.startswith(f"{path}.")}
        return sorted(lost)

    def put(self, name: str, tensor: torch.Tensor) -> torch.nn.Module | None:
        """Put a tensor in; gives the module that has it now and did not before."""
        spot = self._spots.get(name)
        if spot is None or spot.owner is None:
            return None
        if spot.held.get(spot.leaf) is tensor and self._tensors[name] is tensor:
            return None
        new = spot.held.get(spot.leaf) is not tensor
        spot.held[spot.leaf] = tensor
        self._tensors[name], self._bound[name] = tensor, tensor.detach()
        if name in self._watched:
            self._checks[self._watched.index(name)] = self._check(name)
        return spot.owner if new else None

    def knows(self, name: str) -> bool:
        """Whether a name of the state dict says where its tensor is."""
        return name in self._spots

    def has(self, name: str) -> bool:
        """Whether the tensor that was put in last is there still, wherever its memory is."""
        spot = self._spots.get(name)
        return spot is not None and spot.held.get(spot.leaf) is self._tensors[name]

    def are(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are all of the tensors, each where it was."""
        return tensors.keys() == self._tensors.keys() and not any(
            tensor is not self._tensors[name] or _moved(tensor, self._bound[name])
            for name, tensor in tensors.items()
        )


def _moved(tensor: torch.Tensor, bound: torch.Tensor) -> bool:
    # The addresses first: on two devices they differ, and `is_set_to` takes tensors of one. Nothing
    # is ever written where there are no elements.
    if tensor.data_ptr() != bound.data_ptr():
        return True
    return bound.numel() > 0 and not tensor.is_set_to(bound)


def _above(name: str) -> Iterator[str]:
    """Paths of the modules that a tensor is in."""
    path = name.rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]
