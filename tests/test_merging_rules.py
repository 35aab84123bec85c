"""Merge rules against plain code over whole vectors, however the weights are cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_merging import NAIVE, Shaped, shares

from tallstore import layout as layout_module
from tallstore.errors import OptionError
from tallstore.layout import lay_out
from tallstore.mergestream import feed as feed_module
from tallstore.mergestream.survey import merge_span, spans, survey
from tallstore.merging import (
    RULES,
    Average,
    Breadcrumbs,
    Consensus,
    Dare,
    MergeRule,
    Sce,
    Scope,
    Stretch,
    TaskArithmetic,
    Ties,
    merge_rule,
)
from tallstore.merging import squares as squares_module
from tallstore.specs import SegmentSpec
from tallstore.workers import workers

Floats = npt.NDArray[np.float32]

#: Sizes off every boundary; rows that a span of 1024 weights cuts, one longer than two spans.
_MATRICES: Sequence[tuple[int, ...]] = ((37, 60), (3, 2500), (0, 4), (9, 4, 3))
SHAPES: Sequence[tuple[int, ...]] = ((5,), *_MATRICES, (), (700,), (1100,))


class MemoryFeed:
    """Task vectors in memory, laid out like a model."""

    def __init__(self, vectors: Floats, masks: Any = None) -> None:
        self.layout = lay_out([SegmentSpec("float32", int(np.prod(s, dtype=int))) for s in SHAPES])
        self.shapes = {n: (f"t{n}", shape) for n, shape in enumerate(SHAPES)}
        self.tasks = tuple(f"task {n}" for n in range(len(vectors)))
        self.arenas = [0]
        self.flat = np.zeros((len(vectors), self.layout.arenas[0].weights), np.float32)
        self.flags = np.zeros(self.flat.shape, np.bool_)
        self.places = np.concatenate([np.arange(p.start, p.stop) for p in self.stored()])
        self.flat[:, self.places] = vectors
        if masks is not None:
            self.flags[:, self.places] = masks

    def stored(self) -> list[slice]:
        pairs = zip(self.layout.places, self.layout.segments, strict=True)
        return [slice(place.offset, place.offset + segment.numel) for place, segment in pairs]

    def open(self, arena: int, span: int) -> Any:
        size = self.layout.arenas[arena].span
        feed, low = self, span * size

        class Opened:
            count = min(size, feed.flat.shape[1] - low)
            nbytes = 4 * count

            def vectors(self, start: int, stop: int) -> Floats:
                return feed.flat[:, low + start : low + stop].copy()

            def masks(self, start: int, stop: int) -> Any:
                return feed.flags[:, low + start : low + stop]

        return Opened()

    def held(self, arena: int, start: int, count: int) -> npt.NDArray[np.int64]:
        inside = np.count_nonzero((self.places >= start) & (self.places < start + count))
        return np.full(len(self.tasks), inside, np.int64)


def tensors() -> Shaped:
    """The tensors of a vector without padding."""
    sizes = [int(np.prod(shape, dtype=int)) for shape in SHAPES]
    stops = list(itertools.accumulate(sizes))
    return [
        (slice(stop - size, stop), shape)
        for size, stop, shape in zip(sizes, stops, SHAPES, strict=True)
        if size
    ]


WEIGHTS = sum(int(np.prod(shape, dtype=int)) for shape in SHAPES)


@contextmanager
def cut(span: int, block: int) -> Iterator[None]:
    """Spans and blocks of other sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "SPAN", span)
        for name in ("_SMALLEST", "_LARGEST"):
            patch.setattr(feed_module, name, block)
        yield


def run(rule: MergeRule, feed: MemoryFeed, *, threads: int = 1) -> Floats:
    """A rule through the stream that packing and merging use; without padding."""
    with workers(threads) as pool:
        surveyed = survey(rule, feed, workers=pool, progress=lambda _: None)
    merged = [merge_span(surveyed, feed, a, s, feed.open(a, s)) for a, s in spans(feed)]
    return np.concatenate(merged)[feed.places]


