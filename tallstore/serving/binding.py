"""Which of a task's tensors go where in a model; whatever does not fit is named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch

from tallstore.documents import BASE, CODE, Contents, TaskDocument
from tallstore.dtypes import torch_dtype
from tallstore.errors import MismatchError
from tallstore.matching import common_prefix, renamed
from tallstore.serving.model import Model
from tallstore.serving.sharing import address, overlaps_itself
from tallstore.specs import SegmentSpec, TensorSpec, contiguous_stride

__all__ = ["Binding", "Private", "bind"]

#: What happens to tensors of a task's own whose shape is not the model's.
Private = Literal["replace", "skip"]
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Binding:
    """Where the tensors of a task go."""

    whole: Mapping[int, tuple[torch.Tensor, ...]]
    """By segment: flat tensors that are to become all of it."""
    views: tuple[tuple[TensorSpec, torch.Tensor], ...]
    """Tensors that are not simply all of their segment, or that do not lie in one piece."""
    twice: tuple[tuple[TensorSpec, TensorSpec], ...]
    """Tensors that the model ties and the task has apart."""
    targets: Mapping[str, torch.Tensor]
    """All of these tensors, by the names that the task has for them."""
    heads: Mapping[str, torch.Tensor]
    """Tensors to put into the model, by name."""
    places: tuple[str, ...]
    """Names that the model has for what is written."""
    written: tuple[torch.Tensor, ...]
    """The model's own tensors, heads among them, that show what is written."""
    skipped: tuple[str, ...]


def bind(
    what: str,
    task: TaskDocument,
    model: Model,
    *,
    base: Contents,
    private: Private,
    ignore: Sequence[str],
) -> Binding:
    """Find the place of every tensor of a task.

    Parameters
    ----------
    what
        For messages: the store and the task.
    base
        Of the store: tensors of a task in other shapes are its own.
    private
        See `TaskSwitcher`.
    ignore
        Shell patterns of names, of either side, to leave alone.

    Raises
    ------
    MismatchError
        The model has other tensors, other shapes or other dtypes; the message names them.
    """
    return _Binder(what, task, model, base, private, ignore).bind()


