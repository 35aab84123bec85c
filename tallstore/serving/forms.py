"""The forms in which a task's code is kept in memory, and how each becomes weights in place.

A form knows the tensors of the model that it writes. What it keeps of its own, beside base and
shared vector, can be moved between the host and the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import torch

from tallstore.ops import (
    AnySparseCode,
    SeededCode,
    SparseCode,
    apply_sparse,
    density,
    reconstruct_placed,
    restore_sparse,
    switch_sparse,
)
from tallstore.scratch import Scratch
from tallstore.serving.arrangement import Arrangement

__all__ = [
    "BaseForm",
    "Build",
    "CopyForm",
    "Form",
    "Job",
    "Live",
    "Move",
    "PlanesForm",
    "SparseForm",
]

#: Work that can be done on any thread; returns the bytes of memory that it read and wrote.
Job = Callable[[], int]
#: Gives the same tensor elsewhere.
Move = Callable[[torch.Tensor], torch.Tensor]
#: Makes a tensor of a segment's bytes.
Build = Callable[[torch.Tensor], torch.Tensor]
#: A tensor of the model, by where it is.
_Key = tuple[int, int]
_THE_BASE: Final = None


@dataclass(slots=True)
class Live:
    """What is in the model's tensors: the base, or a sparse code over it; others are not listed."""

    before: dict[_Key, AnySparseCode | None] = field(default_factory=dict)
    after: dict[_Key, AnySparseCode | None] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)

    def next(self) -> None:
        """What was written is what is there now."""
        self.before, self.after = self.after, {}

    def forget(self) -> None:
        """Nothing is known of what is there."""
        self.before, self.after = {}, {}


class Form(Protocol):
    """A part of a task's code, ready to be written into the model."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps of its own."""
        ...

    def to(self, move: Move) -> Form:
        """The same form with what it keeps moved."""
        ...

    def jobs(self, live: Live) -> Iterator[Job]:
        """The work of writing it, in pieces that may be done side by side."""
        ...


def _key(out: torch.Tensor) -> _Key:
    return out.data_ptr(), out.numel()


def _moved_by(base: torch.Tensor, out: torch.Tensor) -> int:
    return base.nbytes + out.nbytes


@dataclass(frozen=True, slots=True)
class BaseForm:
    """Weights that are the base's."""

    runs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """(weights of the base, tensor that they go to)."""

    @property
    def nbytes(self) -> int:
        """Nothing: the base is there for all."""
        return 0

    def to(self, move: Move) -> BaseForm:
        """Itself."""
        return self

    def jobs(self, live: Live) -> Iterator[Job]:
        """Copies; nothing where the base is already, and of a sparse code what it touched."""
        for base, out in self.runs:
            key = _key(out)
            live.after[key] = _THE_BASE
            if key not in live.before:
                yield _copying(base, out)
                continue
            code = live.before[key]
            if code is not None:
                yield _restoring(code, base, out)


def _copying(source: torch.Tensor, out: torch.Tensor) -> Job:
    def copy() -> int:
        out.copy_(source)
        return _moved_by(source, out)

    return copy


def _restoring(code: AnySparseCode, base: torch.Tensor, out: torch.Tensor) -> Job:
    def restore() -> int:
        restore_sparse(code, base, out)
        return _touched(code, base, out)

    return restore


def _touched(code: AnySparseCode, base: torch.Tensor, out: torch.Tensor) -> int:
    weights = round(density(code) * code.weights)
    return weights * (base.element_size() + out.element_size()) + _code_bytes(code)


def _code_bytes(code: AnySparseCode) -> int:
    if isinstance(code, SparseCode):
        return code.entries.nbytes + code.starts.nbytes + code.table.nbytes
    return code.planes.nbytes + code.table.nbytes + code.index.nbytes + code.owners.nbytes


