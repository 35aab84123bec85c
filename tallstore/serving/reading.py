"""From the store to the forms in memory: everything is read and checked before any is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from tallstore.codecs import Bytes
from tallstore.codes import SPARSE
from tallstore.dtypes import itemsize, torch_dtype
from tallstore.errors import MismatchError
from tallstore.loading import Loader
from tallstore.objects import build_tensor
from tallstore.serving.arrangement import Arrangement, arrange
from tallstore.serving.coded import compact_form, read_planes
from tallstore.serving.forms import BaseForm, CopyForm, Form, Move, PlanesForm
from tallstore.serving.planning import Plan, Run, Verbatim, is_few
from tallstore.serving.resident import Resident, host_memory
from tallstore.spans import Run as Piece
from tallstore.spans import SpanKey
from tallstore.workers import Workers

__all__ = ["Reader", "TaskCode"]


@dataclass(frozen=True, slots=True)
class TaskCode:
    """A task's code in memory, ready to be written into the model."""

    forms: tuple[Form, ...]
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """(from, to), once the forms are written."""
    written: tuple[torch.Tensor, ...] = ()
    """Tensors of the model whose versions tell autograd that all this was written."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps."""
        return sum(form.nbytes for form in self.forms)

    def to(self, move: Move) -> TaskCode:
        """The same with what it keeps moved."""
        return replace(self, forms=tuple(form.to(move) for form in self.forms))


