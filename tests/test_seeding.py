"""Seeded places in numpy, and codes of all forms laid out over a span: against plain models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_codes import positions

from tallstore.codes import (
    PLANES,
    SEEDED,
    SPARSE,
    ArenaCode,
    SegmentCode,
    seeded_capacity,
    seeded_pieces,
)
from tallstore.kernels import seeded_reference
from tallstore.kernels.seeded_reference import SeededTensor
from tallstore.layout import Layout, lay_out
from tallstore.seeding import seeded_tensor, support
from tallstore.spancodes import code_bits, code_planes, pack_values, spread_values
from tallstore.specs import SegmentSpec


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    number=st.integers(0, 2**32 - 1),
    stride=st.integers(1, 400) | st.just(2**31 - 1),
    numel=st.integers(1, 3000),
)
def test_the_same_places_as_the_kernels(seed: int, number: int, stride: int, numel: int) -> None:
    tensor = SeededTensor(seed=seed, number=number, stride=stride, offset=0, numel=numel)
    found = support(tensor)
    assert found.dtype == np.int64
    assert found.tolist() == seeded_reference.support(tensor).tolist()
    assert found.tolist() == positions(seed % 2**32, seed >> 32, number, stride, numel)


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 1023, 1024, 1 << 20])
@pytest.mark.parametrize("numel", [1, 8, 1023, 1024, 1025, 1 << 20])
def test_one_place_in_every_group(stride: int, numel: int) -> None:
    tensor = SeededTensor(seed=5, number=3, stride=stride, offset=0, numel=numel)
    found = support(tensor)
    assert np.array_equal(found // stride, np.arange(tensor.groups))
    assert found.max() < numel
    assert np.array_equal(found, seeded_reference.support(tensor).numpy())


COUNTS = (5000, 1, 777, 3000, 8, 1025)
SPANS = 2048


def mixed() -> dict[int, SegmentCode]:
    return {
        0: SegmentCode(0, SEEDED, (0.5,) * 8, 3),
        1: SegmentCode(1, SEEDED, (0.5,) * 2, 50),
        2: SegmentCode(2, PLANES, (0.5,) * 4),
        3: SegmentCode(3, SPARSE, (0.5,)),
        5: SegmentCode(5, SEEDED, (0.5,) * 16, 1),
    }


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setattr("tallstore.layout.SPAN", SPANS)
    return lay_out([SegmentSpec("float32", count) for count in COUNTS])


def test_values_go_where_they_belong(layout: Layout) -> None:
    codes, draw = mixed(), np.random.default_rng(0)
    capacity = seeded_capacity(layout, codes, 0)
    for span in range(layout.arenas[0].spans):
        pieces = seeded_pieces(layout, codes, 0, span)
        values = np.zeros((4, capacity // 8), np.uint8)
        weights = min(SPANS, layout.arenas[0].weights - span * SPANS)
        wanted = np.zeros(weights, np.int64)
        for piece in pieces:
            width = piece.code.bits
            # Of 4 bits, values 7 and 15 are not used: 17 codes are more than planes have.
            some = [n for n in range(1 << width) if width < 4 or n not in (7, 15)]
            given_ = draw.choice(some, piece.groups).astype(np.uint8)
            pack_values(given_, piece, values)
            segment, stride = piece.piece.segment, piece.code.stride
            at = positions(77, span, segment, stride, piece.piece.count)
            wanted[piece.piece.within + np.array(at)] = given_.astype(np.int64) + 1
        planes = spread_values(values, pieces, weights, seed=77, arena_span=SPANS, span=span)
        found = np.zeros(weights, np.int64)
        for k, plane in enumerate(planes):
            found |= np.unpackbits(plane, bitorder="little").astype(np.int64)[:weights] << k
        assert np.array_equal(found, wanted)


def test_a_span_s_seed_is_the_format_s(layout: Layout) -> None:
    codes = mixed()
    for span in range(layout.arenas[0].spans):
        for piece in seeded_pieces(layout, codes, 0, span):
            tensor = seeded_tensor(piece, seed=9, arena_span=SPANS, span=span)
            assert (tensor.seed & 2**32 - 1, tensor.seed >> 32) == (9, span)
            place = layout.places[piece.piece.segment].offset + piece.piece.start
            assert (tensor.number, tensor.offset) == (piece.piece.segment, place)


class Streams:
    """Stands in for a snapshot: random chunks of three streams."""

    def __init__(self, layout: Layout, codes: dict[int, SegmentCode]) -> None:
        draw = np.random.default_rng(1)
        self.layout, capacity = layout, seeded_capacity(layout, codes, 0)
        self.chunks: dict[tuple[int, int], np.ndarray] = {}  # type: ignore[type-arg]
        for span in range(layout.arenas[0].spans):
            weights = min(SPANS, layout.arenas[0].weights - span * SPANS)
            dense = np.zeros((2, weights), bool)
            sparse = np.zeros((2, weights), bool)
            for piece in layout.pieces(0, span):
                some = slice(piece.within, piece.within + piece.count)
                if piece.segment == 2:
                    dense[:, some] = draw.random((2, piece.count)) < 0.5
                if piece.segment == 3:
                    which = draw.integers(0, 3, piece.count)
                    sparse[:, some] = which == 1, which == 2
            self.chunks[1, span] = np.packbits(dense, axis=1, bitorder="little").ravel()
            self.chunks[2, span] = np.packbits(sparse, axis=1, bitorder="little").ravel()
            values = np.zeros((4, capacity // 8), np.uint8)
            for seeded in seeded_pieces(layout, codes, 0, span):
                most = min(1 << seeded.code.bits, 15)
                pack_values(draw.integers(0, most, seeded.groups).astype(np.uint8), seeded, values)
            self.chunks[3, span] = values.ravel()

    def stream(self, number: int) -> Any:
        return SimpleNamespace(number=number, raw_size=lambda span: self.chunks[number, span].size)

    def read_chunk(self, stream: Any, span: int, out: np.ndarray) -> None:  # type: ignore[type-arg]
        out[:] = self.chunks[stream.number, span]


@pytest.mark.parametrize("there", ["p", "s", "v", "ps", "pv", "sv", "psv"])
def test_forms_mixed_in_one_arena(layout: Layout, there: str) -> None:
    forms = {"p": PLANES, "s": SPARSE, "v": SEEDED}
    codes = {n: c for n, c in mixed().items() if c.form in [forms[letter] for letter in there]}
    source = Streams(layout, codes)
    code = ArenaCode(
        0,
        "float32",
        1 if "p" in there else None,
        None,
        2 if "s" in there else None,
        3 if "v" in there else None,
        bits=2 if "p" in there else 0,
        value_bits=4 if "v" in there else 0,
    )
    task: Any = SimpleNamespace(codings=codes, seed=13)
    for span in range(layout.arenas[0].spans):
        weights = min(SPANS, layout.arenas[0].weights - span * SPANS)
        out, bits = code_planes(
            source,
            layout,
            task,
            code,
            span,
            lambda _, size: np.full(size, 0xAA, np.uint8),  # type: ignore[arg-type]
        )
        assert bits == code_bits(code) and out.size == bits * weights // 8
        found = np.zeros(weights, np.int64)
        planes = np.unpackbits(out.reshape(bits, -1), axis=1, bitorder="little")
        for k, plane in enumerate(planes):
            found |= plane.astype(np.int64) << k
        wanted = np.zeros(weights, np.int64)
        for stream, letter in ((1, "p"), (2, "s")):
            if letter in there:
                raw = np.unpackbits(source.chunks[stream, span], bitorder="little").reshape(2, -1)
                wanted += raw[0].astype(np.int64) + 2 * raw[1].astype(np.int64)
        if "v" in there:
            raw = np.unpackbits(source.chunks[3, span].reshape(4, -1), axis=1, bitorder="little")
            for piece in seeded_pieces(layout, codes, 0, span):
                low, groups = piece.first, piece.groups
                values = sum(
                    raw[k, low : low + groups].astype(np.int64) << k for k in range(piece.code.bits)
                )
                at = positions(13, span, piece.piece.segment, piece.code.stride, piece.piece.count)
                wanted[piece.piece.within + np.array(at)] = values + 1
        assert np.array_equal(found, wanted)
