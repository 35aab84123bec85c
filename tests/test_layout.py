"""The flat order: arenas, blocks and spans cover every element exactly once."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore.dtypes import itemsize
from tallstore.engine.chunk import MAX_CHUNK
from tallstore.layout import BLOCK, SPAN, lay_out
from tallstore.specs import SegmentSpec

dtypes = st.sampled_from(["float32", "bfloat16", "int64", "uint8", "complex128"])
counts = st.one_of(
    st.integers(0, 3 * BLOCK), st.sampled_from([SPAN - 1, SPAN, SPAN + 1, 3 * SPAN + 5, 1 << 33])
)
segments = st.lists(st.builds(SegmentSpec, dtypes, counts), max_size=8)


@settings(deadline=None)
@given(segments)
def test_every_element_lies_in_exactly_one_piece(given_segments: list[SegmentSpec]) -> None:
    layout = lay_out(given_segments)
    assert layout.segments == tuple(given_segments)
    assert len(layout.places) == len(given_segments)
    covered: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for arena, record in enumerate(layout.arenas):
        assert record.weights % BLOCK == 0
        assert record.span % BLOCK == 0 and record.chunk_size <= MAX_CHUNK
        # a few spans of the giants stand for all
        spans = {s for s in range(record.spans) if s < 4 or s >= record.spans - 4}
        for span in sorted(spans):
            end = 0
            for piece in layout.pieces(arena, span):
                assert given_segments[piece.segment].dtype == record.dtype
                assert piece.count > 0 and piece.within >= end
                end = piece.within + piece.count
                place = layout.places[piece.segment]
                assert place.arena == arena
                assert place.offset + piece.start == span * record.span + piece.within
                covered[piece.segment].append((piece.start, piece.count))
            assert end <= record.span
        if len(spans) < record.spans:
            return
    for number, segment in enumerate(given_segments):
        end = 0
        for start, count in sorted(covered[number]):
            assert start == end
            end += count
        assert end == segment.numel


@given(segments)
def test_segments_start_at_blocks_and_never_overlap(given_segments: list[SegmentSpec]) -> None:
    layout = lay_out(given_segments)
    ends: dict[int, int] = defaultdict(int)
    for segment, place in zip(given_segments, layout.places, strict=True):
        assert place.offset % BLOCK == 0
        assert place.offset >= ends[place.arena]
        assert layout.arenas[place.arena].dtype == segment.dtype
        ends[place.arena] = place.offset + segment.numel
    for arena, record in enumerate(layout.arenas):
        assert ends[arena] <= record.weights < ends[arena] + BLOCK
    # arenas in the order in which their dtypes come
    assert [a.dtype for a in layout.arenas] == list(dict.fromkeys(s.dtype for s in given_segments))


def test_no_segments() -> None:
    layout = lay_out([])
    assert layout.arenas == () and layout.places == ()


@pytest.mark.parametrize("dtype", ["float32", "complex128", "int8"])
def test_a_full_chunk_stays_within_the_cap(dtype: str) -> None:
    (arena,) = lay_out([SegmentSpec(dtype, 1 << 40)]).arenas
    assert arena.chunk_size == arena.span * itemsize(dtype) <= MAX_CHUNK
    assert arena.spans == (1 << 40) // arena.span
