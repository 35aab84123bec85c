"""The model that is switched: its tensors by name, and heads that change their shape."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from tallstore.errors import MismatchError, OptionError
from tallstore.serving.sharing import sharing
from tallstore.serving.spots import Spots

__all__ = ["Model"]

_SHOWN = 5


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
        self._spots = Spots(model if self.module is None else self.module, self._originals)
        #: For each replaced tensor, by the names that share it and its shape.
        self._heads: dict[tuple[tuple[str, ...], tuple[int, ...]], torch.Tensor] = {}
        self._installed: dict[str, torch.Tensor] = {}

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

    @cached_property
    def overlaps(self) -> tuple[tuple[str, str], ...]:
        """Names of tensors that have elements in common, but are not the same."""
        return tuple(sharing(self._originals))

    def sharing(self, name: str) -> tuple[str, ...]:
        """The names under which a tensor is known: several, where weights are tied."""
        one = self._originals[name]
        return tuple(other for other, tensor in self._originals.items() if tensor is one)

    def why_not_replaced(self, name: str) -> str:
        """Why a tensor of another shape cannot be put in; empty where it can."""
        if self.module is None:
            return "a dict of tensors cannot be given others: give the module itself"
        if not self._spots.knows(name):
            return "the module keeps it elsewhere than its state dict says"
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
            # Of the same kind as the original, in whatever mode the caller is.
            with torch.inference_mode(original.is_inference()):
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
        ever = {name for names, _ in self._heads for name in names}
        tensors = {name: heads.get(name, self._originals[name]) for name in ever | set(heads)}
        self._installed = dict(heads)
        return tuple(name for name in sorted(tensors) if self._put(name, tensors[name]))

    def _put(self, name: str, tensor: torch.Tensor) -> bool:
        owner = self._spots.put(name, tensor)
        if owner is not None:
            _tell_sizes(owner, name.rpartition(".")[2], tensor)
        return owner is not None

    # -- what others do to it -------------------------------------------------------------

    def watch(self, names: Collection[str]) -> None:
        """Only these tensors must stay where they are."""
        self._spots.watch(names)

    def check_places(self) -> None:
        """Refuse to go on where tensors are not those that are written to.

        Raises
        ------
        MismatchError
            Some were replaced, or their memory was; the message names them.
        """
        gone = self._spots.gone()
        if gone:
            more = f" and {len(gone) - _SHOWN} more" if len(gone) > _SHOWN else ""
            raise MismatchError(
                f"the model has other tensors, or elsewhere, than the switcher writes to: "
                f"{', '.join(map(repr, gone[:_SHOWN]))}{more}. They were replaced or moved, as "
                "load_state_dict(assign=True), .to() and p.data = ... do; nothing was written. "
                "refresh() takes the model as it is now"
            )

    def is_current(self) -> bool:
        """Whether the model has the tensors that it had, where they were."""
        return self._spots.are(self._now())

    @contextmanager
    def renewed(self, device: torch.device | None) -> Iterator[Model]:
        """The model as it is now, but for heads: what they took the place of is in it again.

        If the block fails, everything is as before.

        Raises
        ------
        MismatchError
            See `Model`.
        """
        back = {name: head for name, head in self._installed.items() if self._spots.has(name)}
        for name, head in back.items():
            _follow(self._originals[name], head)
            self._put(name, self._originals[name])
        try:
            model = Model(self.given, device)
            model._take_heads(self._heads)
            yield model
        except BaseException:
            for name, head in back.items():
                self._put(name, head)
            raise

    def _take_heads(
        self, heads: Mapping[tuple[tuple[str, ...], tuple[int, ...]], torch.Tensor]
    ) -> None:
        """Go on with the heads of another generation: an optimizer may know them."""
        for (names, shape), head in heads.items():
            if names[0] in self._originals and self.sharing(names[0]) == names:
                _follow(head, self._originals[names[0]])
                self._heads[names, shape] = head


def _follow(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Where the model was moved, move what was not in it then."""
    if (tensor.device, tensor.dtype) != (other.device, other.dtype):
        tensor.data = tensor.data.to(other.device, other.dtype)


def _tell_sizes(owner: torch.nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    """Modules that know the size of their weight are told the new one."""
    if leaf != "weight" or tensor.dim() != 2:
        return
    if isinstance(owner, torch.nn.Linear):
        owner.out_features, owner.in_features = tensor.shape
    elif isinstance(owner, torch.nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = tensor.shape
