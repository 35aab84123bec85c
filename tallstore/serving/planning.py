"""What a task's weights are made from when they are switched to: runs of the base, and the rest.

Nothing is read here but documents, so that what serving takes is known before anything is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tallstore.codes import SEEDED, SPARSE, ArenaCode, SegmentCode
from tallstore.documents import BASE, CODE
from tallstore.dtypes import is_codable
from tallstore.kernels.sparse_reference import GROUP
from tallstore.layout import BLOCK, SPAN
from tallstore.loading import Loader
from tallstore.serving.binding import Binding
from tallstore.spancodes import code_bits
from tallstore.specs import TensorSpec

__all__ = ["Plan", "Run", "Verbatim", "in_blocks", "is_few", "plan"]


@dataclass(frozen=True, slots=True)
class Run:
    """Weights of an arena of the base, and the flat tensor that they go to."""

    segment: int
    """Of the base."""
    first: int
    """Counted in the arena."""
    out: torch.Tensor

    @property
    def stop(self) -> int:
        """The weight after its last."""
        return self.first + self.out.numel()

    def cut(self) -> list[Run]:
        """Its spans, each a run: threads share large tensors, and a span stays in the cache."""
        made, start = [], self.first
        while start < self.stop:
            stop = min((start // SPAN + 1) * SPAN, self.stop)
            piece = self.out[start - self.first : stop - self.first]
            made.append(Run(self.segment, start, piece))
            start = stop
        return made


def in_blocks(runs: Sequence[Run]) -> int:
    """Weights of the blocks that runs take."""
    return sum(-(-run.out.numel() // BLOCK) * BLOCK for run in runs)


def is_few(runs: Sequence[Run], weights: int) -> bool:
    """Whether planes are kept of the runs' blocks alone, not of all weights of the arena."""
    return in_blocks(runs) < weights // 2


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Elements of a segment of the task that are kept as they are: heads, exact weights."""

    segment: int
    """Of the task."""
    start: int
    count: int
    outs: tuple[torch.Tensor, ...]
    """Flat tensors that they go to."""
    views: tuple[tuple[TensorSpec, torch.Tensor], ...] = ()
    """Tensors that are views of the segment, which is whole here."""


@dataclass(slots=True)
class Plan:
    """What a task's weights are made from."""

    loader: Loader
    binding: Binding
    base: dict[int, list[Run]] = field(default_factory=lambda: defaultdict(list))
    """By arena: weights that are the base's."""
    coded: dict[int, list[Run]] = field(default_factory=lambda: defaultdict(list))
    """By arena: weights that the arena's code and the base give."""
    verbatim: list[Verbatim] = field(default_factory=list)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(from, to): tensors of the model that are one in the task."""
    located: bool = False
    """Whether seeded values are kept with their places, so that no switch works them out."""

    @property
    def codes(self) -> Mapping[int, ArenaCode]:
        """The task's codes by arena."""
        task = self.loader.task
        return {code.arena: code for code in task.codes} if task is not None else {}

    @property
    def arenas(self) -> frozenset[int]:
        """Arenas of the base that are needed."""
        return frozenset(self.base) | frozenset(self.coded)

    @property
    def vectors(self) -> frozenset[int]:
        """Arenas of the shared vector that are needed."""
        codes = self.codes
        return frozenset(arena for arena in self.coded if codes[arena].shared)

    def compact(self, arena: int, run: Run) -> SegmentCode | None:
        """How a run is coded, if it is by few of its weights, and is kept so; else in planes."""
        task, whole = self.loader.task, self.loader.base.contents.segments[run.segment].numel
        codings = (task.codings if task is not None else None) or {}
        found = codings.get(run.segment)
        if found is None or self.codes[arena].shared or run.out.numel() != whole:
            return None
        return found if found.form in (SPARSE, SEEDED) else None

    @property
    def coded_bytes(self) -> int:
        """Bytes that the codes take when they are resident, planes and compact ones."""
        arenas, codes = self.loader.base.layout.arenas, self.codes
        total = 0
        for arena, runs in self.coded.items():
            compact = [self.compact(arena, run) for run in runs]
            total += sum(
                self._compact_bytes(run, code)
                for run, code in zip(runs, compact, strict=True)
                if code is not None
            )
            dense = [run for run, code in zip(runs, compact, strict=True) if code is None]
            weights = arenas[arena].weights
            if dense:
                kept = in_blocks(dense) if is_few(dense, weights) else weights
                total += code_bits(codes[arena]) * kept // 8
        return total

    def _compact_bytes(self, run: Run, code: SegmentCode) -> int:
        weights = run.out.numel()
        if code.form == SEEDED and not self.located:
            return _seeded_bytes(run, code)
        touched = self._touched(run, code)
        return 2 * touched + 8 * (-(-weights // GROUP) + 1) + 4 * (1 << code.bits)

    def _touched(self, run: Run, code: SegmentCode) -> int:
        """Weights of a run that its code touches."""
        if code.form == SEEDED:
            return -(-run.out.numel() // code.stride)
        task = self.loader.task
        density = {s.segment: s.density for s in task.stats} if task is not None else {}
        return round(density.get(run.segment, 1.0) * run.out.numel())

    @property
    def under(self) -> int:
        """Bytes of the weights that its compact codes touch."""
        return sum(
            self._touched(run, code) * run.out.element_size()
            for arena, runs in self.coded.items()
            for run in runs
            if (code := self.compact(arena, run)) is not None
        )

    @property
    def exact_bytes(self) -> int:
        """Bytes of weights that are coded, but kept as they are for being exact."""
        return self._verbatim_bytes(private=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the task takes when it is resident."""
        return self.coded_bytes + self.exact_bytes + self._verbatim_bytes(private=True)

    def _verbatim_bytes(self, *, private: bool) -> int:
        segments = self.loader.contents.segments
        total = 0
        for piece in self.verbatim:
            segment = segments[piece.segment]
            if self._is_private(piece) == private:
                total += piece.count * segment.nbytes // max(segment.numel, 1)
        return total

    def _is_private(self, piece: Verbatim) -> bool:
        task = self.loader.task
        return task is None or all(part.kind != CODE for part in task.parts[piece.segment])


def _seeded_bytes(run: Run, code: SegmentCode) -> int:
    total, start = 0, run.first
    while start < run.stop:
        stop = min((start // SPAN + 1) * SPAN, run.stop)
        groups = -(-(stop - start) // code.stride)
        blocks = -(-groups // BLOCK)
        # Values, and for each block and piece what the kernels find them by.
        total += blocks * (BLOCK // 8 * code.bits + 4) + 4 * len(code.levels) + 40
        start = stop
    return total


def plan(loader: Loader, binding: Binding, *, exact: bool) -> Plan:
    """Say what each tensor of a task is made from.

    Parameters
    ----------
    loader
        Of the task.
    exact
        Whether the residual counts, where there is one.
    """
    made = Plan(loader, binding)
    for segment, outs in binding.whole.items():
        _add_segment(made, segment, outs[0], exact=exact)
        made.copies += [(outs[0], other) for other in outs[1:]]
    viewed: dict[int, list[tuple[TensorSpec, torch.Tensor]]] = defaultdict(list)
    for spec, tensor in binding.views:
        viewed[spec.segment].append((spec, tensor))
    for segment, views in viewed.items():
        count = loader.contents.segments[segment].numel
        made.verbatim.append(Verbatim(segment, 0, count, (), tuple(views)))
    return made


def _add_segment(made: Plan, segment: int, out: torch.Tensor, *, exact: bool) -> None:
    task, layout = made.loader.task, made.loader.base.layout
    parts = () if task is None else task.parts[segment]
    start = 0
    for part in parts:
        piece = out[start : start + part.count]
        place = layout.places[part.segment] if part.kind in (BASE, CODE) else None
        code = made.codes.get(place.arena) if place is not None and part.kind == CODE else None
        first = 0 if place is None else place.offset + part.start
        if place is None or (code is not None and not _from_codes(code, first, exact=exact)):
            made.verbatim.append(Verbatim(segment, start, part.count, (piece,)))
        elif code is not None and code.coded:
            made.coded[place.arena].append(Run(part.segment, first, piece))
        else:
            made.base[place.arena].append(Run(part.segment, first, piece))
        start += part.count


def _from_codes(code: ArenaCode, first: int, *, exact: bool) -> bool:
    """Whether codes and the base alone give the weights from `first` on."""
    if exact and code.exact is not None:
        return False
    return is_codable(code.dtype) and (not code.coded or first % BLOCK == 0)