class Reader:
    """Reads tasks into the host's memory.

    Parameters
    ----------
    resident
        Base and shared vector, which forms refer to.
    pool
        Threads to read with.
    """

    def __init__(self, resident: Resident, pool: Workers) -> None:
        self._resident = resident
        self._pool = pool
        self._arrangements: dict[tuple[object, ...], Arrangement] = {}

    def read(self, plan: Plan) -> TaskCode:
        """Read a task, checking every chunk of it.

        Raises
        ------
        CorruptStoreError, ChecksumError
            It is damaged.
        MismatchError
            The model ties tensors that the task has apart, and that are not equal.
        """
        self._check_ties(plan)
        resident = self._resident
        forms: list[Form] = []
        for arena, runs in plan.base.items():
            base, cut = resident.base(arena), self._cut(runs)
            forms.append(BaseForm(tuple((base[r.first : r.stop], r.out) for r in cut)))
        for arena, runs in plan.coded.items():
            forms += self._coded(plan, arena, runs)
        if plan.verbatim:
            forms.append(self._verbatim(plan))
        return TaskCode(tuple(forms), tuple(plan.copies), plan.binding.written)

    # -- codes ----------------------------------------------------------------------------

    def _arrangement(self, arena: int, runs: Sequence[Run], *, vector: bool) -> Arrangement:
        where = tuple((run.first, run.out.data_ptr(), run.out.numel()) for run in runs)
        key = (arena, vector, *where)
        if key not in self._arrangements:
            shared = self._resident.vector(arena) if vector else None
            self._arrangements[key] = arrange(runs, self._resident.base(arena), shared)
        return self._arrangements[key]

    def _coded(self, plan: Plan, arena: int, runs: Sequence[Run]) -> list[Form]:
        """The codes over an arena: compact ones, and planes for the rest."""
        base = self._resident.base(arena)
        compact = {n: plan.compact(arena, run) for n, run in enumerate(runs)}
        few = [
            (run, code)
            for n, code in compact.items()
            if code is not None
            for run in self._cut([runs[n]])
        ]
        rest = [runs[n] for n, code in compact.items() if code is None]
        forms: list[Form] = []
        planes = None
        if rest or any(code.form == SPARSE for _, code in few):
            kept = rest and not is_few(rest, base.numel())
            where = self._resident.device if kept else torch.device("cpu")
            planes = read_planes(plan.loader, arena, self._pool, pin_for=where)
        if few:
            located = plan.located
            forms.append(
                compact_form(plan.loader, arena, few, base, planes, self._pool, located=located)
            )
        if rest and planes is not None:
            there = self._arrangement(arena, rest, vector=plan.codes[arena].shared)
            levels = plan.loader.decoder.levels(arena)
            rows = [levels.row(run.segment) for run in there.runs]
            forms.append(
                PlanesForm(there, there.pick(planes), levels.table[[*rows, rows[0]]].contiguous())
            )
        return forms

    def _cut(self, runs: Sequence[Run]) -> Sequence[Run]:
        """On the CPU, in pieces for its threads; on CUDA whole, since a launch takes time."""
        if self._resident.device.type != "cpu":
            return runs
        return [piece for run in runs for piece in run.cut()]

    # -- what is kept as it is ------------------------------------------------------------

    def _verbatim(self, plan: Plan) -> CopyForm:
        held = self.decode(plan.loader, plan.verbatim)
        pieces, views = [], []
        for piece, memory in zip(plan.verbatim, held, strict=True):
            if piece.views:
                built = [(partial(build_tensor, spec), tensor) for spec, tensor in piece.views]
                views.append((memory, tuple(built)))
            else:
                dtype = torch_dtype(plan.loader.contents.segments[piece.segment].dtype)
                pieces.append((memory.view(dtype), piece.outs))
        return CopyForm(tuple(pieces), tuple(views))

    def decode(self, loader: Loader, pieces: Sequence[Verbatim]) -> list[torch.Tensor]:
        """The bytes of parts of segments, decoded and checked."""
        decoder, segments = loader.decoder, loader.contents.segments
        sizes = [itemsize(segment.dtype) for segment in segments]
        memory = [
            host_memory(piece.count * sizes[piece.segment], self._resident.device)
            for piece in pieces
        ]
        wanted: dict[int, list[tuple[Verbatim, Bytes]]] = defaultdict(list)
        for piece, held in zip(pieces, memory, strict=True):
            wanted[piece.segment].append((piece, held.numpy()))

        def room(run: Piece) -> list[tuple[Piece, Bytes]]:
            size = sizes[run.segment]
            found = []
            for piece, held in wanted.get(run.segment, ()):
                first = (run.start - piece.start) * size
                if first >= 0 and run.start + run.count <= piece.start + piece.count:
                    found.append((run, held[first : first + run.count * size]))
            return found

        def work(key: SpanKey) -> None:
            filled = [one for run in decoder.runs(key) for one in room(run)]
            if filled:
                data = decoder.load(key, coded=any(run.coded for run, _ in filled))
                decoder.decode(data, key, filled)
                data.release()

        for _ in self._pool.each(work, decoder.spans(list(wanted))):
            pass
        return memory

    def _check_ties(self, plan: Plan) -> None:
        segments = plan.loader.contents.segments
        for pair in plan.binding.twice:
            pieces = [Verbatim(s.segment, 0, segments[s.segment].numel, ()) for s in pair]
            held = self.decode(plan.loader, pieces)
            one, other = (_bits(build_tensor(s, h)) for s, h in zip(pair, held, strict=True))
            if not np.array_equal(one, other):
                raise MismatchError(
                    f"{plan.loader.what}: the model ties {pair[0].name!r} and {pair[1].name!r}, "
                    "which differ in this task; build the model without tying them"
                )

    def check(self, plan: Plan) -> None:
        """Check every chunk of a task, without keeping any; raises as `read` does."""
        self._check_ties(plan)
        snapshot, decoder = plan.loader.snapshot, plan.loader.decoder
        streams = {
            number
            for key in decoder.spans(range(len(plan.loader.contents.segments)))
            for role, number in decoder.needs(key)
            if role in ("own", "planes", "residual")
        }
        chunks = [(number, c) for number in streams for c in range(snapshot.stream(number).chunks)]

        def check(chunk: tuple[int, int]) -> None:
            snapshot.read_chunk(snapshot.stream(chunk[0]), chunk[1], None)

        for _ in self._pool.each(check, chunks):
            pass


def _bits(tensor: torch.Tensor) -> Bytes:
    """The bytes of a tensor's elements, row by row."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    found: Bytes = plain.reshape(-1).view(torch.uint8).numpy()
    return found
