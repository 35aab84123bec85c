"""The forms in which a task's code is kept in memory, and how each becomes weights in place.

A form knows the tensors of the model that it writes. What it keeps of its own, beside base and
shared vector, can be moved between the host and the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

import numpy as np
import torch

from tallstore.ops import (
    AnySparseCode,
    SeededCode,
    apply_sparse,
    density,
    reconstruct_placed,
    restore_sparse,
    switch_sparse,
)
from tallstore.ops.programs import Planes, Work
from tallstore.ops.touches import Applied, Kept, Touches
from tallstore.scratch import Scratch
from tallstore.serving.arrangement import Arrangement, compiles

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
    "There",
]

#: Work that can be done on any thread; returns the bytes of memory that it read and wrote.
Job = Callable[[], int]
#: Gives the same tensor elsewhere.
Move = Callable[[torch.Tensor], torch.Tensor]
#: Makes a tensor of a segment's bytes.
Build = Callable[[torch.Tensor], torch.Tensor]
#: A tensor of the model and weights of the base, by where they are: two tasks may have a tensor
#: that the model ties over one and over the other of the base's.
_Key = tuple[int, int, int]
#: A base and a shared vector, by where they are.
_Arena = tuple[int, int]
_THE_BASE: Final = None


@dataclass(frozen=True, slots=True)
class There:
    """A sparse code that was applied to a tensor."""

    code: AnySparseCode
    moved: int
    """Bytes that are read and written to touch what the code touches."""

    @classmethod
    def by(cls, code: AnySparseCode, base: torch.Tensor, out: torch.Tensor) -> There:
        """What a code leaves in `out`; worked out once, since to ask over again takes a while."""
        weights = round(density(code) * code.weights)
        return cls(code, weights * (base.element_size() + out.element_size()) + code.nbytes)


@dataclass(slots=True)
class Live:
    """What is in the model's tensors: the base, or a sparse code over it; others are not listed."""

    threads: int = 1
    """That share the jobs."""
    before: dict[_Key, There | None] = field(default_factory=dict)
    after: dict[_Key, There | None] = field(default_factory=dict)
    applied_before: list[Applied] = field(default_factory=list)
    applied_after: list[Applied] = field(default_factory=list)
    """The same where the compiled loops wrote it."""
    planes_before: dict[_Arena, Planes] = field(default_factory=dict)
    planes_after: dict[_Arena, Planes] = field(default_factory=dict)
    """What wrote the rest of an arena, where the compiled loops did."""
    spare: list[Kept] = field(default_factory=list)
    """Memory for what lies under the next codes."""
    scratch: Scratch = field(default_factory=Scratch)

    def next(self) -> None:
        """What was written is what is there now."""
        self.spare += [one.kept for one in self.applied_before if one.kept is not None]
        self.applied_before, self.applied_after = self.applied_after, []
        self.before, self.after = self.after, {}
        self.planes_before, self.planes_after = self.planes_after, {}

    def forget(self) -> None:
        """Nothing is known of what is there."""
        self.spare, self.applied_before, self.applied_after = [], [], []
        self.before, self.after = {}, {}
        self.planes_before, self.planes_after = {}, {}

    def apply(self, program: Touches) -> Iterator[Job]:
        """Work for all threads; from then on that is what is there."""
        kept = self._keep(program.under)
        start = program.start(self.applied_before, kept)
        self.applied_after.append(Applied(program, kept))
        if start is None:
            return
        for number in range(self.threads):
            yield partial(_working, start.work, 0 if number else start.moved)

    def _keep(self, nbytes: int) -> Kept | None:
        """Memory for what lies under codes: what was used before is in place already."""
        if not nbytes:
            return None
        fitting = [n for n, memory in enumerate(self.spare) if memory.size >= nbytes]
        if fitting:
            return self.spare.pop(min(fitting, key=lambda n: self.spare[n].size))
        if self.spare:
            self.spare.pop()
        return np.empty(nbytes, np.uint8)


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


def _key(base: torch.Tensor, out: torch.Tensor) -> _Key:
    return out.data_ptr(), out.numel(), base.data_ptr()


def _moved_by(base: torch.Tensor, out: torch.Tensor) -> int:
    return base.nbytes + out.nbytes


@dataclass(frozen=True, slots=True)
class BaseForm:
    """Weights that are the base's."""

    runs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """(weights of the base, tensor that they go to)."""
    program: list[Touches] = field(default_factory=list, compare=False)
    """How the compiled loops write it; made when it is first written."""

    @property
    def nbytes(self) -> int:
        """Nothing: the base is there for all."""
        return 0

    def to(self, move: Move) -> BaseForm:
        """Itself."""
        return self

    def jobs(self, live: Live) -> Iterator[Job]:
        """Copies; nothing where the base is already, and of a sparse code what it touched."""
        if self.runs and compiles(*self.runs[0]):
            if not self.program or not self.program[0].valid():
                self.program[:] = [Touches([(None, base, out) for base, out in self.runs])]
            yield from live.apply(self.program[0])
            return
        for base, out in self.runs:
            key = _key(base, out)
            live.after[key] = _THE_BASE
            if key not in live.before:
                yield _copying(base, out)
                continue
            there = live.before[key]
            if there is not None:
                yield _restoring(there, base, out)


