"""From chunks to weights: the prediction of a span, and the residual on top of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import torch

from tallstore.catalog import QUANTIZED, VectorRecord
from tallstore.codecs.quantized import FORMS, dequantize
from tallstore.codelevels import Levels, levels_of
from tallstore.codes import ArenaCode
from tallstore.coding import Bytes, add_residual, from_float32, to_float32
from tallstore.documents import BaseDocument, TaskDocument
from tallstore.dtypes import itemsize, torch_dtype
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError
from tallstore.externalbase import OUTSIDE, base_elements
from tallstore.layout import BLOCK
from tallstore.predicting import predict, scatter
from tallstore.scratch import Scratch
from tallstore.spancodes import code_planes, code_touches
from tallstore.spanmap import SpanMap
from tallstore.spans import Run, Span, SpanKey, Take, Touches
from tallstore.streamchecks import check_streams

__all__ = ["Decoder"]

#: Up to so many tensors of a span are reconstructed each in its place.
_FEW: Final = 8


class Decoder(SpanMap):
    """Decodes the base, or one task, span by span. Thread-safe."""

    def __init__(
        self,
        snapshot: Snapshot,
        base: BaseDocument,
        *,
        task: TaskDocument | None = None,
        vector: VectorRecord | None = None,
        exact: bool = True,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__(base, task)
        self._snapshot = snapshot
        self._vector = vector
        self._exact = exact
        self._codes = {code.arena: code for code in task.codes} if task else {}
        self._levels = {
            arena: levels_of(code, task) for arena, code in self._codes.items() if task is not None
        }
        # Decoders that a thread uses one after another, each done with before the next, can share.
        self._scratch: Final = Scratch() if scratch is None else scratch
        # The base's elements may be in another store; everything else never is.
        self._home, self._base_streams = base_elements(snapshot, base)
        check_streams(snapshot, base, task, vector, home=self._home, elements=self._base_streams)

    def needs(self, key: SpanKey) -> Iterator[tuple[str, int]]:
        """What decoding a span reads: (role, stream), the chunk being the span's number.

        Roles: ``"own"`` or ``"base"``, the elements (``"external base"``: a stream of the store
        that has them); and for what is coded of the base, ``"planes"``, ``"vector"``,
        ``"residual"``.
        """
        own, arena, _ = key
        if own and self._task:
            yield "own", self._task.own_streams[arena]
            return
        yield "base" if self._base.external is None else OUTSIDE, self._base_streams[arena]
        code = self._codes.get(arena)
        if code is None:
            return
        if self._predicts(code):
            for stream in (code.planes, code.sparse, code.seeded):
                if stream is not None:
                    yield "planes", stream
            if code.shared and self._vector is not None and arena < len(self._vector.streams):
                yield "vector", self._vector.streams[arena]
        if code.exact is not None and self._exact:
            yield "residual", code.exact

    def _predicts(self, code: ArenaCode) -> bool:
        """Whether codes are read: not where the exact tier makes the base good by itself."""
        whole = self._exact and code.over_base and code.exact is not None
        return code.coded and not whole

    @property
    def has_exact(self) -> bool:
        """Whether an exact tier is read."""
        return self._exact and any(code.exact is not None for code in self._codes.values())

    # -- chunks ---------------------------------------------------------------------------

    def _chunk(
        self,
        stream: int,
        span: int,
        name: str,
        take: Take | None = None,
        *,
        snapshot: Snapshot | None = None,
        side: Bytes | None = None,
    ) -> Bytes:
        snapshot = snapshot or self._snapshot
        record = snapshot.stream(stream)
        if span >= record.chunks:
            raise CorruptStoreError(
                f"{snapshot.path}: stream {stream} has {record.chunks} chunks, no {span}"
            )
        out = (take or self._scratch.take)(name, record.raw_size(span))
        snapshot.read_chunk(record, span, out, side=side)
        return out

    def _elements_of(self, own: bool, arena: int) -> tuple[Snapshot, int]:
        """Where the elements of an arena are: a snapshot, and the stream in it."""
        if own and self._task:
            return self._snapshot, self._task.own_streams[arena]
        return self._home, self._base_streams[arena]

    def load(
        self,
        key: SpanKey,
        *,
        into: Bytes | None = None,
        coded: bool = True,
        take: Take | None = None,
    ) -> Span:
        """Read and check the chunks of a span.

        Parameters
        ----------
        into
            Where the elements may be decoded to at once, if their bytes are exactly as many.
        coded
            Whether codes are needed.
        take
            Where everything is to be decoded to, under the names of `Span.chunks`; without it,
            into memory of the thread's, or of LMDB's.

        Returns
        -------
        Span
            Valid until the same thread loads the next one, or as long as what `take` gave;
            `release` it when done.
        """
        own, arena, span = key
        home, stream = self._elements_of(own, arena)
        dtype = self.dtype(key)
        if take is None:
            base, in_map = self._elements(home, stream, span, into)
        else:
            base, in_map = self._chunk(stream, span, "base", take, snapshot=home), False
        code = None if own or not coded else self._codes.get(arena)
        if code is None:
            return Span(base, dtype, in_map=in_map)
        planes = vector = residual = None
        vector_dtype = dtype
        bits = 1
        touched = None
        if self._predicts(code):
            if take is None and (code.sparse is not None or code.seeded is not None):
                touched = self._touches(code, span)
                if code.planes is not None:
                    planes, bits = self._chunk(code.planes, span, "planes"), code.bits
            else:
                planes, bits = self._planes(code, span, take)
            if code.shared:
                vector, vector_dtype = self._vector_chunk(arena, span, take)
        if code.exact is not None and self._exact:
            residual = self._residual(code, span, base, dtype, take)
        return Span(
            base, dtype, code, planes, vector, vector_dtype, residual, bits, touched, in_map
        )

    def _planes(self, code: ArenaCode, span: int, take: Take | None) -> tuple[Bytes, int]:
        """The packed codes over a span of the base, plane after plane, and how many planes."""
        if self._task is None:
            raise CorruptStoreError(f"{self._snapshot.path}: codes without a task")
        return code_planes(
            self._snapshot, self._base.layout, self._task, code, span, take or self._scratch.take
        )

    def _touches(self, code: ArenaCode, span: int) -> Mapping[str, Touches]:
        if self._task is None:
            raise CorruptStoreError(f"{self._snapshot.path}: codes without a task")
        return code_touches(self._snapshot, self._base.layout, self._task, code, span)

    def levels(self, arena: int) -> Levels:
        """The levels of the task's codes over an arena that it has codes for."""
        return self._levels[arena]

    def rows(self, arena: int, span: int) -> torch.Tensor | None:
        """The row of levels that each block of a span takes: int32; None: row 0 everywhere."""
        levels = self._levels[arena]
        if levels.rows is None or levels.table.shape[0] == 1:
            return None
        record = self._base.layout.arenas[arena]
        count = min(record.span, record.weights - span * record.span)
        rows = torch.zeros(-(-count // BLOCK), dtype=torch.int32, device="cpu")
        for piece in self._base.layout.pieces(arena, span):
            first = piece.within // BLOCK
            last = -(-(piece.within + piece.count) // BLOCK)
            rows[first:last] = levels.row(piece.segment)
        return rows

    def _elements(
        self, home: Snapshot, stream: int, span: int, into: Bytes | None
    ) -> tuple[Bytes, bool]:
        """The elements of a span, and whether they are in LMDB's map: uncompressed ones are."""
        record = home.stream(stream)
        if into is not None and into.size == record.raw_size(span):
            taken = self._chunk(stream, span, "base", lambda name, size: into, snapshot=home)
            return taken, False
        room: list[Bytes] = []

        def take(size: int) -> Bytes:
            room.append(self._scratch.take("base", size))
            return room[-1]

        return home.view_chunk(record, span, room=take), not room

    def _vector_chunk(self, arena: int, span: int, take: Take | None) -> tuple[Bytes, str]:
        record = self._vector
        stream = record.streams[arena] if record and arena < len(record.streams) else 0
        if record is None or not stream:
            raise CorruptStoreError(
                f"{self._snapshot.path}: a task is coded over a shared vector that is not there"
            )
        return self._vector_weights(arena, span, stream, take), record.decoded_dtype

    def _vector_weights(
        self, arena: int, span: int, stream: int, take: Take | None = None
    ) -> Bytes:
        """The shared vector over a span, in its decoded dtype."""
        if self._vector is None or self._vector.dtype not in QUANTIZED:
            return self._chunk(stream, span, "vector", take)
        raw = self._chunk(stream, span, "quantized vector")
        record = self._base.layout.arenas[arena]
        count = min(record.span, record.weights - span * record.span)
        out = (take or self._scratch.take)("vector", 4 * count)
        dequantize(raw, count, FORMS[self._vector.dtype], out=out.view(np.float32))
        return out

    def codes(self, arena: int, span: int, take: Take) -> tuple[Bytes, int] | None:
        """The packed codes over a span, plane after plane, and how many.

        None where there are none, or where the exact tier does without them.

        Parameters
        ----------
        take
            Where they are to be decoded to.
        """
        code = self._codes.get(arena)
        return None if code is None or not self._predicts(code) else self._planes(code, span, take)

    def planes(self, arena: int, span: int, out: Bytes) -> bool:
        """Fill `out` with the task's packed mask over a span of the base; False: it has none there.

        Bits of weights that the task does not code, padding among them, mean nothing.

        Parameters
        ----------
        out
            uint8, a bit for each weight of the span.
        """
        code = self._codes.get(arena)
        if code is None or code.planes is None:
            return False
        self._snapshot.read_chunk(self._snapshot.stream(code.planes), span, out)
        return True

    # -- weights --------------------------------------------------------------------------

    def decode(self, data: Span, key: SpanKey, runs: Sequence[tuple[Run, Bytes]]) -> None:
        """Fill memory with the bytes of runs of a loaded span.

        Parameters
        ----------
        runs
            Each with the bytes that it is to fill.
        """
        own, arena, _ = key
        size = itemsize(self._layout(own).arenas[arena].dtype)
        for run, out in runs:
            if not run.coded:
                np.copyto(out, data.base[run.within * size : (run.within + run.count) * size])
        coded = [(run, out) for run, out in runs if run.coded]
        if not coded:
            return
        if data.code is None:
            raise CorruptStoreError(f"{self._snapshot.path}: a coded part without a code")
        self._decode_coded(data, key, data.code, coded)

    def _decode_coded(
        self, data: Span, key: SpanKey, code: ArenaCode, runs: Sequence[tuple[Run, Bytes]]
    ) -> None:
        width = itemsize(code.dtype)
        low, together = 0, None
        if data.touched is not None:
            for run, out in runs:
                self._scatter(data, key, code, run, out)
            return
        # Added to the base where that is, the exact tier needs no copy to be added to.
        as_base = (
            data.planes is None and data.residual is not None and code.dtype == data.base_dtype
        )
        if len(runs) > _FEW and not as_base:
            # Many small tensors: one pass over them all, then copies, so that threads meet less.
            low = min(run.within for run, _ in runs) // BLOCK * BLOCK
            high = max(run.within + run.count for run, _ in runs)
            together = self._scratch.take("predicted", (high - low) * width)
            rows = None if data.planes is None else self.rows(key[1], key[2])
            some = None if rows is None else rows[low // BLOCK : -(-high // BLOCK)]
            self._predict(data, key, code, low, high, together, some)
        for run, out in runs:
            known, there = out, slice(run.within * width, (run.within + run.count) * width)
            if as_base:
                known = data.base[there]
            elif together is None:
                row = 0 if data.planes is None else self._levels[key[1]].row(run.origin)
                self._predict(data, key, code, run.within, run.within + run.count, out, row)
            else:
                start = (run.within - low) * width
                np.copyto(out, together[start : start + out.size])
            if data.residual is not None:
                add_residual(known, data.residual[there], code.dtype, out)

    def _scatter(self, data: Span, key: SpanKey, code: ArenaCode, run: Run, out: Bytes) -> None:
        """Predict a run of which sparse or seeded codes touch few weights, or of dense codes."""
        coding = (self._task.codings or {}).get(run.origin) if self._task else None
        levels = self._levels[key[1]]
        high = run.within + run.count
        if coding is None or data.touched is None or coding.form not in data.touched:
            row = levels.row(run.origin)
            self._predict(data, key, code, run.within, high, out, row)
            return
        dtype = self._base.layout.arenas[key[1]].dtype
        size = itemsize(dtype)
        found = data.touched[coding.form]
        first, last = np.searchsorted(found.at, (run.within, high))
        scatter(
            data.base[run.within * size : high * size],
            dtype,
            Touches(found.at[first:last] - run.within, found.codes[first:last]),
            levels.table[levels.row(run.origin)].numpy(),
            out,
            code.dtype,
        )

    def _predict(
        self,
        data: Span,
        key: SpanKey,
        code: ArenaCode,
        low: int,
        high: int,
        out: Bytes,
        rows: torch.Tensor | int | None,
    ) -> None:
        """Predict weights `low` to `high` of a span, of one row of levels or of several."""
        dtype = self._base.layout.arenas[key[1]].dtype
        size = itemsize(dtype)
        planes = vector = None
        if data.planes is not None:
            planes = data.planes.reshape(data.code_bits, -1)[:, low // 8 : (high + 7) // 8]
        if data.vector is not None:
            vector = torch.from_numpy(data.vector).view(torch_dtype(data.vector_dtype))[low:high]
        base = data.base[low * size : high * size]
        # A row of fewer levels than the arena's widest codes have: the first of it.
        table = None
        if planes is not None:
            table = self._levels[key[1]].table[:, : 1 << data.code_bits].contiguous()
        if isinstance(rows, int) and table is not None:
            table, rows = table[rows : rows + 1], None
        some = rows if isinstance(rows, torch.Tensor) else None
        predict(base, dtype, planes, vector, table, some, out, code.dtype, self._scratch)

    def base_and_vector(self, arena: int, span: int) -> tuple[Bytes, Bytes | None]:
        """The bytes of the base and of the shared vector (None where it has none) over a span.

        The vector's are of its `VectorRecord.decoded_dtype`.

        Valid until the same thread asks for the next one.
        """
        base = self._chunk(self._base_streams[arena], span, "base", snapshot=self._home)
        record = self._vector
        if record is None or arena >= len(record.streams) or not record.streams[arena]:
            return base, None
        return base, self._vector_weights(arena, span, record.streams[arena])

    def predict(
        self,
        arena: int,
        span: int,
        base: Bytes,
        vector: Bytes | None,
        codes: tuple[Bytes, int] | None,
        dtype: str,
    ) -> Bytes:
        """What loading predicts for a span of which base, vector and codes are at hand.

        Parameters
        ----------
        codes
            As `codes` gives them.
        """
        base_dtype = self._base.layout.arenas[arena].dtype
        if codes is None and dtype == base_dtype:
            return base
        out = self._scratch.take("predicted", base.size // itemsize(base_dtype) * itemsize(dtype))
        if codes is None:
            predict(base, base_dtype, None, None, None, None, out, dtype, self._scratch)
            return out
        part = None
        if vector is not None and self._vector is not None and self._codes[arena].shared:
            part = torch.from_numpy(vector).view(torch_dtype(self._vector.decoded_dtype))
        planes, table = codes[0].reshape(codes[1], -1), self._levels[arena].table
        rows = self.rows(arena, span)
        predict(base, base_dtype, planes, part, table, rows, out, dtype, self._scratch)
        return out

    def residual(self, arena: int, span: int, base: Bytes) -> Bytes | None:
        """The residual over a span; None where there is none, or it is not wanted.

        Valid until the same thread asks for the next one.

        Parameters
        ----------
        base
            The base's bytes over the span.
        """
        code = self._codes.get(arena)
        if code is None or not self._exact:
            return None
        return self._residual(code, span, base, self._base.layout.arenas[arena].dtype)

    def _residual(
        self, code: ArenaCode, span: int, base: Bytes, dtype: str, take: Take | None = None
    ) -> Bytes | None:
        if code.exact is None:
            return None
        # What it was encoded against.
        start = base if code.dtype == dtype else from_float32(to_float32(base, dtype), code.dtype)
        return self._chunk(code.exact, span, "residual", take, side=start)
