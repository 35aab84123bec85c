"""Counts over packed masks equal those over unpacked ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore.bits import pack_bits
from tallstore.counting import at_least, exclusive, overlaps, tally, use_histogram
from tallstore.errors import MismatchError, OptionError
from tallstore.scratch import Scratch

Plane = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


def draw_masks(count: int, weights: int, seed: int, density: float) -> tuple[list[Plane], Flags]:
    """(planes, the same unpacked, shape (T, weights))."""
    flags = np.random.default_rng(seed).random((count, weights)) < density
    return [pack_bits(row) for row in flags], flags


def unpack(plane: Plane, weights: int) -> Flags:
    return np.unpackbits(plane, count=weights, bitorder="little").view(np.bool_)


def check(masks: Sequence[Plane], flags: Flags) -> None:
    count, weights = flags.shape
    uses = flags.sum(axis=0)
    wide = flags.astype(np.int64)
    scratch = Scratch()
    for _ in range(2):  # the second time, buffers hold what the first left
        assert np.array_equal(overlaps(masks, scratch=scratch), wide @ wide.T)
        found = use_histogram(masks, weights, scratch=scratch)
        assert found.dtype == np.int64
        assert np.array_equal(found, np.bincount(uses, minlength=count + 1))
        alone = (flags & (uses == 1)).sum(axis=1)
        assert np.array_equal(exclusive(masks, scratch=scratch), alone)
    for k in range(count + 2):
        plane = at_least(masks, k, scratch=scratch)
        assert plane.dtype == np.uint8 and plane.shape == masks[0].shape
        assert np.array_equal(unpack(plane, weights), uses >= k), k


@given(
    st.integers(1, 40),
    st.integers(0, 700),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.02, 0.3, 0.7, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_any_number_of_masks_of_any_length(
    count: int, weights: int, seed: int, density: float
) -> None:
    check(*draw_masks(count, weights, seed, density))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 31, 32])
def test_several_pieces(count: int) -> None:
    check(*draw_masks(count, (1 << 20) + 12_345, count, 0.3))


def test_a_known_case() -> None:
    masks = [np.array([byte], np.uint8) for byte in (0b0111, 0b0011, 0b1001)]
    assert overlaps(masks).tolist() == [[3, 2, 1], [2, 2, 1], [1, 1, 2]]
    assert use_histogram(masks, 4).tolist() == [0, 2, 1, 1]
    assert use_histogram(masks, 6).tolist() == [2, 2, 1, 1]
    assert exclusive(masks).tolist() == [1, 0, 1]
    assert [at_least(masks, k)[0] for k in range(5)] == [0xFF, 0b1111, 0b0011, 0b0001, 0]


def test_bits_past_the_weights_do_not_count() -> None:
    masks = [np.full(5, 0xFF, np.uint8), np.zeros(5, np.uint8)]
    for weights in range(41):
        assert use_histogram(masks, weights).tolist() == [0, weights, 0]
        found = tally(masks, [0], weights)
        assert found.ones[:, 0].tolist() == found.exclusive[:, 0].tolist() == [weights, 0]


def test_masks_at_any_alignment_and_of_any_stride() -> None:
    masks, flags = draw_masks(5, 999, 0, 0.4)
    shifted = [np.concatenate([np.zeros(n, np.uint8), m])[n:] for n, m in enumerate(masks)]
    check(shifted, flags)
    sparse = [np.repeat(mask, 2)[::2] for mask in masks]
    assert not sparse[0].flags.c_contiguous
    check(sparse, flags)


def test_the_masks_are_left_alone() -> None:
    masks, flags = draw_masks(6, 777, 1, 0.5)
    before = [mask.copy() for mask in masks]
    for mask in masks:
        mask.flags.writeable = False
    check(masks, flags)
    assert all(np.array_equal(a, b) for a, b in zip(masks, before, strict=True))


@given(st.data(), st.integers(1, 20), st.integers(1, 3000), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_runs(data: st.DataObject, count: int, weights: int, seed: int) -> None:
    masks, flags = draw_masks(count, weights, seed, 0.3)
    inner = data.draw(st.lists(st.integers(1, max(1, (weights - 1) // 64)), unique=True))
    starts = [0, *(64 * n for n in sorted(inner) if 64 * n < weights)]
    found = tally(masks, starts, weights)
    uses = flags.sum(axis=0)
    for run, (start, stop) in enumerate(zip(starts, [*starts[1:], weights], strict=True)):
        part, use = flags[:, start:stop], uses[start:stop]
        assert np.array_equal(found.ones[:, run], part.sum(axis=1))
        assert np.array_equal(found.exclusive[:, run], (part & (use == 1)).sum(axis=1))
        assert np.array_equal(found.used_by[:, run], np.bincount(use, minlength=count + 1)[1:])


def test_runs_over_several_pieces() -> None:
    masks, flags = draw_masks(3, (1 << 21) + 777, 5, 0.3)
    starts = [0, 64, 1 << 19, (1 << 20) - 64, (1 << 20) + 64, 1 << 21]
    found = tally(masks, starts, flags.shape[1])
    stops = [*starts[1:], flags.shape[1]]
    wanted = [flags[:, a:b].sum(axis=1) for a, b in zip(starts, stops, strict=True)]
    assert np.array_equal(found.ones, np.stack(wanted, axis=1))


def test_at_least_writes_where_it_is_told() -> None:
    masks, flags = draw_masks(4, 500, 2, 0.5)
    wanted = flags.sum(axis=0) >= 2
    out = np.empty(masks[0].size, np.uint8)
    assert at_least(masks, 2, out=out) is out
    assert np.array_equal(unpack(out, 500), wanted)
    assert at_least(masks, 2, out=masks[0]) is masks[0]  # over one of its own inputs
    assert np.array_equal(unpack(masks[0], 500), wanted)
    for wrong in (out[1:], out.astype(np.int8)):
        with pytest.raises(MismatchError, match="uint8 of 63 bytes is needed"):
            at_least(masks, 2, out=wrong)


BYTES = np.zeros(4, np.uint8)


@pytest.mark.parametrize(
    "count", [overlaps, exclusive, lambda m: use_histogram(m, 0), lambda m: at_least(m, 1)]
)
def test_what_no_masks_are(count: Any) -> None:
    with pytest.raises(OptionError, match="no masks to count"):
        count([])
    for wrong in (BYTES[:3], BYTES.astype(np.int8), BYTES.reshape(2, 2)):
        with pytest.raises(MismatchError, match="flat uint8 planes of one size are needed"):
            count([BYTES, wrong])


def test_numbers_that_make_no_sense() -> None:
    for weights in (-1, 33):
        with pytest.raises(OptionError, match=f"weights={weights}: .* hold 0 to 32"):
            use_histogram([BYTES], weights)
    with pytest.raises(OptionError, match="k=-1"):
        at_least([BYTES], -1)
    for starts in ([], [64], [0, 0], [0, 128, 64]):
        with pytest.raises(OptionError, match="ascending"):
            tally([BYTES], starts, 32)
    with pytest.raises(OptionError, match="multiples of 64"):
        tally([BYTES], [0, 32], 32)