class _Binder:
    def __init__(
        self,
        what: str,
        task: TaskDocument,
        model: Model,
        base: Contents,
        private: Private,
        ignore: Sequence[str],
    ) -> None:
        self._what = what
        self._task = task
        self._model = model
        self._private = private
        self._ignore = ignore
        self._base: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        for spec in base.tensors:
            self._base[spec.segment].add(spec.shape)
        self._problems: list[str] = []
        self._skipped: list[str] = []
        self._heads: dict[str, torch.Tensor] = {}
        self._names: dict[str, str] = {}
        self._found: dict[str, tuple[TensorSpec, torch.Tensor]] = {}
        self._places: list[str] = []

    def bind(self) -> Binding:
        specs = _named(self._task.contents)
        prefix = common_prefix(list(specs), self._model.tensors)
        for name, spec in specs.items():
            place = renamed(name, prefix)
            if not self._ignored(name, place):
                self._names[place] = name
                self._place(place, spec)
        self._check_whole()
        self._check_heads()
        self._check_overlaps()
        if self._problems:
            more = len(self._problems) - _SHOWN
            listed = "; ".join(self._problems[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
            raise MismatchError(f"{self._what}: the model does not fit: {listed}")
        return self._binding()

    def _ignored(self, *names: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in self._ignore)

    def _place(self, name: str, spec: TensorSpec) -> None:
        """Find the place of one tensor."""
        tensor = self._model.tensors.get(name)
        if tensor is None:
            if self._private == "skip" and self._is_own(spec):
                self._skipped.append(name)
            else:
                self._problem(f"{name!r} {list(spec.shape)} is not in the model; ignore= leaves it")
            return
        dtype = torch_dtype(spec.dtype)
        if tensor.dtype != dtype:
            self._problem(f"{name!r} is {tensor.dtype} in the model, {dtype} in the store")
            return
        if tuple(tensor.shape) != spec.shape:
            shapes = f"{name!r} has shape {list(tensor.shape)} in the model, {list(spec.shape)}"
            if not self._is_own(spec):
                self._problem(f"{shapes} in the store")
                return
            if self._private == "skip":
                self._skipped.append(name)
                return
            why = self._model.why_not_replaced(name)
            if why:
                self._problem(f"{shapes} in the task, and {why}, or private='skip'")
                return
            tensor = self._model.head(name, spec.shape)
            self._heads.update(dict.fromkeys(self._model.sharing(name), tensor))
        if tensor.numel() and tensor.data_ptr() % _alignment(tensor):
            self._problem(
                f"{name!r} lies at no multiple of its {_alignment(tensor)}-byte elements in the "
                "model; clone() gives it memory of its own"
            )
        if overlaps_itself(tensor):
            expanded = 0 in tensor.stride()
            self._problem(
                f"{name!r} {'is expanded' if expanded else 'overlaps itself'} in the model: its "
                "elements share memory; contiguous() gives each its own"
            )
        self._found[name] = (replace(spec, name=name), tensor.detach())

    def _is_own(self, spec: TensorSpec) -> bool:
        """Whether the base has nothing of a tensor, or has it in another shape.

        A head with fewer or more rows than the base's may still share some with it in the store.
        """
        parts = self._task.parts[spec.segment]
        return not any(
            part.kind in (BASE, CODE) and spec.shape in self._base[part.segment] for part in parts
        )

    def _check_whole(self) -> None:
        """Nothing of the model may be left over from the task before."""
        covered = {address(self._model.tensors[name]) for name in self._found}
        for name, tensor in self._model.tensors.items():
            reached = name in self._found or (tensor.numel() and address(tensor) in covered)
            if reached:
                self._places.append(name)
            if reached or not tensor.numel() or name in self._skipped or self._ignored(name):
                continue
            if self._private == "skip":
                self._skipped.append(name)
            else:
                self._problem(f"the task has no {name!r} {list(tensor.shape)} ; ignore= leaves it")

    def _check_heads(self) -> None:
        """What the model ties to a head gets another shape with it."""
        for name, head in self._heads.items():
            found = self._found.get(name)
            if found is not None and found[0].shape != tuple(head.shape):
                self._problem(
                    f"{name!r} is tied in the model to a tensor that has shape "
                    f"{list(head.shape)} in the task, and itself has {list(found[0].shape)} there; "
                    "build the model without tying them"
                )

    def _check_overlaps(self) -> None:
        """What shares elements in the model must share them in the task, or one undoes another."""
        for one, other in self._model.overlaps:
            # Heads have memory of their own.
            if {one, other} <= self._found.keys() and not {one, other} & self._heads.keys():
                first = _origin(*self._found[one])
                if first is None or first != _origin(*self._found[other]):
                    self._problem(
                        f"{one!r} and {other!r} share elements in the model, and not the same ones "
                        "in the store; clone() gives one of them its own, ignore= leaves one"
                    )

    def _problem(self, text: str) -> None:
        self._problems.append(text)

    def _binding(self) -> Binding:
        segments = self._task.contents.segments
        whole: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)
        views, twice = [], []
        targets: dict[str, torch.Tensor] = {}
        taken: dict[tuple[object, ...], str] = {}
        for name, (spec, tensor) in self._found.items():
            other = taken.setdefault(address(tensor), name)
            if other != name and tensor.numel():
                first = self._found[other][0]
                if replace(first, name=name) != spec:
                    twice.append((first, spec))
                continue
            targets[self._names[name]] = tensor
            if _is_whole(spec, segments[spec.segment]) and tensor.is_contiguous():
                whole[spec.segment][tensor.data_ptr()] = tensor.view(-1)
            else:
                views.append((spec, tensor))
        return Binding(
            whole={segment: tuple(outs.values()) for segment, outs in whole.items()},
            views=tuple(views),
            twice=tuple(twice),
            targets=targets,
            heads=self._heads,
            places=tuple(self._places),
            written=self._written(),
            skipped=tuple(self._skipped),
        )

    def _written(self) -> tuple[torch.Tensor, ...]:
        """The model's tensors that change; those made in inference mode have no version."""
        tensors = [self._heads.get(n, self._model.tensors[n]) for n in self._places]
        return tuple({id(t): t for t in tensors if not t.is_inference()}.values())


def _alignment(tensor: torch.Tensor) -> int:
    """Bytes that an element's address is a multiple of; a complex one is two numbers."""
    return tensor.element_size() // (2 if tensor.is_complex() else 1)


def _named(contents: Contents) -> dict[str, TensorSpec]:
    flat = contents.flat()
    names = contents.names() if flat is None else flat
    return {name: contents.tensors[number] for name, number in names.items()}


def _origin(spec: TensorSpec, tensor: torch.Tensor) -> tuple[int, int] | None:
    """Where a segment would begin in the model, if a tensor views it there as in the store."""
    steps = zip(spec.shape, spec.stride, tensor.stride(), strict=True)
    if any(size > 1 and step != there for size, step, there in steps):
        return None
    if (spec.conj, spec.neg) != (tensor.is_conj(), tensor.is_neg()):
        return None
    return spec.segment, tensor.data_ptr() - spec.offset * tensor.element_size()


def _is_whole(spec: TensorSpec, segment: SegmentSpec) -> bool:
    return (
        spec.dtype == segment.dtype
        and spec.numel == segment.numel
        and spec.offset == 0
        and spec.stride == contiguous_stride(spec.shape)
        and not (spec.conj or spec.neg)
    )
