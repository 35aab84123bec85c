"""What a merged model is laid out like: whose heads, buffers and files it gets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from tallstore.describing import Description
from tallstore.documents import OWN, TaskDocument
from tallstore.dtypes import is_codable, itemsize
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import OptionError, UnknownTaskError
from tallstore.specs import TensorSpec

__all__ = ["BASE_LAYOUT", "choose_layout", "unmerged"]

#: What to give for the base's layout.
BASE_LAYOUT = "base"

_PIECE = 1 << 22
_SHOWN = 3


def _own_tensors(described: Description) -> list[TensorSpec]:
    """Tensors that a task keeps at least in part by itself."""
    task = described.task
    if task is None:
        return []
    kinds = [{part.kind for part in parts} for parts in task.parts]
    return [t for t in described.contents.tensors if OWN in kinds[t.segment]]


def _private(described: Description) -> list[TensorSpec]:
    """Tensors that the base lacks, or has in another shape or dtype: heads, mostly."""
    known = {t.name: t for t in described.base.contents.tensors}
    return [
        t
        for t in _own_tensors(described)
        if t.name not in known or known[t.name].geometry != t.geometry
    ]


def unmerged(described: Mapping[str, Description]) -> list[str]:
    """Remarks on tensors that the base has just so and that are not merged all the same."""
    remarks = []
    for task, found in described.items():
        private = {t.name for t in _private(found)}
        odd = [t.name for t in _own_tensors(found) if is_codable(t.dtype) and t.name not in private]
        if odd:
            names = ", ".join(map(repr, odd[:_SHOWN])) + (", ..." if len(odd) > _SHOWN else "")
            remarks.append(f"{task}: {names} counted as unmoved: not finite, or not tied")
    return remarks


def choose_layout(
    snapshot: Snapshot,
    described: Mapping[str, Description],
    private: str | None,
    *,
    known: Sequence[str],
) -> str | None:
    """The task that the merged model is laid out like; None for the base.

    Parameters
    ----------
    described
        The tasks that are merged.
    private
        What was asked for: ``"base"``, a task, or None to take the only choice there is.
    known
        All tasks of the store: any may lend its layout.

    Raises
    ------
    OptionError
        Nothing was asked for, and the tasks differ in what cannot be merged; the message lists
        the choices.
    UnknownTaskError
        There is no such task.
    """
    if private == BASE_LAYOUT:
        return None
    if private is not None:
        if private not in known:
            raise UnknownTaskError(
                f"{snapshot.path}: private={private!r} is no task; there are 'base', which leaves "
                f"out what the base lacks, and {', '.join(map(repr, known))}"
            )
        return private
    first = next(iter(described))
    if len(described) == 1:
        return first
    tensors = {task: _private(found) for task, found in described.items()}
    if not any(tensors.values()):
        return None
    prints = {task: _print(snapshot, described[task], tensors[task]) for task in described}
    if len(set(prints.values())) == 1:
        return first
    raise OptionError(
        f"{snapshot.path}: the tasks differ in what no rule merges: {_differing(tensors)}; choose "
        f"whose to take with private= (--private): {', '.join(map(repr, described))}, or 'base' "
        "to leave out what the base lacks"
    )


def _differing(tensors: Mapping[str, Sequence[TensorSpec]]) -> str:
    names = list(dict.fromkeys(t.name for found in tensors.values() for t in found))
    parts = []
    for name in names[:_SHOWN]:
        shapes = {
            task: next((str(list(t.shape)) for t in found if t.name == name), "absent")
            for task, found in tensors.items()
        }
        if len(set(shapes.values())) == 1:
            parts.append(f"{name!r} ({next(iter(shapes.values()))}, other values)")
        else:
            shown = ", ".join(f"{s} in {t!r}" for t, s in list(shapes.items())[:_SHOWN])
            parts.append(f"{name!r} ({shown}{', ...' if len(shapes) > _SHOWN else ''})")
    return "; ".join(parts) + ("; ..." if len(names) > _SHOWN else "")


def _print(snapshot: Snapshot, described: Description, tensors: Sequence[TensorSpec]) -> str:
    """A digest of a task's private tensors: names, shapes, and the values that are its own."""
    digest = hashlib.sha256()
    task = described.task
    for tensor in tensors:
        digest.update(repr((tensor.name, tensor.geometry)).encode())
        for part in task.parts[tensor.segment] if task is not None else ():
            digest.update(repr((part.kind, part.count)).encode())
            if part.kind == OWN and task is not None:
                _add_own(digest, snapshot, task, part.segment)
    return digest.hexdigest()


def _add_own(digest: hashlib._Hash, snapshot: Snapshot, task: TaskDocument, segment: int) -> None:
    place = task.own_layout.places[segment]
    size = itemsize(task.own[segment].dtype)
    stream = snapshot.stream(task.own_streams[place.arena])
    start, left = place.offset * size, task.own[segment].nbytes
    while left:
        piece = np.empty(min(left, _PIECE), np.uint8)
        snapshot.read(stream, start, piece)
        digest.update(piece.data)
        start, left = start + piece.size, left - piece.size
