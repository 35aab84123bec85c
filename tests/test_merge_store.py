"""Merging what a store holds: against plain code over whole vectors, and at its ends to the bit."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same
from merge_helpers import Flat, packed, spans, zoo
from naive_merging import NAIVE
from zoo import State, bits, fine_tune

import tallstore
from tallstore import layout as layout_module
from tallstore import workers as workers_module
from tallstore.mergestream import stored as stored_module
from tallstore.merging import RULES, Consensus, TaskArithmetic, Ties, merge_rule

# -- the plain twin -----------------------------------------------------------------------

__all__ = ["spans"]  # a fixture


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_rule_against_its_plain_twin(tmp_path: Path, dtype: torch.dtype) -> None:
    base, tasks = zoo(dtype)
    stores = {v: packed(tmp_path / f"{v}.tall", base, tasks, merge=v) for v in ("ta", "ties")}
    flat = Flat(base, tasks)
    for rule in RULES:
        vector = "ties" if rule.endswith("ties") else "ta"
        merge = tallstore.merge(stores[vector], rule=rule, alpha=0.7)
        expected = flat.merge(base, rule, list(tasks), 0.7, masks=flat.masks(vector))
        assert_same(merge.state, expected)
        assert (merge.rule, merge.alpha, merge.tasks) == (rule, 0.7, tuple(tasks))
        assert (merge.vectors, merge.layout, merge.notes) == ("exact", None, ())
        assert merge.k == (2 if rule.startswith("consensus") else None)
        differing = [n for n in flat.names if bits(base[n]) != bits(expected[n])]
        assert len(differing) >= (1 if rule == "sce" else 4), "nothing was merged"


@pytest.mark.usefixtures("spans")
def test_the_vector_that_packing_stores_is_the_one_that_merging_takes(tmp_path: Path) -> None:
    """The same objects over checkpoints and over a store give the same bits."""
    base, tasks = zoo()
    for rule in RULES:
        if merge_rule(rule).masks:
            continue
        path = packed(tmp_path / f"{rule}.tall", base, tasks, merge=rule, vector_dtype="float32")
        merge = tallstore.merge(path, rule=rule, alpha=1.0).state
        with tallstore.open(path) as store:
            assert store.vector is not None and store.vector.rule == rule
            raw = []
            for number in store.vector.streams:
                if number:
                    stream = store._held().stream(number)
                    raw.append(np.empty(stream.raw, np.uint8))
                    store._held().read(stream, 0, raw[-1])
        vector = np.concatenate(raw).view(np.float32)[Flat(base, tasks).places]
        flat = Flat(base, tasks)
        found = np.concatenate([merge[n].reshape(-1).numpy() for n in flat.names])
        expected = np.where(vector == 0, flat.base, flat.base + vector)
        np.testing.assert_array_equal(found, expected)


def test_cores_show_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "SPAN", 1024)
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    found = []
    for cores in (1, 4, 16):
        monkeypatch.setattr(workers_module, "cores", lambda cores=cores: cores)
        monkeypatch.setattr(stored_module, "cores", lambda cores=cores: cores)
        rules = ("ties", "consensus-ta", "breadcrumbs", "breadcrumbs-rows", "sce", "dare")
        found.append({rule: tallstore.merge(path, rule=rule).state for rule in rules})
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


# -- at its ends --------------------------------------------------------------------------


def odd_zoo() -> tuple[State, dict[str, State]]:
    """Zeros of both signs, subnormals, and weights so apart that float32 sums round."""
    draw = torch.Generator().manual_seed(5)
    base = {"w": torch.randn(50, 60, generator=draw), "n": torch.arange(4)}
    base["w"][0, :6] = torch.tensor([-0.0, 0.0, -0.0, 0.0, 1e-45, -1e-45])
    tuned = base["w"] * (1 + 1e3 * torch.randn(50, 60, generator=draw))
    tuned[0, :6] = torch.tensor([0.0, -0.0, -0.0, 0.0, -0.0, 1e30])
    other = base["w"] + 0.1 * torch.randn(50, 60, generator=draw)
    return base, {"one": {"w": tuned, "n": base["n"]}, "two": {"w": other, "n": base["n"]}}


@pytest.mark.parametrize("inner", ["ta", "ties"])
def test_consensus_ends_in_its_rule_and_in_the_base(tmp_path: Path, inner: str) -> None:
    base, tasks = odd_zoo()
    path = packed(tmp_path / "z.tall", base, tasks, merge=inner)
    plain = tallstore.merge(path, rule=inner, alpha=0.4).state
    assert_same(tallstore.merge(path, rule=f"consensus-{inner}", k=0, alpha=0.4).state, plain)
    above = tallstore.merge(path, rule=f"consensus-{inner}", k=3, alpha=0.4)
    assert_same(above.state, base)
    assert above.notes == ("k 3 of 2 tasks: the merge is the base",)
    within = tallstore.merge(path, rule=f"consensus-{inner}", k=2, alpha=0.4).state
    assert bits(within["w"]) not in (bits(plain["w"]), bits(base["w"]))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "masks"])
@pytest.mark.parametrize("task", ["one", "two"])
def test_one_task_with_alpha_1_is_that_task(tmp_path: Path, task: str, exact: bool) -> None:
    base, tasks = odd_zoo()
    path = packed(tmp_path / "z.tall", base, tasks, exact=exact)
    expected = tallstore.load(path, task=task)
    if exact:
        assert_same(expected, tasks[task])
        wrong = base["w"] + (tasks["one"]["w"] - base["w"])
        assert bits(wrong) != bits(tasks["one"]["w"]), "float32 sums happen not to round here"
    for rule in ("ta", "average", "varm", Ties(keep=1.0), merge_rule("sce", select=1.0)):
        assert_same(tallstore.merge(path, rule=rule, tasks=[task], alpha=1).state, expected)
    assert_same(
        tallstore.merge(
            path, rule=Consensus(inner=TaskArithmetic(), k=0), tasks=[task], alpha=1
        ).state,
        expected,
    )
    half = tallstore.merge(path, tasks=[task], alpha=0.5).state
    assert bits(half["w"]) != bits(expected["w"])


def test_weights_that_no_task_moved_are_the_bases_bits(tmp_path: Path) -> None:
    base = {"w": torch.linspace(-1, 1, 4000), "nan": torch.linspace(-1, 1, 100)}
    base["nan"][3] = torch.tensor(0x7FA00001, dtype=torch.int32).view(torch.float32)
    base["w"][7] = -0.0
    tasks = {f"t{n}": {k: w.clone() for k, w in base.items()} for n in range(2)}
    tasks["t0"]["w"][100:200] += 1
    path = packed(tmp_path / "z.tall", base, tasks)
    merged = tallstore.merge(path, rule="ta", alpha=0.5).state
    assert_same(merged["nan"], base["nan"])
    assert bits(merged["w"][:100]) == bits(base["w"][:100])
    assert torch.equal(merged["w"][100:200], base["w"][100:200] + 0.5)


def test_sums_that_overflow_stay_finite(tmp_path: Path) -> None:
    for dtype, top in ((torch.float16, 65504.0), (torch.float32, 3.4028234663852886e38)):
        base = {"w": torch.zeros(16, dtype=dtype)}
        tasks = {f"t{n}": {"w": torch.full((16,), 0.9 * top, dtype=dtype)} for n in range(2)}
        path = packed(tmp_path / f"{dtype}.tall", base, tasks)
        merged = tallstore.merge(path, alpha=1).state["w"]
        assert torch.equal(merged, torch.full((16,), top, dtype=dtype))


# -- masks alone --------------------------------------------------------------------------


def test_the_stored_vector_stands_in_for_what_masks_cannot_tell(tmp_path: Path) -> None:
    base, tasks = zoo()
    flat = Flat(base, tasks)
    rounded = torch.from_numpy(NAIVE["ta"](flat.vectors)).bfloat16().float().numpy()
    path = packed(tmp_path / "z.tall", base, tasks, exact=False)
    for rule, alpha, expected in (
        ("ta", 0.4, rounded * np.float32(0.4)),
        ("average", 1.0, rounded / np.float32(3)),
        ("consensus-ta", 0.4, np.where(flat.masks("ta").sum(0) >= 2, rounded, 0) * np.float32(0.4)),
    ):
        merge = tallstore.merge(path, rule=rule, alpha=alpha)
        assert merge.vectors == "shared vector"
        assert "merged from the stored shared vector (ta, bfloat16)" in merge.notes[0]
        found = np.concatenate([merge.state[n].reshape(-1).numpy() for n in flat.names])
        np.testing.assert_array_equal(
            found, np.where(expected == 0, flat.base, flat.base + expected)
        )


def test_otherwise_masks_are_taken_at_their_word(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks, exact=False)
    tallstore.add(path, {"late": fine_tune(base, 9)})
    loaded = {name: tallstore.load(path, task=name) for name in (*tasks, "late")}
    for rule, names, kind in (
        ("ties", ["t0", "t1", "t2"], "masks"),  # the stored vector is of another rule
        ("ta", ["t1", "t0"], "masks"),  # ... of other tasks
        ("ta", ["t0", "late"], "exact and masks"),
        ("average", ["late"], "exact"),
    ):
        merge = tallstore.merge(path, rule=rule, tasks=names, alpha=0.5)
        assert merge.vectors == kind
        lossy = [name for name in names if name != "late"]
        assert [n for n in merge.notes if "masks alone, which are lossy" in n] == [
            f"task vectors of {', '.join(lossy)} come from masks alone, which are lossy; pack with "
            "exact=True (--exact) to merge from the originals"
        ] * bool(lossy)
        chosen = {name: loaded[name] for name in names}
        assert_same(merge.state, Flat(base, chosen).merge(base, rule, names, 0.5))


def test_masks_made_for_another_rules_vector_are_said_to_be(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    (note,) = tallstore.merge(path, rule="consensus-ties", alpha=0.4).notes
    assert note.startswith("the masks were made for a vector of ta; the paper makes them for")


# -- memory -------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models of 4 and of 40 spans take the same memory, a tensor over all of them."""
    monkeypatch.setattr(layout_module, "SPAN", 1 << 16)
    for module in (workers_module, stored_module):
        monkeypatch.setattr(module, "cores", lambda: 1)
    span = 4 << 16
    for rule in ("consensus-ties", "breadcrumbs-rows", "sce"):
        peaks = []
        for count in (4, 40):
            base = {"w": torch.randn(count << 8, 256), "v": torch.randn(100)}
            tasks = {n: {k: w + 0.01 for k, w in base.items()} for n in ("one", "two", "three")}
            path = packed(tmp_path / f"{rule}{count}.tall", base, tasks)
            del base, tasks
            tracemalloc.start()
            tallstore.merge(path, tmp_path / f"{rule}{count}.safetensors", rule=rule, alpha=0.5)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < peaks[0] + span, (rule, peaks)


def test_threads_are_as_many_as_memory_allows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stored_module, "cores", lambda: 64)
    base, tasks = zoo(tasks=2)
    path = packed(tmp_path / "z.tall", base, tasks)
    with tallstore.open(path) as store:
        document = store.describe("t0").task
        assert document is not None
        seen = {}
        for count in (1, 8, 20, 200):
            feed = stored_module.StoreFeed(
                store._held(),
                store.describe().base,
                {f"t{n}": document for n in range(count)},
                vector=store.vector,
            )
            seen[count] = feed.threads
    assert seen == {1: 9, 8: 6, 20: 4, 200: 1}
