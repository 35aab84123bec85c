"""The codec of codes side by side: its layout, its size, and payloads made to harm."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore.bits import pack_bits
from tallstore.codecs import SYMBOLS, ZSTD, Bytes
from tallstore.engine.chunk import ChunkBuffer, Encoding, seal_chunk
from tallstore.errors import CorruptStoreError

COUNTS = pytest.mark.parametrize("count", [2, 3, 4])


def planes_of(codes: npt.NDArray[np.uint8], count: int) -> Bytes:
    bits = [(codes >> np.uint8(k) & np.uint8(1)).view(np.bool_) for k in range(count)]
    return np.concatenate([pack_bits(plane) for plane in bits])


def symbols_of(codes: npt.NDArray[np.uint8], count: int) -> Bytes:
    """Bytes of codes, by the words of FORMAT.md: code c of byte m * g + j goes to symbol 8m + c."""
    group = 8 // count
    by_byte = codes.reshape(-1, group, 8).astype(np.uint8)
    made = np.zeros((by_byte.shape[0], 8), np.uint8)
    for j in range(group):
        made |= by_byte[:, j] << np.uint8(j * count)
    return made.reshape(-1)


def rounded(weights: int, step: float, count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Codes of normal weights rounded to a step: magnitude, then sign."""
    draw = np.random.default_rng(seed).standard_normal(weights)
    size = np.minimum(np.rint(np.abs(draw) / step), (1 << (count - 1)) - 1).astype(np.uint8)
    return size | ((draw < 0) & (size > 0)).astype(np.uint8) << np.uint8(count - 1)


def entropy(codes: npt.NDArray[np.uint8]) -> float:
    share = np.bincount(codes) / codes.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


@COUNTS
@settings(max_examples=40, deadline=None)
@given(words=st.integers(1, 600), seed=st.integers(0, 99), kinds=st.integers(1, 16))
def test_round_trip_and_layout(count: int, words: int, seed: int, kinds: int) -> None:
    weights = words * 8 * (8 // count)
    limit = min(kinds, 1 << count)
    codes = np.random.default_rng(seed).integers(0, limit, weights).astype(np.uint8)
    data = planes_of(codes, count)
    payload = SYMBOLS.encode(data, parameter=count, min_gain=-9.0)
    assert payload is not None
    wanted = symbols_of(codes, count).tobytes()
    assert zstandard.ZstdDecompressor().decompress(payload) == wanted
    out = np.full(data.size, 0xA5, np.uint8)
    SYMBOLS.decode(memoryview(payload), out, parameter=count)
    assert np.array_equal(out, data)


@COUNTS
@pytest.mark.parametrize("step", [1.0, 1.4])
def test_near_the_entropy_of_the_codes(count: int, step: float) -> None:
    """Plane by plane the same codes take a tenth to a fifth more."""
    codes = rounded(1 << 19, step, count)
    data = planes_of(codes, count)
    payload = SYMBOLS.encode(data, parameter=count, min_gain=0.05)
    assert payload is not None
    assert 8 * len(payload) / codes.size < 1.03 * entropy(codes)
    alone = ZSTD.encode(data, parameter=0, min_gain=0.0)
    assert len(payload) < 0.92 * (data.size if alone is None else len(alone))


def test_mostly_nothing_is_short() -> None:
    codes = np.zeros(1 << 18, np.uint8)
    codes[::5000] = 9
    payload = SYMBOLS.encode(planes_of(codes, 4), parameter=4, min_gain=0.05)
    assert payload is not None and len(payload) < 600


def decode(payload: bytes, size: int, count: int) -> None:
    SYMBOLS.decode(memoryview(payload), np.empty(size, np.uint8), parameter=count)


@pytest.mark.parametrize(("count", "size"), [(0, 64), (1, 64), (5, 80), (8, 64), (2, 12), (3, 9)])
def test_no_such_planes(count: int, size: int) -> None:
    with pytest.raises(CorruptStoreError, match="planes of whole symbols"):
        decode(b"", size, count)
    with pytest.raises(ValueError, match="planes of whole symbols"):
        SYMBOLS.encode(np.zeros(size, np.uint8), parameter=count, min_gain=0.05)


def test_what_encode_does_not_write_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_checksum=False)
    high = frame.compress(bytes([0, 0, 64, 0, 0, 0, 0, 0] * 100))
    with pytest.raises(CorruptStoreError, match="bits of more planes than there are"):
        decode(high, 600, 3)
    decode(high, 800, 4)
    for count, size in ((4, 799 - 7), (4, 808), (3, 606)):
        with pytest.raises(CorruptStoreError):
            decode(high, size, count)
    for broken in (b"", high[:-1], high + b"x"):
        with pytest.raises(CorruptStoreError):
            decode(broken, 800, 4)


@pytest.mark.parametrize("alike", [False, True])
def test_the_shorter_of_two_encodings_is_written(alike: bool) -> None:
    """Rows that hardly moved are shorter plane by plane."""
    codes = rounded(1 << 18, 1.4, 4)
    if alike:
        codes = np.repeat(codes[: codes.size // 16], 16) ^ (codes & 8)
    data = planes_of(codes, 4)
    buffer = ChunkBuffer.of(data.size)
    np.copyto(buffer.data, data)
    both = Encoding(SYMBOLS, 4, otherwise=Encoding(ZSTD))
    chunk = bytes(seal_chunk(buffer, store=bytes(16), key=bytes(12), encoding=both))
    sizes = {
        codec.number: len(codec.encode(data, parameter=parameter, min_gain=0.05) or data)
        for codec, parameter in ((SYMBOLS, 4), (ZSTD, 0))
    }
    assert chunk[4] == (ZSTD.number if alike else SYMBOLS.number)
    assert len(chunk) - 48 == sizes[chunk[4]] == min(sizes.values())


def test_nothing_is_encoded_where_neither_gains() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 12).astype(np.uint8)
    assert Encoding(SYMBOLS, 4, otherwise=Encoding(ZSTD)).encode(data) is None
    zeros = np.zeros(1 << 12, np.uint8)
    found = Encoding(otherwise=Encoding(ZSTD)).encode(zeros)
    assert found is not None and found[0] is ZSTD
