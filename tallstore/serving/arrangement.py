"""Where the coded weights of an arena go, worked out once for all tasks that put them there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tallstore import compiling
from tallstore.layout import BLOCK
from tallstore.ops import Places, compiled, listed, place, reconstruct
from tallstore.scratch import Scratch
from tallstore.serving.planning import Run, is_few
from tallstore.serving.resident import host_memory

__all__ = ["Arrangement", "Cut", "arrange", "compiles"]

#: Weights a cut: threads share large tensors.
_CUT: Final = 1 << 20
#: Tensors of fewer weights are reconstructed together and copied: a call costs more than they do.
_SMALL: Final = 1 << 15


@dataclass(frozen=True, slots=True)
class Cut:
    """Weights that one call reconstructs on the CPU."""

    low: int
    high: int
    row: int
    """Of the levels."""
    codes: int
    """Where they start in the planes."""
    base: torch.Tensor
    vector: torch.Tensor | None
    out: torch.Tensor | None
    """Where they go; None: to `pieces`."""
    pieces: tuple[tuple[int, int, torch.Tensor], ...] = ()
    """(first, counted in the cut; row; tensor) of small tensors."""

    def reconstruct(
        self,
        there: Arrangement,
        planes: torch.Tensor,
        levels: Sequence[tuple[float, ...]],
        scratch: Scratch,
    ) -> int:
        """Write the weights; returns the bytes read and written."""
        part = planes[:, self.codes // 8 : (self.codes + self.high - self.low + 7) // 8]
        moved = self.base.nbytes + part.nbytes + (0 if self.vector is None else self.vector.nbytes)
        if self.out is not None:
            row = levels[self.row]
            reconstruct(self.base, part, self.vector, row, self.out, scratch=scratch)
            return moved + self.out.nbytes
        alike = all(levels[row] == levels[self.row] for _, row, _ in self.pieces)
        if alike:
            dtype = self.pieces[0][2].dtype
            raw = scratch.take("serving: small", self.base.numel() * dtype.itemsize)
            whole = torch.from_numpy(raw).view(dtype)
            row = levels[self.row]
            reconstruct(self.base, part, self.vector, row, whole, scratch=scratch)
        for first, row_number, out in self.pieces:
            stop = first + out.numel()
            if alike:
                out.copy_(whole[first:stop])
            else:
                step = None if self.vector is None else self.vector[first:stop]
                bits = part[:, first // 8 : (stop + 7) // 8]
                row = levels[row_number]
                reconstruct(self.base[first:stop], bits, step, row, out, scratch=scratch)
            moved += out.nbytes
        return moved


@dataclass(frozen=True, slots=True)
class Arrangement:
    """An arena of the base and the tensors that its coded weights go to."""

    base: torch.Tensor
    vector: torch.Tensor | None
    runs: tuple[Run, ...]
    alone: bool
    """Whether planes have the codes of the runs' blocks alone, one run after the other."""
    places: Places | None
    """On CUDA."""
    cuts: tuple[Cut, ...]
    """On the CPU."""
    pieces: tuple[tuple[int, int, Run], ...]
    """On the CPU with compiled loops: (row of the levels, where the codes start, weights), in
    pieces that are shared."""
    weights: int
    each: int
    """Bytes that a reconstruction reads and writes for a weight, the planes' aside."""

    @property
    def moved(self) -> int:
        """Bytes that a reconstruction of them all reads and writes."""
        return self.weights * self.each

    @property
    def compiles(self) -> bool:
        """Whether compiled loops write it."""
        return bool(self.pieces)

    def pick(self, planes: torch.Tensor) -> torch.Tensor:
        """What is kept of an arena's planes, which are on the host: all, or the runs' blocks."""
        if not self.alone:
            return planes
        spans = [(run.first // 8, -(-run.stop // BLOCK) * BLOCK // 8) for run in self.runs]
        found = torch.cat([planes[:, start:stop] for start, stop in spans], dim=1)
        return host_memory(found.nbytes, self.base.device).view(found.shape).copy_(found)

    def parts(
        self, planes: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, torch.Tensor]]:
        """What `ops.programs.Planes` takes."""
        for row, at, run in self.pieces:
            vector = None if self.vector is None else self.vector[run.first : run.stop]
            bits = planes[:, at // 8 : (at + run.out.numel() + 7) // 8]
            yield self.base[run.first : run.stop], bits, vector, row, run.out


def compiles(*tensors: torch.Tensor | None) -> bool:
    """Whether compiled loops write such weights: on the CPU, where they are loaded."""
    first = next(tensor for tensor in tensors if tensor is not None)
    return first.device.type == "cpu" and compiling.loaded() and compiled.takes(*tensors)


def arrange(runs: Sequence[Run], base: torch.Tensor, vector: torch.Tensor | None) -> Arrangement:
    """Work out how runs of an arena are reconstructed on the device that they are on.

    Parameters
    ----------
    runs
        At least one; their first weights are multiples of 1024.
    base, vector
        The arenas.
    """
    ordered = tuple(sorted(runs, key=lambda run: run.first))
    alone, places = is_few(ordered, base.numel()), [(run.first, run.out) for run in ordered]
    firsts = listed(places) if alone else tuple(first for first, _ in places)
    weights = sum(run.out.numel() for run in ordered)
    each = base.element_size() + (0 if vector is None else vector.element_size())
    each += ordered[0].out.element_size()
    if compiles(base, vector, *(run.out for run in ordered)):
        pieces = tuple(
            (row, at + cut.first - run.first, cut)
            for row, (run, at) in enumerate(zip(ordered, firsts, strict=True))
            for cut in run.cut()
        )
        return Arrangement(base, vector, ordered, alone, None, (), pieces, weights, each)
    if base.device.type == "cpu":
        cuts = tuple(_cuts(ordered, firsts, base, vector, together=not alone))
        return Arrangement(base, vector, ordered, alone, None, cuts, (), weights, each)
    there = place(places, base.numel(), alone=alone)
    return Arrangement(base, vector, ordered, alone, there, (), (), weights, each)


def _cuts(
    runs: Sequence[Run],
    firsts: Sequence[int],
    base: torch.Tensor,
    vector: torch.Tensor | None,
    *,
    together: bool,
) -> list[Cut]:
    made: list[Cut] = []
    small: list[tuple[int, Run]] = []

    def cut(
        low: int,
        high: int,
        row: int,
        codes: int,
        out: torch.Tensor | None,
        pieces: Sequence[tuple[int, int, torch.Tensor]] = (),
    ) -> None:
        step = None if vector is None else vector[low:high]
        made.append(Cut(low, high, row, codes, base[low:high], step, out, tuple(pieces)))

    def flush() -> None:
        if small:
            low, high = small[0][1].first, small[-1][1].stop
            pieces = [(run.first - low, row, run.out) for row, run in small]
            cut(low, high, small[0][0], low, None, pieces)
            small.clear()

    for row, run in enumerate(runs):
        if together and run.out.numel() < _SMALL:
            if small and run.stop - small[0][1].first > _SMALL:
                flush()
            small.append((row, run))
            continue
        flush()
        for start in range(0, run.out.numel(), _CUT):
            stop = min(start + _CUT, run.out.numel())
            at = firsts[row] + start
            cut(run.first + start, run.first + stop, row, at, run.out[start:stop])
    flush()
    return made