def draw(tasks: int, seed: int, *, integers: bool = False) -> tuple[Floats, Any]:
    """Task vectors and masks; as small integers, full of ties, zeros and sums of zero."""
    random = np.random.default_rng(seed)
    if integers:
        vectors = random.integers(-3, 4, (tasks, WEIGHTS)).astype(np.float32)
    else:
        scale = np.exp2(random.integers(-30, 3, WEIGHTS))
        vectors = (random.standard_normal((tasks, WEIGHTS)) * scale).astype(np.float32)
        vectors[random.random(vectors.shape) < 0.2] = 0
    return vectors, random.random((tasks, WEIGHTS)) < 0.4


#: Options that are not the defaults, by rule.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "average": [{"weights": {"task 0": 0.25, "task 1": 3, "task 2": 0}}],
    "ties": [{"keep": 1.0}, {"keep": 0.01}],
    "ties-mean": [{"keep": 0.5}],
    "consensus-ta": [{"k": k} for k in (0, 1, 3, 4)],
    "consensus-ties": [{"k": 0}, {"k": 1, "keep": 0.7}],
    "breadcrumbs": [{"beta": 0.0, "gamma": 0.0}, {"beta": 0.3, "gamma": 0.4}],
    "breadcrumbs-rows": [{"beta": 0.0, "gamma": 0.2}, {"beta": 0.5, "gamma": 0.1}],
    "sce": [{"select": 1.0}, {"select": 0.5}, {"select": 1e-6}],
    "dare": [{"drop": 0.0}, {"drop": 0.5, "seed": 7}],
    "dare-ties": [{"drop": 0.3, "keep": 0.5}],
}
CASES = [(name, options) for name in RULES for options in ({}, *OTHERS.get(name, []))]


def test_every_rule_has_a_plain_twin() -> None:
    assert NAIVE.keys() == RULES.keys()
    for name in RULES:
        rule = merge_rule(name)
        assert rule.name == name
        assert rule.usual_alpha in (0.3, 1.0)
        assert set(rule.parameters()) >= set(RULES[name].options) - {"weights"}


@pytest.mark.parametrize("integers", [False, True], ids=["floats", "integers"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES])
def test_a_rule_is_its_plain_twin(name: str, options: dict[str, Any], integers: bool) -> None:
    vectors, masks = draw(3, len(name), integers=integers)
    with cut(2048, 512):
        feed = MemoryFeed(vectors, masks)
        merged = run(merge_rule(name, **options), feed, threads=2)
    expected = NAIVE[name](
        vectors, tensors=tensors(), names=feed.tasks, masks=masks, places=feed.places, **options
    )
    assert merged.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(merged, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([name for name, _ in CASES]),
    st.integers(1, 4),
    st.sampled_from([1024, 2048, 5120, 1 << 20]),
    st.sampled_from([8, 64, 1000, 1 << 17]),
    st.integers(1, 4),
    st.integers(0, 10**6),
)
def test_cuts_and_threads_show_nowhere(
    name: str, tasks: int, span: int, block: int, threads: int, seed: int
) -> None:
    vectors, masks = draw(tasks, seed, integers=bool(seed % 2))
    rule = merge_rule(name)
    with cut(1 << 20, 1 << 20):
        whole = run(rule, MemoryFeed(vectors, masks))
    with cut(span, block):
        pieces = run(rule, MemoryFeed(vectors, masks), threads=threads)
    assert whole.tobytes() == pieces.tobytes()


def test_a_statistic_is_of_its_own_tensor() -> None:
    """A tensor's neighbours have no say in what Breadcrumbs, VaRM and SCE make of it."""
    vectors, masks = draw(3, 5)
    place = tensors()[2][0]  # the one with long rows
    for name in ("breadcrumbs", "breadcrumbs-rows", "varm", "sce"):
        others = vectors * np.float32(3)
        others[:, place] = vectors[:, place]
        with cut(1024, 64):
            one = run(merge_rule(name), MemoryFeed(vectors, masks))
            other = run(merge_rule(name), MemoryFeed(others, masks))
        assert one[place].tobytes() == other[place].tobytes()
        assert one.tobytes() != other.tobytes()


