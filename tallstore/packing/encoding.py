"""Encoding the spans of one target: codes and residuals go to its streams, sums are kept."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from tallstore.bits import count_bits
from tallstore.catalog import VectorRecord
from tallstore.codecs import SPARSE as SPARSE_CODEC
from tallstore.codecs import Bytes
from tallstore.codes import (
    PLANES,
    SEEDED,
    SPARSE,
    TALL_LEVELS,
    ArenaCode,
    SeededPiece,
    SegmentCode,
    seeded_capacity,
    seeded_pieces,
)
from tallstore.coding import CodeStats, Floats, from_float32, residual, to_float32
from tallstore.dtypes import is_codable, itemsize
from tallstore.engine.chunk import Encoding
from tallstore.engine.session import StreamWriter, WriteSession
from tallstore.layout import Layout
from tallstore.packing.drafts import SpanCodes, settle
from tallstore.packing.encodings import BITS, codes, residuals
from tallstore.packing.masks import SpanMasks
from tallstore.packing.surveying import Moves, span_moves
from tallstore.packing.target import Target

__all__ = ["TargetEncoder"]

_SIGNS: Final = Encoding(SPARSE_CODEC)
#: One touched weight in so many is too many for `_SIGNS`.
_DENSE: Final = 4


class TargetEncoder:
    """What is being gathered about one target while spans go by. Thread-safe."""

    def __init__(self, session: WriteSession, target: Target, layout: Layout) -> None:
        self.target = target
        self.layout = layout
        self._lock = threading.Lock()
        self.stats: dict[int, CodeStats] = defaultdict(CodeStats)
        self._planes: dict[int, StreamWriter] = {}
        self._sparse: dict[int, StreamWriter] = {}
        self._seeded: dict[int, StreamWriter] = {}
        self._exact: dict[int, StreamWriter] = {}
        self._bits: dict[int, int] = {}
        self._value_bits: dict[int, int] = {}
        #: What places seeded values, before there are levels.
        self._seeds: dict[int, SegmentCode] = {}
        for arena in target.candidate.arenas():
            span = layout.arenas[arena].span
            if self.masks(arena):
                self._planes[arena], self._bits[arena] = session.stream(span // 8), 1
            self._open_codes(session, arena)
            if target.exact and itemsize(self.dtype(arena)) <= 8:
                self._exact[arena] = session.stream(span * itemsize(self.dtype(arena)))

    def _open_codes(self, session: WriteSession, arena: int) -> None:
        drafts = [
            draft
            for segment, draft in (self.target.drafts or {}).items()
            if self.layout.places[segment].arena == arena
        ]
        span = self.layout.arenas[arena].span
        dense = [draft.bits for draft in drafts if draft.form == PLANES]
        if dense:
            self._bits[arena] = max(dense)
            self._planes[arena] = session.stream(span * max(dense) // 8)
        if any(draft.form == SPARSE for draft in drafts):
            self._sparse[arena] = session.stream(span * 2 // 8)
        seeded = [draft for draft in drafts if draft.form == SEEDED]
        if seeded:
            for draft in seeded:
                levels = (0.0,) * (1 << draft.bits)
                code = SegmentCode(draft.segment, SEEDED, levels, draft.stride)
                self._seeds[draft.segment] = code
            capacity = seeded_capacity(self.layout, self._seeds, arena)
            bits = self._value_bits[arena] = max(draft.bits for draft in seeded)
            self._seeded[arena] = session.stream(bits * capacity // 8)

    def masks(self, arena: int) -> bool:
        """Whether an arena gets TALL masks."""
        return self.target.tall_lambda is not None and is_codable(self.layout.arenas[arena].dtype)

    def dtype(self, arena: int) -> str:
        """Of the target's weights over an arena."""
        return self.target.candidate.plan.dtypes[arena]

    def arena_code(self, arena: int) -> ArenaCode:
        """The streams over an arena."""

        def number(writers: Mapping[int, StreamWriter]) -> int | None:
            return writers[arena].number if arena in writers else None

        plain = self.target.plain
        return ArenaCode(
            arena,
            self.dtype(arena),
            number(self._planes),
            number(self._exact),
            number(self._sparse),
            number(self._seeded),
            bits=self._bits.get(arena, 1 if plain else 0),
            value_bits=self._value_bits.get(arena, 0),
            shared=self.masks(arena) or (self.target.shared and arena in self._planes),
            over_base=not plain,
        )

    def has_residual(self, arena: int) -> bool:
        """Whether an arena has the exact tier."""
        return arena in self._exact

    def encode(
        self,
        arena: int,
        span: int,
        base: Bytes,
        vector: Bytes | None,
        record: VectorRecord | None,
        vector32: Floats | None,
        masks: SpanMasks,
    ) -> None:
        """Encode one span.

        Parameters
        ----------
        base, vector
            Their bytes; `vector` as `masks` takes it, of the dtype that `record` names.
        vector32
            The vector as float32.
        """
        layout, target = self.layout, self.target
        if self.masks(arena) and vector is not None and record and target.tall_lambda is not None:
            place = span * layout.arenas[arena].span
            planes, stats, raw = masks(
                target.candidate,
                arena,
                place,
                base,
                vector,
                record.decoded_dtype,
                target.tall_lambda,
            )
            self._planes[arena].put(span, planes, encoding=BITS)
            self._count(stats)
        else:
            seen = span_moves(target.candidate, arena, span, lambda *_: (base, vector32))
            raw, coded = seen.raw, seen
            if target.coded is not None:
                coded = span_moves(target.coded, arena, span, lambda *_: (base, vector32))
                # What is the base's in codes alone is not, and has a residual; and the other way.
                both = zip(seen.same, coded.same, strict=True)
                coded = replace(coded, same=[one and two for one, two in both])
            self._code(arena, span, coded, seen.moves)
        if arena in self._exact:
            dtype, base_dtype = self.dtype(arena), layout.arenas[arena].dtype
            same = dtype == base_dtype
            start = base if same else from_float32(to_float32(base, base_dtype), dtype)
            zigzag = residual(raw, start, dtype)
            encoding = residuals(dtype, start, plain=target.plain)
            self._exact[arena].put(span, zigzag, encoding=encoding)

    def _count(self, found: list[tuple[int, CodeStats]]) -> None:
        with self._lock:
            for segment, stats in found:
                self.stats[segment].add(stats)

    def _code(self, arena: int, span: int, seen: Moves, own: Floats) -> None:
        drafts = self.target.drafts or {}
        values: Bytes | None = None
        if arena in self._seeded:
            bits, size = self._value_bits[arena], self._seeded[arena].chunk_size
            values = np.zeros((bits, size // bits), np.uint8)
        record = self.layout.arenas[arena]
        weights = min(record.span, record.weights - span * record.span)
        dense = self._bits.get(arena, 0) if arena in self._planes else 0
        made = SpanCodes(weights, bits=dense, sparse=arena in self._sparse, values=values)
        seeded = {p.piece.segment: p for p in self._pieces(arena, span)}
        found = []
        for held, same in zip(seen.held, seen.same, strict=True):
            stats = CodeStats(held.stop - held.start, same=same)
            found.append((held.base_segment, stats))
            draft = drafts.get(held.base_segment)
            if draft is None:
                continue
            moves = seen.moves[held.start : held.stop]
            stats.moved = _squares(moves)
            if draft.corrected:
                stats.own_moved = _squares(own[held.start : held.stop])
            stats.finite = bool(np.isfinite(stats.moved))
            if not stats.finite:
                continue
            if draft.form == SEEDED:
                piece = seeded[held.base_segment]
                made.encode_values(
                    draft,
                    piece,
                    moves,
                    stats,
                    own=own[held.start : held.stop],
                    seed=self.target.seed,
                    arena_span=record.span,
                    span=span,
                )
            else:
                step = seen.vector if self.target.shared else None
                some = None if step is None else step[held.start : held.stop]
                made.encode(draft, held.start, moves, some, stats, own=own[held.start : held.stop])
        self._count(found)
        if made.planes is not None:
            self._planes[arena].put(span, made.planes.reshape(-1), encoding=codes(dense))
        if made.sparse is not None:
            packed = made.sparse.reshape(-1)
            # Gaps between weights as close as this are no shorter than the planes.
            dense_signs = _DENSE * count_bits(packed) >= 4 * packed.size
            self._sparse[arena].put(span, packed, encoding=codes(2) if dense_signs else _SIGNS)
        if values is not None:
            encoding = codes(self._value_bits[arena])
            self._seeded[arena].put(span, values.reshape(-1), encoding=encoding)

    def _pieces(self, arena: int, span: int) -> list[SeededPiece]:
        return seeded_pieces(self.layout, self._seeds, arena, span) if self._seeds else []

    def settle(self) -> dict[int, SegmentCode]:
        """The codes of all segments that can have one, once every span went by."""
        found = {}
        for segment, stats in self.stats.items():
            if self.masks(self.layout.places[segment].arena) and stats.finite:
                found[segment] = SegmentCode(segment, PLANES, TALL_LEVELS)
        for segment, draft in (self.target.drafts or {}).items():
            sums = self.stats.get(segment)
            if sums is None or sums.same or not sums.finite:
                continue
            code = settle(draft, sums, self.target.gain)
            if code is not None:
                found[segment] = code
        return found


def _squares(moves: Floats) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.einsum("i,i->", moves, moves, dtype=np.float64, casting="same_kind"))