def _copying(source: torch.Tensor, out: torch.Tensor) -> Job:
    def copy() -> int:
        out.copy_(source)
        return _moved_by(source, out)

    return copy


def _restoring(there: There, base: torch.Tensor, out: torch.Tensor) -> Job:
    def restore() -> int:
        restore_sparse(there.code, base, out)
        return there.moved

    return restore


def _working(work: Work, moved: int) -> int:
    work()
    return moved


@dataclass(frozen=True, slots=True)
class PlanesForm:
    """Dense codes of an arena: K planes, times the shared vector or times 1."""

    arrangement: Arrangement
    """Where the arena's weights go, and what they are made from."""
    planes: torch.Tensor
    """uint8, shape (K, weights / 8)."""
    levels: torch.Tensor
    """float32, shape (runs + 1, 2**K): a row a run, and one that is not used."""
    program: list[Planes] = field(default_factory=list, compare=False)
    """How the compiled loops write it; made when it is first written."""

    @property
    def nbytes(self) -> int:
        """Of the planes."""
        return self.planes.nbytes

    def to(self, move: Move) -> PlanesForm:
        """With the planes elsewhere."""
        return PlanesForm(self.arrangement, move(self.planes), move(self.levels))

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
        if there.compiles:
            yield from self._compiled(live)
            return
        levels = [tuple(row) for row in self.levels.tolist()]
        for cut in there.cuts:
            yield lambda cut=cut: cut.reconstruct(there, self.planes, levels, live.scratch)  # type: ignore[misc]

    def _compiled(self, live: Live) -> Iterator[Job]:
        there = self.arrangement
        if not self.program or not self.program[0].valid():
            self.program[:] = [Planes(list(there.parts(self.planes)), self.levels)]
        arena = there.base.data_ptr(), 0 if there.vector is None else there.vector.data_ptr()
        self.program[0].since(live.planes_before.get(arena))
        live.planes_after[arena] = self.program[0]
        work = self.program[0].start()
        moved = there.moved + self.planes.nbytes
        for number in range(live.threads):
            yield partial(self._writing, work, 0 if number else moved)

    def _writing(self, work: Work, moved: int) -> int:
        """A thread's part; the first counts the bytes of all."""
        return moved - work() * self.arrangement.each


@dataclass(frozen=True, slots=True)
class SparseForm:
    """Codes that touch few weights, kept as positions and codes, or as seeded values."""

    runs: tuple[tuple[AnySparseCode, torch.Tensor, torch.Tensor], ...]
    """(code over the run's weights, weights of the base, tensor that they go to)."""
    leaves: list[There] = field(default_factory=list, compare=False)
    """What the codes leave in the tensors; worked out when they are first written."""
    program: list[Touches] = field(default_factory=list, compare=False)
    """How the compiled loops write it; made when it is first written."""

    @property
    def nbytes(self) -> int:
        """Of the codes."""
        return sum(code.nbytes for code, _, _ in self.runs)

    def to(self, move: Move) -> SparseForm:
        """With the codes elsewhere."""
        return SparseForm(tuple((_elsewhere(code, move), b, out) for code, b, out in self.runs))

    def jobs(self, live: Live) -> Iterator[Job]:
        """What the code before touched is put back, and what this one touches is written."""
        if self.runs and compiles(*self.runs[0][1:]):
            if not self.program or not self.program[0].valid():
                self.program[:] = [Touches(self.runs)]
            yield from live.apply(self.program[0])
            return
        if not self.leaves:
            # All of them or none, should it be interrupted.
            self.leaves[:] = [There.by(*run) for run in self.runs]
        for (_, base, out), mine in zip(self.runs, self.leaves, strict=True):
            key = _key(base, out)
            there, known = live.before.get(key), key in live.before
            live.after[key] = mine
            yield _applying(there, mine, base, out, known=known)


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
    there: There | None, mine: There, base: torch.Tensor, out: torch.Tensor, *, known: bool
) -> Job:
    def apply() -> int:
        if there is not None:
            switch_sparse(there.code, mine.code, base, out)
            return mine.moved + there.moved
        if not known:
            out.copy_(base)
        apply_sparse(mine.code, base, out)
        return mine.moved + (0 if known else _moved_by(base, out))

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