# -- Consensus ----------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["ta", "ties"])
def test_consensus_at_its_ends(inner: str) -> None:
    vectors, masks = draw(4, 1)
    plain = run(merge_rule(inner), MemoryFeed(vectors))
    name = f"consensus-{inner}"
    assert run(merge_rule(name, k=0), MemoryFeed(vectors, masks)).tobytes() == plain.tobytes()
    assert not run(merge_rule(name, k=5), MemoryFeed(vectors, masks)).any()
    shown = [
        np.count_nonzero(run(merge_rule(name, k=k), MemoryFeed(vectors, masks))) for k in range(6)
    ]
    assert shown == sorted(shown, reverse=True) and len(set(shown)) == 6


def test_consensus_needs_masks() -> None:
    with pytest.raises(OptionError, match="takes stored TALL masks"):
        Consensus(inner=TaskArithmetic()).merge(
            Stretch(tasks=("a",), vectors=np.ones((1, 8), np.float32))
        )


# -- TIES ---------------------------------------------------------------------------------


def test_the_sign_of_a_sum_of_zero_is_an_option() -> None:
    vectors = np.zeros((2, WEIGHTS), np.float32)
    vectors[0, :4], vectors[1, :4] = 2, -2  # cancel
    vectors[:, 10:20] = -1  # the majority elects minus
    found = {
        sign: run(Ties(keep=1, zero_sign=sign), MemoryFeed(vectors))[0]
        for sign in ("majority", "positive")
    }
    assert found == {"majority": -2, "positive": 2}
    assert Ties().parameters() == {"keep": 0.2}, "the manifest's, as it always was"
    assert Ties(zero_sign="positive").parameters() == {"keep": 0.2, "zero_sign": "positive"}
    assert (Ties().surveys, Ties(zero_sign="positive").surveys) == (3, 2)


