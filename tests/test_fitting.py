"""Gain rules, Lloyd's levels, histograms of how far weights moved: against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tallstore.fitting import GAINS, Magnitudes, fit_magnitudes, gain_factor, signed_levels

vectors = arrays.arrays(np.float64, 12, elements=st.floats(-1e3, 1e3))


@given(coded=vectors, moved=vectors)
def test_gains_do_what_they_are_called(coded: np.ndarray, moved: np.ndarray) -> None:  # type: ignore[type-arg]
    projection, norm, length = coded @ moved, coded @ coded, moved @ moved
    assume(projection > 1e-6 and norm > 1e-6 and length > 1e-6)
    scaled = {}
    for rule in GAINS:
        factor = gain_factor(rule, moved=length, projection=projection, norm=norm)
        assert factor is not None and factor > 0
        scaled[rule] = factor * coded
    assert scaled["unbiased"] @ moved == pytest.approx(length)
    assert np.linalg.norm(scaled["norm"]) == pytest.approx(math.sqrt(length))
    errors = {rule: np.linalg.norm(found - moved) for rule, found in scaled.items()}
    # Of parallel vectors every rule errs by rounding alone.
    assert errors["ls"] <= min(errors.values()) * (1 + 1e-9) + 1e-12 * math.sqrt(length)
    for nudge in (0.999, 1.001):
        assert np.linalg.norm(nudge * scaled["ls"] - moved) >= errors["ls"] * (1 - 1e-9)


@pytest.mark.parametrize("rule", GAINS)
@pytest.mark.parametrize("zero", ["moved", "projection", "norm"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_gains_that_are_undefined(rule: str, zero: str, value: float) -> None:
    sums = {"moved": 1.0, "projection": 1.0, "norm": 1.0, zero: value}
    assert gain_factor(rule, **sums) is None


def test_a_gain_beyond_floats() -> None:
    assert gain_factor("unbiased", moved=1e300, projection=1e-300, norm=1.0) is None


def histogram(moves: np.ndarray, vector: np.ndarray | None = None) -> Magnitudes:  # type: ignore[type-arg]
    found = Magnitudes(moves.size)
    found.add(moves, vector)
    return found


def draw(count: int, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32) * np.float32(1e-3)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_levels_are_where_no_level_nearby_errs_less(count: int) -> None:
    moves = draw(50_000)
    levels = np.array(fit_magnitudes(histogram(moves), count))
    assert levels.size == count and (np.diff(levels) > 0).all()
    assert np.array_equal(levels.astype(np.float32).astype(np.float64), levels)

    def error(some: np.ndarray) -> float:  # type: ignore[type-arg]
        distance = np.abs(np.abs(moves)[:, None] - some[None].astype(np.float64))
        return float(np.square(distance.min(1)).sum())

    least = error(levels)
    for k in range(count):
        for nudge in (0.97, 1.03):
            other = levels.copy()
            other[k] *= nudge
            assert error(other) >= least * (1 - 1e-4)
    # Lloyd and Max for a normal distribution: relative error of 2 to 16 levels.
    known = {1: 0.603, 2: 0.3428, 4: 0.1857, 8: 0.0977}[count]
    assert math.sqrt(least / float(np.square(moves, dtype=np.float64).sum())) < 1.03 * known


def test_levels_over_a_shared_vector() -> None:
    step = np.abs(draw(40_000, 1)) + np.float32(1e-4)
    ratio = np.where(np.random.default_rng(2).random(step.size) < 0.5, 0.5, 2.0)
    found = histogram((ratio * step).astype(np.float32), -step)
    assert fit_magnitudes(found, 2) == pytest.approx((0.5, 2.0), rel=0.01)
    assert found.moved == pytest.approx(float(np.square(ratio * step).sum()), rel=1e-5)
    # What the vector has no step for cannot be coded over it.
    assert histogram(step, np.zeros_like(step)).count.sum() == 0
    assert fit_magnitudes(histogram(step, np.zeros_like(step)), 4) == ()


def test_fewer_levels_where_fewer_magnitudes_occur() -> None:
    moves = np.array([0, 1, -1, 1, 3, -3], np.float32)
    assert fit_magnitudes(histogram(moves), 8) == (0.0, 1.0, 3.0)
    assert fit_magnitudes(histogram(np.zeros(9, np.float32)), 4) == ()


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("share", [1e-4, 1e-2, 0.3])
def test_weights_that_did_not_move_stay_near(count: int, share: float) -> None:
    moves = draw(20_000, 1) * (np.random.default_rng(2).random(20_000) < share)
    moves[7] = 1.0
    levels = np.array(fit_magnitudes(histogram(moves), count))
    assert levels[0] < 0.25 * np.abs(moves).max()
    nearest = np.abs(np.abs(moves)[:, None] - levels).min(1)
    assert np.linalg.norm(nearest) < 0.6 * np.linalg.norm(moves)


def test_signed_levels() -> None:
    assert signed_levels((1.0, 2.0), 2, 0.5) == (0.5, 1.0, -0.5, -1.0)
    assert [str(n) for n in signed_levels((1.0,), 2, 1.0)] == ["1.0", "0.0", "-1.0", "-0.0"]
    assert signed_levels((1.0,), 1, 1e300)[0] == math.inf


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.2, 0.5, 0.9])
def test_cuts_meet_a_density_to_a_few_per_cent(density: float) -> None:
    moves = draw(200_000)
    found = histogram(moves)
    cut = np.float32(found.cut(density))
    touched = np.abs(moves) >= cut
    assert touched.mean() == pytest.approx(density, rel=0.03)
    count, total = found.touched(float(cut))
    assert count == touched.sum()
    assert total == pytest.approx(float(np.abs(moves)[touched].sum(dtype=np.float64)), rel=1e-6)


def test_cuts_leave_what_did_not_move() -> None:
    moves = np.array([0.0, -0.0, 1.0, 0.0, -2.0], np.float32)
    found = histogram(moves)
    assert (np.abs(moves) >= np.float32(found.cut(1.0))).tolist() == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert histogram(np.zeros(5, np.float32)).cut(1.0) > 0


@settings(max_examples=30, deadline=None)
@given(split=st.integers(0, 300), shared=st.booleans())
def test_parts_add_up(split: int, shared: bool) -> None:
    moves, vector = draw(300, 3), draw(300, 4) if shared else None
    whole, parts = histogram(moves, vector), Magnitudes(0)
    for some in (slice(None, split), slice(split, None)):
        parts.merge(histogram(moves[some], None if vector is None else vector[some]))
    assert np.array_equal(parts.count, whole.count)
    for name in ("weight", "product"):
        assert np.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12)
    assert parts.moved == pytest.approx(whole.moved) and parts.finite and parts.same


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_noticed(bad: float) -> None:
    moves = draw(100)
    moves[50] = bad
    assert not histogram(moves).finite
    other = histogram(draw(10))
    other.merge(histogram(moves))
    assert not other.finite
