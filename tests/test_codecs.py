"""Every codec: round trips, the 5 % rule, and damage that is never anything but an error."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore.codecs import CODECS, GUIDED, PLANES, RAW, SPARSE, SYMBOLS, ZSTD, Bytes, Codec, zstd
from tallstore.errors import CorruptStoreError

#: Every codec with every parameter it takes, and the bytes its data must be a multiple of.
VARIANTS: list[tuple[Codec, int, int]] = [
    (RAW, 0, 1),
    (ZSTD, 0, 1),
    *((PLANES, size, size) for size in (1, 2, 4, 8)),
    (SPARSE, 0, 2),
    (GUIDED, 1, 2),
    (GUIDED, 2, 2),
    (GUIDED, 3, 4),
    *((SYMBOLS, count, count * (8 // count)) for count in (2, 3, 4)),
]
variants = pytest.mark.parametrize(
    ("codec", "parameter", "unit"), VARIANTS, ids=lambda v: getattr(v, "number", v)
)


def check_codec(codec: Codec, data: Bytes, *, parameter: int) -> bytes | None:
    """Encode, hold the encoding to its contract, and decode; returns the payload."""
    before = data.copy()
    payload = codec.encode(data, parameter=parameter, min_gain=0.05, side=side_of(data))
    assert np.array_equal(data, before), "encode changed its input"
    if payload is None:
        assert codec is not RAW
        return None
    assert isinstance(payload, bytes)
    if codec is not RAW:
        assert len(payload) <= (1 - 0.05) * data.size
    out = np.full(data.size, 0xA5, np.uint8)
    codec.decode(memoryview(payload), out, parameter=parameter, side=side_of(out))
    assert np.array_equal(out, data)
    assert codec.encode(data, parameter=parameter, min_gain=0.05, side=side_of(data)) == payload, (
        "encode is not deterministic"
    )
    return payload


def side_of(data: Bytes) -> Bytes:
    """What the reader has too: floats about 1."""
    draw = np.random.default_rng(5)
    words = draw.integers(0x3F00, 0x4000, -(-data.size // 2)).astype("<u2")
    return words.view(np.uint8)[: data.size]


def compressible(size: int, seed: int = 0) -> Bytes:
    """`size` bytes whose every plane compresses."""
    draw = np.random.default_rng(seed)
    data = np.zeros(size, np.uint8)
    data[: size // 8] = draw.integers(0, 4, size // 8)
    return data


def test_every_codec_is_covered() -> None:
    assert {codec.number for codec, _, _ in VARIANTS} == set(CODECS)
    assert {number: type(codec).__name__ for number, codec in CODECS.items()} == {
        0: "RawCodec",
        1: "ZstdCodec",
        2: "PlanesCodec",
        3: "SparseCodec",
        4: "GuidedCodec",
        5: "SymbolsCodec",
    }


@variants
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip(codec: Codec, parameter: int, unit: int, data: st.DataObject) -> None:
    words = data.draw(st.integers(0, 65))
    pattern = data.draw(st.binary(min_size=1, max_size=40))
    repeats = data.draw(st.sampled_from([1, 1, 100]))
    raw = (pattern * (words * unit * repeats // len(pattern) + 1))[: words * unit * repeats]
    check_codec(codec, np.frombuffer(raw, np.uint8), parameter=parameter)


@variants
def test_large_data(codec: Codec, parameter: int, unit: int) -> None:
    size = ((1 << 16) + 17) * 8
    payload = check_codec(codec, compressible(size), parameter=parameter)
    assert payload is not None
    if codec is not RAW:
        assert len(payload) < size / 4


@variants
def test_noise_is_left_alone(codec: Codec, parameter: int, unit: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1 << 14) // unit * unit, np.uint8)
    payload = check_codec(codec, noise, parameter=parameter)
    assert (payload is None) == (codec is not RAW)


def test_planes_leave_the_mantissa_alone() -> None:
    weights = np.random.default_rng(2).standard_normal(1 << 15).astype(np.float32) * 0.02
    payload = check_codec(PLANES, weights.view(np.uint8), parameter=4)
    assert payload is not None
    lengths = struct.unpack_from("<4I", payload)
    # Planes of mantissa stay as they are; the one of sign and exponent shrinks.
    assert [bool(length >> 31) for length in lengths] == [True, True, True, False]
    assert [length & 0x7FFFFFFF for length in lengths[:3]] == [weights.size] * 3
    assert lengths[3] < 0.7 * weights.size


def test_planes_payload_is_the_documented_one() -> None:
    words = np.array([0x80000001, 0x00000000, 0x40000002] * 100, "<u4")
    payload = PLANES.encode(words.view(np.uint8), parameter=4, min_gain=0.05)
    assert payload is not None
    lengths = struct.unpack_from("<4I", payload)
    position = 16
    for k, length in enumerate(lengths):
        body = payload[position : position + (length & 0x7FFFFFFF)]
        position += len(body)
        plane = body if length >> 31 else zstandard.ZstdDecompressor().decompress(body)
        assert plane == ((words >> np.uint32(8 * k)) & np.uint32(255)).astype(np.uint8).tobytes()
    assert position == len(payload)


@pytest.mark.parametrize("tail", [b"(", b"\0", b"\x28\xb5\x2f\xfd", b"x" * 40])
@pytest.mark.parametrize("repeated", [False, True])
def test_nothing_follows_a_frame(tail: bytes, repeated: bool) -> None:
    data = np.zeros(1 << 18, np.uint8) if repeated else compressible(1 << 18)
    for frame in (
        zstd.compress(data, min_gain=0.05),
        zstandard.ZstdCompressor(write_checksum=True).compress(data.tobytes()),
    ):
        assert frame is not None
        out = np.empty_like(data)
        zstd.decompress(memoryview(frame), out)
        assert np.array_equal(out, data)
        with pytest.raises(CorruptStoreError):
            zstd.decompress(memoryview(frame + tail), out)


@variants
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_raises_only_corrupt_store_error(
    codec: Codec, parameter: int, unit: int, data: st.DataObject
) -> None:
    size = 512 * unit
    some = compressible(size)
    encoded = codec.encode(some, parameter=parameter, min_gain=0.05, side=side_of(some))
    payload = bytearray(encoded or b"")
    assert payload
    kind = data.draw(st.sampled_from(["flip", "cut", "extend", "replace"]))
    if kind == "flip":
        at = data.draw(st.integers(0, len(payload) * 8 - 1))
        payload[at // 8] ^= 1 << at % 8
    elif kind == "cut":
        del payload[data.draw(st.integers(0, len(payload) - 1)) :]
    elif kind == "extend":
        payload += data.draw(st.binary(min_size=1, max_size=30))
    else:
        payload = bytearray(data.draw(st.binary(max_size=80)))
    out = np.zeros(size, np.uint8)
    # What still decodes is for the chunk's checksum to find.
    try:
        codec.decode(memoryview(bytes(payload)), out, parameter=parameter, side=side_of(out))
    except CorruptStoreError as exc:
        assert str(exc)
    else:
        assert kind in ("flip", "replace"), "a payload of another length was taken"


@variants
def test_another_size_is_refused(codec: Codec, parameter: int, unit: int) -> None:
    data = compressible(512 * unit)
    payload = codec.encode(data, parameter=parameter, min_gain=0.05, side=side_of(data))
    assert payload is not None
    for size in (0, data.size - unit, data.size + unit):
        with pytest.raises(CorruptStoreError):
            out = np.empty(size, np.uint8)
            codec.decode(memoryview(payload), out, parameter=parameter, side=side_of(out))


def test_planes_refuse_words_that_do_not_exist() -> None:
    with pytest.raises(CorruptStoreError, match="words of 3 bytes do not exist"):
        PLANES.decode(memoryview(b"\0" * 40), np.empty(12, np.uint8), parameter=3)
    with pytest.raises(CorruptStoreError, match="no whole number of 4-byte words"):
        PLANES.decode(memoryview(b"\0" * 40), np.empty(10, np.uint8), parameter=4)


def test_a_frame_that_promises_more_than_it_holds_is_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(b"x" * 1000)
    two = frame + zstandard.ZstdCompressor().compress(b"y")
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 1000)
    for payload in (two, unknown, frame[:-1], b""):
        with pytest.raises(CorruptStoreError):
            ZSTD.decode(memoryview(payload), np.empty(1000, np.uint8), parameter=0)