@dataclass(frozen=True, slots=True)
class PlanesForm:
    """Dense codes of an arena: K planes, times the shared vector or times 1."""

    arrangement: Arrangement
    """Where the arena's weights go, and what they are made from."""
    planes: torch.Tensor
    """uint8, shape (K, weights / 8)."""
    levels: torch.Tensor
    """float32, shape (runs + 1, 2**K): a row a run, and one that is not used."""

    @property
    def nbytes(self) -> int:
        """Of the planes."""
        return self.planes.nbytes

    def to(self, move: Move) -> PlanesForm:
        """With the planes elsewhere."""
        return replace(self, planes=move(self.planes), levels=move(self.levels))

    def jobs(self, live: Live) -> Iterator[Job]:
        """On CUDA one launch; on the CPU a job for each cut of the arrangement."""
        there = self.arrangement
        if there.places is not None:
            places = there.places

            def launch() -> int:
                reconstruct_placed(there.base, self.planes, there.vector, self.levels, places)
                return there.moved + self.planes.nbytes

            yield launch
            return
        levels = [tuple(row) for row in self.levels.tolist()]
        for cut in there.cuts:
            yield lambda cut=cut: cut.reconstruct(there, self.planes, levels, live.scratch)  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class SparseForm:
    """Codes that touch few weights, kept as positions and codes, or as seeded values."""

    runs: tuple[tuple[AnySparseCode, torch.Tensor, torch.Tensor], ...]
    """(code over the run's weights, weights of the base, tensor that they go to)."""

    @property
    def nbytes(self) -> int:
        """Of the codes."""
        return sum(_code_bytes(code) for code, _, _ in self.runs)

    def to(self, move: Move) -> SparseForm:
        """With the codes elsewhere."""
        return SparseForm(tuple((_elsewhere(code, move), b, out) for code, b, out in self.runs))

    def jobs(self, live: Live) -> Iterator[Job]:
        """What the code before touched is put back, and what this one touches is written."""
        for code, base, out in self.runs:
            key = _key(out)
            live.after[key] = code
            known = key in live.before
            yield _applying(live.before.get(key), code, base, out, known=known)


def _elsewhere(code: AnySparseCode, move: Move) -> AnySparseCode:
    if isinstance(code, SeededCode):
        return replace(
            code,
            planes=move(code.planes),
            table=move(code.table),
            index=move(code.index),
            owners=move(code.owners),
        )
    return replace(
        code,
        entries=move(code.entries),
        starts=move(code.starts),
        table=move(code.table),
        rows=None if code.rows is None else move(code.rows),
    )


def _applying(
    before: AnySparseCode | None,
    code: AnySparseCode,
    base: torch.Tensor,
    out: torch.Tensor,
    *,
    known: bool,
) -> Job:
    def apply() -> int:
        moved = _touched(code, base, out)
        if before is not None:
            switch_sparse(before, code, base, out)
            return moved + _touched(before, base, out)
        if not known:
            out.copy_(base)
            moved += _moved_by(base, out)
        apply_sparse(code, base, out)
        return moved

    return apply


@dataclass(frozen=True, slots=True)
class CopyForm:
    """Elements that are kept as they are: heads, integers, exact weights."""

    pieces: tuple[tuple[torch.Tensor, tuple[torch.Tensor, ...]], ...]
    """(flat elements, flat tensors that they go to)."""
    views: tuple[tuple[torch.Tensor, tuple[tuple[Build, torch.Tensor], ...]], ...]
    """(bytes of a segment, (what makes a tensor of them, tensor that it goes to))."""

    @property
    def nbytes(self) -> int:
        """Of the elements."""
        return sum(held.nbytes for held, _ in (*self.pieces, *self.views))

    def to(self, move: Move) -> CopyForm:
        """With the elements elsewhere."""
        return CopyForm(
            tuple((move(held), outs) for held, outs in self.pieces),
            tuple((move(held), views) for held, views in self.views),
        )

    def jobs(self, live: Live) -> Iterator[Job]:
        """Copies."""
        for held, outs in self.pieces:
            for out in outs:
                yield from _copies(held, out)
        for held, views in self.views:
            for build, tensor in views:
                yield _copying(build(held), tensor)


#: Elements a copy, so that threads share the large ones.
_STEP: Final = 1 << 20


def _copies(source: torch.Tensor, out: torch.Tensor) -> Iterator[Job]:
    step = _STEP if out.device.type == "cpu" else max(out.numel(), 1)
    for start in range(0, out.numel(), step):
        yield _copying(source[start : start + step], out[start : start + step])
