"""The model that is switched: its tensors by name, and heads that change their shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tallstore.errors import MismatchError, OptionError

__all__ = ["Model"]


class Model:
    """A module, or a state dict, as places for weights.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, compiled or not, or a dict of tensors by name.
    device
        Where its tensors must be; None: where they are.

    Raises
    ------
    OptionError
        It is neither.
    MismatchError
        Its tensors are not all on the device.
    """

    def __init__(self, model: Any, device: torch.device | None) -> None:
        self.given = model
        # What torch.compile gives wraps the module, and puts a prefix to every name.
        inner = getattr(model, "_orig_mod", model)
        self.module = inner if isinstance(inner, torch.nn.Module) else None
        if self.module is None and not isinstance(model, Mapping):
            raise OptionError(
                f"model={type(model).__name__}: a torch.nn.Module, or a dict of tensors, is needed"
            )
        self._originals = self._now()
        if not self._originals:
            raise OptionError("model: it has no tensors")
        self.device = self._device(device)
        #: For each replaced tensor, by the names that share it and its shape.
        self._heads: dict[tuple[tuple[str, ...], tuple[int, ...]], torch.Tensor] = {}

    def _now(self) -> dict[str, torch.Tensor]:
        held = self.given if self.module is None else self.module.state_dict(keep_vars=True)
        return {name: t for name, t in held.items() if isinstance(t, torch.Tensor)}

    def _device(self, wanted: torch.device | None) -> torch.device:
        places: dict[torch.device, str] = {}
        for name, tensor in self._originals.items():
            places.setdefault(tensor.device, name)
        device = next(iter(places)) if wanted is None else wanted
        if set(places) != {device}:
            listed = ", ".join(f"{name!r} on {place}" for place, name in places.items())
            raise MismatchError(
                f"the model is not all on {device}: {listed}; move it first, by "
                f"model.to({str(device)!r})"
            )
        return device

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Its tensors, as they were given."""
        return self._originals

    def sharing(self, name: str) -> tuple[str, ...]:
        """The names under which a tensor is known: several, where weights are tied."""
        one = self._originals[name]
        return tuple(other for other, tensor in self._originals.items() if tensor is one)

    def why_not_replaced(self, name: str) -> str:
        """Why a tensor of another shape cannot be put in; empty where it can."""
        if self.module is None:
            return "a dict of tensors cannot be given others: give the module itself"
        one = self._originals[name]
        for other, tensor in self._originals.items():
            shared = tensor.numel() and tensor.data_ptr() == one.data_ptr()
            if shared and tensor is not one:
                return f"it shares memory with {other!r}"
        return ""

    def head(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """What stands for a tensor where it has another shape: always the same for that shape."""
        names = self.sharing(name)
        original = self._originals[name]
        if tuple(original.shape) == shape:
            return original
        if (names, shape) not in self._heads:
            fresh = torch.empty(shape, dtype=original.dtype, device=original.device)
            if isinstance(original, torch.nn.Parameter):
                fresh = torch.nn.Parameter(fresh, requires_grad=original.requires_grad)
            self._heads[names, shape] = fresh
        return self._heads[names, shape]

    def install(self, heads: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
        """Put tensors in, and the original ones back where `heads` names none.

        Returns
        -------
        tuple of str
            Names of what changed.
        """
        changed = []
        ever = {name for names, _ in self._heads for name in names}
        for name in sorted(ever | set(heads)):
            tensor = heads.get(name, self._originals[name])
            if self.module is not None and _put(self.module, name, tensor):
                changed.append(name)
        return tuple(changed)


def _put(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> bool:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    held = owner._parameters if leaf in owner._parameters else owner._buffers
    if held.get(leaf) is tensor:
        return False
    held[leaf] = tensor  # type: ignore[assignment]
    _tell_sizes(owner, leaf, tensor)
    return True


def _tell_sizes(owner: torch.nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    """Modules that know the size of their weight are told the new one."""
    if leaf != "weight" or tensor.dim() != 2:
        return
    if isinstance(owner, torch.nn.Linear):
        owner.out_features, owner.in_features = tensor.shape
    elif isinstance(owner, torch.nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = tensor.shape
