"""Where a merged model goes, and how its options are chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same
from merge_helpers import headed, packed, spans, zoo
from safetensors.torch import load_file
from zoo import State, bits

import tallstore
from tallstore.merging import Consensus, TaskArithmetic

# -- where it goes ------------------------------------------------------------------------

__all__ = ["spans"]  # a fixture


@pytest.mark.usefixtures("spans")
def test_as_a_task_and_as_a_file_it_is_the_same(tmp_path: Path) -> None:
    path, _, tasks = headed(tmp_path)
    before = {name: tallstore.load(path, task=name) for name in tasks}
    options: dict[str, Any] = {"rule": "ties", "alpha": 0.4, "private": "t1"}
    state = tallstore.merge(path, **options).state
    made = tallstore.merge(path, tmp_path / "m.safetensors", **options)
    assert made.files == (tmp_path / "m.safetensors",) and made.task is None
    assert made.state is None
    stored = tallstore.merge(path, as_task="merged", **options)
    assert stored.task == "merged" and stored.files == ()
    loaded = tallstore.load(path, task="merged")
    assert loaded.keys() == state.keys() == load_file(tmp_path / "m.safetensors").keys()
    for name, tensor in load_file(tmp_path / "m.safetensors").items():
        assert bits(tensor) == bits(loaded[name]) == bits(state[name]), name
    with tallstore.open(path) as store:
        assert store.verify().ok
        assert store.tasks["merged"].exact and store.tasks["merged"].code == "none"
        assert list(store.tasks) == [*tasks, "merged"]
        store.unpack("merged", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"name": "t1"}
    for name, before_state in before.items():
        assert_same(tallstore.load(path, task=name), before_state)


def test_a_handle_shows_the_task_that_it_merged(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    with tallstore.open(path, "a") as store:
        store.merge(as_task="merged", alpha=0.4)
        assert_same(store.load("merged"), store.merge(alpha=0.4, tasks=list(tasks)).state)
        store.merge(as_task="merged", alpha=0.2, tasks=list(tasks), overwrite=True)
        assert_same(store.load("merged"), store.merge(alpha=0.2, tasks=list(tasks)).state)


def test_shards_and_overwriting(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    made = tallstore.merge(path, tmp_path / "out", alpha=0.4, max_shard_size=5_000)
    assert sum(p.suffix == ".safetensors" for p in made.files) > 1
    place = tmp_path / "m.safetensors"
    place.write_bytes(b"precious")
    with pytest.raises(tallstore.errors.StoreExistsError, match="there already"):
        tallstore.merge(path, place, alpha=0.4)
    assert place.read_bytes() == b"precious"
    tallstore.merge(path, place, alpha=0.4, overwrite=True)
    state = tallstore.merge(path, alpha=0.4).state
    assert all(bits(w) == bits(state[name]) for name, w in load_file(place).items())


# -- choosing -----------------------------------------------------------------------------


def test_evaluate_chooses_alpha_and_k(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    wanted = tallstore.merge(path, rule="consensus-ta", alpha=0.6, k=3).state
    seen: list[State] = []

    def evaluate(state: State) -> float:
        seen.append(state)
        return -float((state["layers.0.weight"] - wanted["layers.0.weight"]).norm())

    merge = tallstore.merge(
        path, tmp_path / "m.safetensors", rule="consensus-ta", evaluate=evaluate
    )
    assert (merge.alpha, merge.k, merge.score) == (0.6, 3, 0.0)
    assert len(seen) == 30
    pairs = [(k, n / 10) for k in (1, 2, 3) for n in range(1, 11)]
    for (k, alpha), state in zip(pairs, seen, strict=True):
        assert_same(state, tallstore.merge(path, rule="consensus-ta", alpha=alpha, k=k).state)
    written = load_file(tmp_path / "m.safetensors")
    assert all(bits(written[n]) == bits(w) for n, w in wanted.items())


def test_the_first_of_equals_is_taken(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    calls: list[Any] = []
    merge = tallstore.merge(path, alpha=(0.5, 0.2, 0.5), evaluate=lambda s: calls.append(s) or 1.0)
    assert (merge.alpha, merge.score, len(calls)) == (0.2, 1.0, 2)
    hopeless = tallstore.merge(path, alpha=(0.2, 0.5), evaluate=lambda _: float("-inf"))
    assert (hopeless.alpha, hopeless.score) == (0.2, float("-inf"))
    fixed = tallstore.merge(path, rule=Consensus(inner=TaskArithmetic(), k=3), evaluate=lambda _: 1)
    assert (fixed.k, fixed.alpha) == (3, 0.1)
    several = tallstore.merge(path, rule="consensus-ta", k=[2, 1], alpha=0.5, evaluate=lambda _: 1)
    assert several.k == 2


def test_what_evaluate_does_wrong_is_named(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    with pytest.raises(
        tallstore.errors.OptionError, match=r"failed at ta, \{\}, alpha 0.1: KeyErr"
    ):
        tallstore.merge(path, evaluate=lambda state: state["absent"])
    with pytest.raises(tallstore.errors.OptionError, match="gave NaN at ta"):
        tallstore.merge(path, evaluate=lambda _: float("nan"))
