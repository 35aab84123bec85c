"""The codec of sparse signs: round trips, its compact form, its size, and payloads made to harm."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore.bits import pack_bits
from tallstore.codecs import SPARSE, Bytes
from tallstore.codecs.sparse import compact_form, touched_of_planes
from tallstore.errors import CorruptStoreError
from tallstore.kernels import sparse_reference

HEAD = struct.Struct("<5I")


def planes_of(at: list[int], minus: list[bool], weights: int) -> Bytes:
    planes = np.zeros((2, weights), np.bool_)
    for place, sign in zip(at, minus, strict=True):
        planes[int(sign), place] = True
    return np.concatenate([pack_bits(plane) for plane in planes])


def draw(weights: int, density: float, seed: int = 0) -> Bytes:
    random = np.random.default_rng(seed).random(weights)
    plus, minus = random < density / 2, (random >= density / 2) & (random < density)
    return np.concatenate([pack_bits(plus), pack_bits(minus)])


def decode(payload: bytes, size: int) -> Bytes:
    out = np.full(size, 0xA5, np.uint8)
    SPARSE.decode(memoryview(payload), out, parameter=0)
    return out


def encode(data: Bytes) -> bytes:
    payload = SPARSE.encode(data, parameter=0, min_gain=0.05)
    assert payload is not None
    assert SPARSE.encode(data, parameter=0, min_gain=0.05) == payload
    return payload


def check(data: Bytes) -> bytes:
    """Round trips through planes and through the compact form."""
    payload = encode(data)
    assert len(payload) <= 0.95 * data.size
    assert np.array_equal(decode(payload, data.size), data)
    weights = 4 * data.size
    touched = SPARSE.touched(memoryview(payload), weights)
    assert touched.positions.dtype == np.int64 and touched.minus.dtype == np.uint8
    known = touched_of_planes(data)
    assert known is not None
    assert np.array_equal(touched.positions, known.positions)
    assert np.array_equal(touched.minus, known.minus)
    return payload


@settings(max_examples=150, deadline=None)
@given(
    groups=st.integers(1, 40),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.booleans()), max_size=60),
    clustered=st.booleans(),
)
def test_round_trip(groups: int, places: list[tuple[float, bool]], clustered: bool) -> None:
    weights = 4096 * groups
    width = 500 if clustered else weights
    signs = {int(place * width): sign for place, sign in places}
    check(planes_of(list(signs), list(signs.values()), weights))


@pytest.mark.parametrize("density", [0, 1e-6, 1e-4, 1e-3, 3e-3, 0.01, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("weights", [1 << 14, (1 << 20) + 8])
def test_round_trip_of_random_planes(density: float, weights: int) -> None:
    check(draw(weights, density))


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 65279, 65280, 65281])
@pytest.mark.parametrize("first", [0, 254, 255, 65280])
def test_gaps_about_the_escape(gap: int, first: int) -> None:
    weights = 1 << 18
    at = list(range(first, weights, gap + 1))[: weights // 100]
    check(planes_of(at, [i % 3 == 0 for i in range(len(at))], weights))
    check(planes_of([*at[:1], weights - 1], [True] * (len(at[:1]) + 1), weights))


@pytest.mark.parametrize(
    ("density", "most"),
    [(0.001, 1.15), (0.005, 1.15), (0.01, 1.08), (0.02, 1.08), (0.05, 1.08), (0.1, 1.08)],
)
def test_near_the_entropy(density: float, most: float) -> None:
    weights = 1 << 20
    data = draw(weights, density)
    touched = touched_of_planes(data)
    assert touched is not None
    p = touched.positions.size / weights
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) + p
    assert len(encode(data)) * 8 <= most * weights * entropy


def test_what_it_leaves_to_others() -> None:
    both = np.zeros(1024, np.uint8)
    both[3] = both[512 + 3] = 4
    dense = draw(1 << 16, 0.5)
    odd, nothing = np.zeros(1001, np.uint8), np.zeros(0, np.uint8)
    for data in (both, dense, odd, nothing, np.zeros(2, np.uint8)):
        assert SPARSE.encode(data, parameter=0, min_gain=0.05) is None


@pytest.mark.parametrize("weights", [4096, 3 * 4096 + 1000, 50_001])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.1])
def test_compact_form_is_the_one_of_the_kernels(weights: int, density: float) -> None:
    bits = np.random.default_rng(3).random((2, weights))
    plus = bits[0] < density
    planes = np.stack([pack_bits(plus), pack_bits((bits[1] < density) & ~plus)])
    data = planes.ravel()
    payload = memoryview(encode(data))
    entries, starts = compact_form(SPARSE.touched(payload, 4 * data.size), weights)
    table = torch.tensor([[-0.0, 1.0, -1.0, -0.0]])
    expected = sparse_reference.compress(torch.from_numpy(planes), weights, table=table)
    assert torch.equal(torch.from_numpy(entries), expected.entries)
    assert torch.equal(torch.from_numpy(starts), expected.starts)


def test_compact_form_leaves_the_padding_out() -> None:
    touched = touched_of_planes(planes_of([1, 4095, 4096, 5000, 8191], [True] * 5, 8192))
    assert touched is not None
    entries, starts = compact_form(touched, 5000)
    assert (entries & 4095).tolist() == [1, 4095, 0] and (entries >> 12).tolist() == [2] * 3
    assert starts.tolist() == [0, 2, 3]


def test_payload_is_the_documented_one() -> None:
    weights = 1 << 14
    at = [0, 300, 301, 16000]
    weights_, count, symbols, low, length = HEAD.unpack_from(
        payload := encode(planes_of(at, [False, True, True, False], weights))
    )
    assert (weights_, count, low) == (weights, 4, 1)
    assert length == 1 << 31 | symbols and symbols == 4
    gaps = [0, 299, 0, 15698]
    body = payload[HEAD.size :]
    assert list(body) == [g >> 8 for g in gaps] + [g & 255 for g in gaps] + [0b0110]


def made(
    symbols: bytes,
    *,
    weights: int = 4096,
    count: int | None = None,
    low: int = 0,
    lows: bytes = b"",
    signs: bytes | None = None,
    frame: bytes | None = None,
    announced: int | None = None,
) -> bytes:
    touched = sum(s != 255 for s in symbols) if count is None else count
    stored = len(symbols) | 1 << 31 if frame is None else len(frame)
    head = HEAD.pack(
        weights, touched, len(symbols) if announced is None else announced, low, stored
    )
    end = bytes((touched + 7) // 8) if signs is None else signs
    return head + (symbols if frame is None else frame) + lows + end


GOOD = bytes([5, 255, 0, 254])


def test_payloads_made_by_hand() -> None:
    touched = SPARSE.touched(memoryview(made(GOOD, signs=b"\5")), 4096)
    assert touched.positions.tolist() == [5, 261, 516] and touched.minus.tolist() == [1, 0, 1]
    frame = zstandard.compress(GOOD)
    assert np.array_equal(decode(made(GOOD, frame=frame), 1024), decode(made(GOOD), 1024))
    wide = made(bytes([1, 0]), low=1, lows=b"\x10\0")
    assert SPARSE.touched(memoryview(wide), 4096).positions.tolist() == [272, 273]


ENDLESS = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))

HARMFUL = {
    "nothing": b"",
    "no lengths": made(GOOD)[:19],
    "other weights": made(GOOD, weights=8192),
    "past the end": made(bytes([255] * 16 + [16])),
    "past the end, wide": made(bytes([16]), low=1, lows=b"\0"),
    "far past the end": made(bytes([254]) * 1000),
    "more symbols than bytes": made(bytes(1025)),
    "symbols of a huge size": made(GOOD, announced=0xFFFFFFFF),
    "fewer touched": made(GOOD, count=2, signs=b"\0"),
    "more touched": made(GOOD, count=4, signs=b"\0"),
    "more touched, wide": made(GOOD, count=4, signs=b"\0", low=1, lows=bytes(4)),
    "touched of a huge size": made(GOOD, count=0xFFFFFFFF, signs=b"\0"),
    "a skip at the end": made(bytes([5, 255])),
    "skips alone": made(b"\xff"),
    "three low bytes": made(GOOD, low=3, lows=bytes(9)),
    "no low bytes": made(GOOD, low=1),
    "no signs": made(GOOD, signs=b""),
    "signs of no weight": made(GOOD, signs=b"\x08"),
    "more after": made(GOOD) + b"\0",
    "another number of symbols": made(GOOD, announced=3),
    "no frame": made(GOOD, frame=b"abcd"),
    "a frame of another size": made(GOOD, frame=zstandard.compress(GOOD + b"\0")),
    "a frame of no stated size": made(GOOD, frame=ENDLESS),
    "two frames": made(GOOD, frame=zstandard.compress(GOOD) * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_payloads_are_refused(name: str) -> None:
    with pytest.raises(CorruptStoreError):
        decode(HARMFUL[name], 1024)
    with pytest.raises(CorruptStoreError):
        SPARSE.touched(memoryview(HARMFUL[name]), 4096)


def test_planes_of_an_odd_size_are_refused() -> None:
    with pytest.raises(CorruptStoreError, match="no two planes"):
        decode(made(GOOD), 1023)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_or_planes_without_a_shared_bit(data: st.DataObject) -> None:
    payload = bytearray(encode(draw(1 << 13, data.draw(st.sampled_from([0.003, 0.05])))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    try:
        out = decode(bytes(payload), 1 << 11)
    except CorruptStoreError as exc:
        assert str(exc)
    else:
        assert touched_of_planes(out) is not None
