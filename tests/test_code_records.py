"""How a task's codes stand in its document: what is written is read, what is not is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallstore import strictjson
from tallstore.codes import (
    MAX_BITS,
    PLANES,
    SEEDED,
    SPARSE,
    ArenaCode,
    SegmentCode,
    SegmentStats,
    code_from_json,
    code_to_json,
    level_rows,
    seeded_capacity,
    seeded_pieces,
    segment_code_from_json,
    stats_from_json,
    stats_to_json,
)
from tallstore.documents import CODE, BaseDocument, Contents, Part, TaskDocument
from tallstore.errors import CorruptStoreError, NewerFormatError, TallstoreError
from tallstore.layout import lay_out
from tallstore.specs import SegmentSpec, TensorSpec

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
streams = st.none() | st.integers(0, 1 << 59)
Refusal = type[TallstoreError]


def as_read(value: Any) -> Any:
    return strictjson.loads(strictjson.dumps(value), what="it", max_bytes=1 << 20)


@st.composite
def segment_codes(draw: st.DrawFn, segment: int | None = None) -> SegmentCode:
    form = draw(st.sampled_from([PLANES, SPARSE, SEEDED]))
    count = 1 if form == SPARSE else 1 << draw(st.integers(1, MAX_BITS))
    levels = tuple(draw(st.lists(floats, min_size=count, max_size=count)))
    stride = draw(st.integers(1, (1 << 31) - 1)) if form == SEEDED else 0
    number = draw(st.integers(0, 9)) if segment is None else segment
    return SegmentCode(number, form, levels, stride)


@st.composite
def arena_codes(draw: st.DrawFn) -> ArenaCode:
    planes, seeded = draw(streams), draw(streams)
    least = (int(planes is not None), int(seeded is not None))
    return ArenaCode(
        draw(st.integers(0, 9)),
        draw(st.sampled_from(["float32", "bfloat16", "int64"])),
        planes,
        draw(streams),
        draw(streams),
        seeded,
        bits=draw(st.integers(least[0], MAX_BITS)),
        value_bits=draw(st.integers(least[1], MAX_BITS)),
        shared=draw(st.booleans()),
        over_base=draw(st.booleans()),
    )


@given(code=segment_codes())
def test_a_segment_code_comes_back(code: SegmentCode) -> None:
    record = as_read([code.segment, code.form, list(code.levels), code.stride])
    found = segment_code_from_json(record, 10, "it")
    assert found == code
    assert [math.copysign(1, a) for a in found.levels] == [math.copysign(1, b) for b in code.levels]


@given(code=arena_codes())
def test_an_arena_code_comes_back(code: ArenaCode) -> None:
    assert code_from_json(as_read(code_to_json(code, plain=False)), plain=False, what="it") == code


@given(code=arena_codes())
def test_an_arena_code_of_version_1_comes_back(code: ArenaCode) -> None:
    plain = ArenaCode(code.arena, code.dtype, code.planes, code.exact)
    assert code_from_json(as_read(code_to_json(code, plain=True)), plain=True, what="it") == plain


@given(
    segment=st.integers(0, 9),
    numbers=st.lists(st.floats(0, 1e9), min_size=3, max_size=3),
    projection=st.none() | floats,
)
def test_statistics_come_back(segment: int, numbers: list[float], projection: float | None) -> None:
    """They stand in a document to six digits."""
    numbers, projection = (
        [_six(n) for n in numbers],
        None if projection is None else _six(projection),
    )
    stats = SegmentStats(segment, *numbers, projection)
    assert stats_from_json(as_read(stats_to_json([stats], plain=False))[0], "it") == stats
    plain = replace(stats, projection=None)
    assert stats_from_json(as_read(stats_to_json([stats], plain=True))[0], "it") == plain


def _six(number: float) -> float:
    return float(f"{number:.6g}")


@pytest.mark.parametrize(
    ("record", "refusal"),
    [
        ([10, PLANES, [0.0, 1.0], 0], CorruptStoreError),
        ([-1, PLANES, [0.0, 1.0], 0], CorruptStoreError),
        ([1.0, PLANES, [0.0, 1.0], 0], CorruptStoreError),
        ([True, PLANES, [0.0, 1.0], 0], CorruptStoreError),
        ([1, None, [0.0, 1.0], 0], CorruptStoreError),
        ([1, 7, [0.0, 1.0], 0], CorruptStoreError),
        ([1, "lattice", [0.0, 1.0], 0], NewerFormatError),
        ([1, PLANES, [], 0], CorruptStoreError),
        ([1, PLANES, [1.0], 0], CorruptStoreError),
        ([1, PLANES, [0.0, 1.0, 2.0], 0], CorruptStoreError),
        ([1, PLANES, [0.0] * 32, 0], CorruptStoreError),
        ([1, PLANES, "01", 0], CorruptStoreError),
        ([1, PLANES, [0.0, None], 0], CorruptStoreError),
        ([1, PLANES, [0.0, True], 0], CorruptStoreError),
        ([1, PLANES, [0.0, math.inf], 0], CorruptStoreError),
        ([1, PLANES, [0.0, 1e39], 0], CorruptStoreError),
        ([1, PLANES, [0.0, 10**400], 0], CorruptStoreError),
        ([1, PLANES, [0.0, 1.0], 2], CorruptStoreError),
        ([1, PLANES, [0.0, 1.0], None], CorruptStoreError),
        ([1, SPARSE, [0.5, -0.5], 0], CorruptStoreError),
        ([1, SPARSE, [0.5], 3], CorruptStoreError),
        ([1, SEEDED, [0.5], 3], CorruptStoreError),
        ([1, SEEDED, [0.5, -0.5], 0], CorruptStoreError),
        ([1, SEEDED, [0.5, -0.5], -3], CorruptStoreError),
        ([1, SEEDED, [0.5, -0.5], 1.5], CorruptStoreError),
        ([1, SEEDED, [0.5, -0.5], 1 << 31], CorruptStoreError),
    ],
)
def test_a_malformed_segment_code_is_refused(record: list[Any], refusal: Refusal) -> None:
    with pytest.raises(refusal, match=r"^it: "):
        segment_code_from_json(record, 10, "it")


_GOOD = [0, "float32", 1, 2, 3, 4, 2, 3, 3]


@pytest.mark.parametrize(
    ("place", "value", "refusal"),
    [
        *((place, bad, CorruptStoreError) for place in (2, 3, 4, 5) for bad in (-1, 1.5, "1")),
        (6, 0, CorruptStoreError),
        (7, 0, CorruptStoreError),
        (6, 5, NewerFormatError),
        (7, 5, NewerFormatError),
        (6, None, CorruptStoreError),
        (7, "2", CorruptStoreError),
        (8, 4, NewerFormatError),
        (8, -1, CorruptStoreError),
        (8, None, CorruptStoreError),
    ],
)  # fmt: skip
def test_a_malformed_arena_code_is_refused(place: int, value: Any, refusal: Refusal) -> None:
    record = list(_GOOD)
    assert code_from_json(record, plain=False, what="it").value_bits == 3
    record[place] = value
    with pytest.raises(refusal, match=r"^it: "):
        code_from_json(record, plain=False, what="it")


@pytest.mark.parametrize(
    "record",
    [
        ["0", 1, 1, 1, 1],
        [0, None, 1, 1, 1],
        [0, 1, "x", 1, 1],
        [0, 1, 1, True, 1],
        [0, 1, 1, 1, []],
    ],
)
def test_malformed_statistics_are_refused(record: list[Any]) -> None:
    with pytest.raises(CorruptStoreError, match=r"^it: "):
        stats_from_json(record, "it")


@pytest.mark.parametrize("bits", range(1, MAX_BITS + 1))
def test_rows_of_levels(bits: int) -> None:
    many = tuple(float(n) for n in range(1, (1 << bits) + 1))
    dense, signs = SegmentCode(0, PLANES, many), SegmentCode(1, SPARSE, (0.5,))
    seeded = SegmentCode(2, SEEDED, many, 7)
    assert dense.planes == dense.bits == bits and signs.planes == 2
    assert (seeded.bits, seeded.planes) == (bits, min(bits + 1, MAX_BITS))
    for planes in range(dense.planes, MAX_BITS + 1):
        row = dense.row(planes)
        assert len(row) == 1 << planes and tuple(row[: len(many)]) == many
    for planes in range(2, MAX_BITS + 1):
        assert [str(n) for n in signs.row(planes)[:3]] == ["-0.0", "0.5", "-0.5"]
    row = seeded.row(seeded.planes)
    assert str(row[0]) == "-0.0" and tuple(row[1 : len(many) + 1]) == many[: len(row) - 1]
    rows, table = level_rows({2: seeded, 0: dense}, MAX_BITS)
    assert rows == {2: 0, 0: 1} and table == [seeded.row(MAX_BITS), dense.row(MAX_BITS)]
    assert level_rows({}, 1) == ({}, [[-0.0, -0.0]])


# -- a whole document ---------------------------------------------------------------------

_COUNTS = (3000, 40)


def contents() -> Contents:
    segments = tuple(SegmentSpec("float32", count) for count in _COUNTS)
    tensors = tuple(
        TensorSpec(name=f"w{n}", segment=n, dtype="float32", shape=(count,), stride=(1,), offset=0)
        for n, count in enumerate(_COUNTS)
    )
    tree = {tensor.name: {"$tensor": n} for n, tensor in enumerate(tensors)}
    return Contents(kind="object", tree=tree, tensors=tensors, segments=segments)


BASE = BaseDocument(contents=contents(), streams=(1,))
MIXED = ArenaCode(0, "float32", 5, None, 6, 7, bits=2, value_bits=3, shared=False)


def document(codes: tuple[ArenaCode, ...], *codings: SegmentCode, seed: int = 0) -> TaskDocument:
    parts = tuple((Part(CODE, n, 0, count),) for n, count in enumerate(_COUNTS))
    found = {code.segment: code for code in codings}
    stats = tuple(SegmentStats(n, 0.5, 1.25, 3.0, 9.0) for n in found)
    return TaskDocument(
        contents=contents(), parts=parts, codes=codes, stats=stats, codings=found, seed=seed
    )


def reread(data: bytes) -> TaskDocument:
    return TaskDocument.from_bytes(data, base=BASE, plain=False, what="it")


@given(
    first=segment_codes(segment=0), second=segment_codes(segment=1), seed=st.integers(0, 2**32 - 1)
)
def test_a_document_comes_back(first: SegmentCode, second: SegmentCode, seed: int) -> None:
    code = ArenaCode(0, "float32", 5, 8, 6, 7, bits=4, value_bits=4, shared=False)
    made = document((code,), first, second, seed=seed)
    assert reread(made.to_bytes()) == made


_LEVELS = (0.5, -0.5)
_ONE = SegmentCode(1, SPARSE, (0.5,))


@pytest.mark.parametrize(
    ("code", "coding"),
    [
        (replace(MIXED, planes=None, bits=0), SegmentCode(0, PLANES, _LEVELS)),
        (MIXED, SegmentCode(0, PLANES, (0.5,) * 8)),
        (replace(MIXED, sparse=None), SegmentCode(0, SPARSE, (0.5,))),
        (replace(MIXED, seeded=None, value_bits=0), SegmentCode(0, SEEDED, _LEVELS, 9)),
        (MIXED, SegmentCode(0, SEEDED, (0.5,) * 16, 9)),
        (replace(MIXED, shared=True), SegmentCode(0, SPARSE, (0.5,))),
        (replace(MIXED, shared=True), SegmentCode(0, SEEDED, _LEVELS, 9)),
        (MIXED, None),
        (replace(MIXED, exact=9), None),
    ],
    ids=["planes", "bits", "sparse", "seeded", "value bits", "signs over the vector",
         "values over the vector", "nothing", "residual of what"],
)  # fmt: skip
def test_a_coding_without_its_stream_is_refused(
    code: ArenaCode, coding: SegmentCode | None
) -> None:
    some = [coding] if coding is not None else []
    data = document((code,), *some, replace(_ONE, form=PLANES, levels=_LEVELS)).to_bytes()
    if code.planes is None or code.sparse is None:
        data = document((code,), *some, SegmentCode(1, SEEDED, _LEVELS, 9)).to_bytes()
    with pytest.raises(CorruptStoreError, match="without the stream that its code takes"):
        reread(data)


def test_what_has_no_coding_may_lean_on_the_base_and_its_residual() -> None:
    made = document((replace(MIXED, exact=9, over_base=True),), _ONE)
    assert reread(made.to_bytes()) == made


def _twice(record: dict[str, Any]) -> None:
    record["codings"].append(record["codings"][0])


def _long(record: dict[str, Any]) -> None:
    record["codings"][0].append(1)


def _longer(record: dict[str, Any]) -> None:
    record["codes"][0].append(1)


def _short(record: dict[str, Any]) -> None:
    record["codings"][0].pop()


def _field(record: dict[str, Any]) -> None:
    record["rotation"] = 1


def _no_seed(record: dict[str, Any]) -> None:
    del record["seed"]


def _large_seed(record: dict[str, Any]) -> None:
    record["seed"] = 1 << 32


def _no_codings(record: dict[str, Any]) -> None:
    record["codings"] = None


def _arena(record: dict[str, Any]) -> None:
    record["codes"][0][0] = 1


def _dtype(record: dict[str, Any]) -> None:
    record["codes"][0][1] = "float128"


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (_twice, CorruptStoreError),
        (_long, NewerFormatError),
        (_longer, NewerFormatError),
        (_short, CorruptStoreError),
        (_field, NewerFormatError),
        (_no_seed, CorruptStoreError),
        (_large_seed, CorruptStoreError),
        (_no_codings, CorruptStoreError),
        (_arena, CorruptStoreError),
        (_dtype, NewerFormatError),
    ],
)
def test_a_malformed_document_is_refused(
    change: Callable[[dict[str, Any]], None], refusal: Refusal
) -> None:
    record = as_read({})
    good = document((MIXED,), SegmentCode(0, SPARSE, (0.5,)), _ONE).to_bytes()
    record = strictjson.loads(good, what="it", max_bytes=1 << 20)
    change(record)
    with pytest.raises(refusal):
        reread(strictjson.dumps(record))


def test_words_of_the_other_version_are_refused() -> None:
    made = document((MIXED,), SegmentCode(0, SPARSE, (0.5,)), _ONE)
    with pytest.raises(NewerFormatError):
        TaskDocument.from_bytes(made.to_bytes(), base=BASE, plain=True, what="it")
    plain = replace(made, codings=None, codes=(ArenaCode(0, "float32", 5, None),))
    assert (
        TaskDocument.from_bytes(plain.to_bytes(), base=BASE, plain=True, what="it").codings is None
    )
    with pytest.raises(TallstoreError):
        reread(plain.to_bytes())


# -- where seeded values stand ------------------------------------------------------------


def test_values_of_each_piece_start_at_a_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tallstore.layout.SPAN", 4096)
    counts = (5000, 1, 3000, 1025)
    layout = lay_out([SegmentSpec("float32", count) for count in counts])
    strides = {0: 2, 1: 100, 3: 1}
    codes = {n: SegmentCode(n, SEEDED, _LEVELS, stride) for n, stride in strides.items()}
    codes[2] = SegmentCode(2, SPARSE, (0.5,))
    seen, fullest = dict.fromkeys(strides, 0), 0
    for span in range(layout.arenas[0].spans):
        end = 0
        for piece in seeded_pieces(layout, codes, 0, span):
            assert piece.first == end and piece.first % 1024 == 0
            stride = strides[piece.piece.segment]
            assert piece.groups == math.ceil(piece.piece.count / stride)
            end += math.ceil(piece.groups / 1024) * 1024
            seen[piece.piece.segment] += piece.piece.count
        fullest = max(fullest, end)
    assert seen == {n: counts[n] for n in strides}
    assert seeded_capacity(layout, codes, 0) == fullest
    assert seeded_capacity(layout, {2: codes[2]}, 0) == 0