# -- sums of squares ----------------------------------------------------------------------


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(FINITE, min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_shares_of_squares_are_rounded_once(rows: list[list[float]]) -> None:
    vectors = np.array(rows, np.float32)
    sums = squares_module.square_sums(vectors[:, :2].copy())
    sums = sums + squares_module.square_sums(vectors[:, 2:].copy())
    assert list(squares_module.shares(sums)) == shares(vectors)


# -- DARE ---------------------------------------------------------------------------------


def test_dare_drops_its_share_and_keeps_the_mean() -> None:
    count = 1 << 18
    stretch = Stretch(tasks=("a", "b"), vectors=np.ones((2, count), np.float32))
    for drop in (0.1, 0.5, 0.9):
        rule = Dare(inner=TaskArithmetic(), drop=drop)
        merged = rule.merge(stretch)
        assert abs(merged.mean() - 2) < 0.05
        one = rule.merge(Stretch(tasks=("a",), vectors=np.ones((1, count), np.float32)))
        assert abs(np.count_nonzero(one) / count - (1 - drop)) < 0.01
        # Runs of equal fate are as long as chance has them: neighbours are independent.
        same = np.count_nonzero((one[1:] != 0) == (one[:-1] != 0)) / (count - 1)
        assert abs(same - (drop**2 + (1 - drop) ** 2)) < 0.01


def test_what_dare_drops_hangs_on_seed_task_and_place_alone() -> None:
    ones = np.ones((1, 4096), np.float32)

    def dropped(task: str, seed: int = 0, arena: int = 0, start: int = 0) -> bytes:
        rule = Dare(inner=TaskArithmetic(), drop=0.5, seed=seed)
        stretch = Stretch(tasks=(task,), vectors=ones, arena=arena, start=start)
        return (rule.merge(stretch) == 0).tobytes()

    assert dropped("a") == dropped("a")
    assert len({dropped("a"), dropped("b"), dropped("a", seed=1), dropped("a", arena=1)}) == 4
    assert dropped("a", start=1024)[: 4096 - 1024] == dropped("a")[1024:]
    both = Dare(inner=TaskArithmetic(), drop=0.5)
    pair = both.merge(Stretch(tasks=("b", "a"), vectors=np.vstack([0 * ones, ones])))
    assert (pair == 0).tobytes() == dropped("a")


# -- options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ties(keep=0), "keep is 0"),
        (lambda: Ties(keep=1.01), r"\(0, 1\]"),
        (lambda: Ties(keep=float("nan")), "keep is nan"),
        (lambda: Ties(combine="max"), "combine='max': 'sum' or 'mean'"),
        (lambda: Ties(zero_sign="minority"), "zero_sign='minority'"),
        (lambda: merge_rule("consensus-ta", k=-1), "k=-1: a whole number"),
        (lambda: merge_rule("consensus-ties", k=2.5), "k=2.5: a whole number"),
        (lambda: merge_rule("consensus-ties", k=True), "k=True"),
        (lambda: Breadcrumbs(beta=-0.1), "beta=-0.1"),
        (lambda: Breadcrumbs(beta=0.9, gamma=0.1), "together below 1"),
        (lambda: Breadcrumbs(beta=0.5, gamma=float("nan")), "gamma=nan"),
        (lambda: Breadcrumbs(gamma=0.993), "gamma=0.993"),
        (lambda: Sce(select=0), "select=0"),
        (lambda: Sce(select=2), "select=2"),
        (lambda: merge_rule("dare", drop=1.0), "drop=1.0"),
        (lambda: merge_rule("dare", drop=-0.5), "drop=-0.5"),
        (lambda: merge_rule("dare", seed=-1), "seed=-1"),
        (lambda: merge_rule("dare", seed=1 << 63), "below 2"),
        (lambda: merge_rule("dare", seed=0.5), "seed=0.5: a whole number"),
        (lambda: Average(weights={"a": float("inf")}), "weight inf for 'a'"),
        (lambda: Average(weights={"a": -1}), "weight -1 for 'a'"),
        (lambda: Average(weights={"a": 0, "b": 0.0}), "all 0"),
        (lambda: merge_rule("mean"), "no merge rule is called 'mean'; there are ta, average"),
        (lambda: merge_rule("ta", k=2), "takes no k; it takes nothing, and k goes with consensus"),
        (lambda: merge_rule("ties", beta=0.5), "'ties' takes no beta; it takes keep"),
        (lambda: merge_rule(Ties(), keep=0.5), "keep: goes with a rule's name"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_weights_are_those_of_the_tasks() -> None:
    rule = Average(weights={"a": 1, "x": 2})
    with pytest.raises(OptionError, match="no weight for 'b'; no task 'x'; give one for each"):
        rule.check(["a", "b"])
    rule.check(["x", "a"])
    with pytest.raises(TypeError):
        rule.weights["a"] = 2  # type: ignore[index]
    Dare(inner=rule).check(["a", "x"])
    with pytest.raises(OptionError, match="no weight for 'b'"):
        Consensus(inner=rule).check(["a", "b", "x"])


def test_rules_are_immutable() -> None:
    for name in RULES:
        rule: Any = merge_rule(name)
        with pytest.raises(FrozenInstanceError):
            setattr(rule, fields(rule)[0].name, 2.0)
        assert rule == merge_rule(name)


def test_a_rule_of_ones_own_goes_through() -> None:
    """Nothing but the protocol is asked of a rule."""

    class Largest(TaskArithmetic):
        scope = Scope.TENSOR

        def merge(self, stretch: Stretch) -> Floats:
            assert stretch.tensor and stretch.first + stretch.vectors.shape[1] <= np.prod(
                stretch.shape
            )
            return np.max(stretch.vectors, axis=0)

    vectors, _ = draw(3, 9)
    with cut(1024, 64):
        merged = run(replace(Largest(), name="largest"), MemoryFeed(vectors))
    np.testing.assert_array_equal(merged, vectors.max(axis=0))
