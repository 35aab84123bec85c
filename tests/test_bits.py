"""Bits are packed LSB-first, and their number is never inferred."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallstore.bits import count_bits, pack_bits, packed_size, unpack_bits


@given(st.lists(st.booleans(), max_size=130))
def test_round_trip_and_order(flags: list[bool]) -> None:
    packed = pack_bits(np.array(flags, bool))
    assert packed.dtype == np.uint8 and packed.size == packed_size(len(flags))
    for i, flag in enumerate(flags):
        assert bool(packed[i // 8] >> i % 8 & 1) is flag, f"weight {i}"
    # the bits past the end are zero
    assert sum(int(byte).bit_count() for byte in packed) == sum(flags) == count_bits(packed)
    back = unpack_bits(packed, len(flags))
    assert back.dtype == np.bool_ and back.tolist() == flags


def test_a_known_byte() -> None:
    assert pack_bits(np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 1], bool)).tolist() == [1, 2]


@pytest.mark.parametrize("count", range(66))
def test_packed_size(count: int) -> None:
    assert packed_size(count) == (count // 8) + bool(count % 8)


@given(st.integers(0, 40), st.integers(0, 400))
def test_unpack_takes_no_more_than_there_is(size: int, count: int) -> None:
    packed = np.full(size, 255, np.uint8)
    if count > 8 * size:
        with pytest.raises(ValueError, match=f"{size} bytes hold {8 * size} bits, not {count}"):
            unpack_bits(packed, count)
    else:
        flags = unpack_bits(packed, count)
        assert flags.shape == (count,) and flags.all()


@given(st.binary(max_size=70), st.integers(0, 7))
def test_count_bits_at_any_alignment(data: bytes, skip: int) -> None:
    whole = np.frombuffer(data, np.uint8)[skip:]
    assert count_bits(whole) == sum(byte.bit_count() for byte in data[skip:])
