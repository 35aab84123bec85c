"""What else coded tasks are used for: merges, statistics, tensors that codes cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coded_zoo import CODES, coded_zoo, name_of
from zoo import State, bits

import tallstore
from tallstore.errors import OptionError

few = pytest.mark.parametrize("options", [CODES[n] for n in (1, 5, 9, 13, 19)], ids=name_of)


def plain_zoo() -> tuple[State, dict[str, State]]:
    """The same without what merges leave aside."""
    base, tasks = coded_zoo()
    keys = ("a", "c", "d", "still", "norm", "other")
    return {k: base[k] for k in keys}, {n: {k: t[k] for k in keys} for n, t in tasks.items()}


@few
@pytest.mark.parametrize("rule", ["ta", "ties"])
def test_a_merge_is_of_the_weights_that_load(
    tmp_path: Path, options: dict[str, Any], rule: str
) -> None:
    base, tasks = plain_zoo()
    coded, loaded = tmp_path / "coded.tall", tmp_path / "loaded.tall"
    budget = {"bits_per_weight": 3} if "bits_per_weight" in options else {}
    tallstore.pack(coded, base, tasks, **options | budget)
    tallstore.save(base, loaded)
    tallstore.add(loaded, {n: tallstore.load(coded, task=n) for n in tasks}, code="exact")
    one, other = (tallstore.merge(path, rule=rule, alpha=0.7) for path in (coded, loaded))
    assert one.state is not None and other.state is not None
    assert {n: bits(t) for n, t in one.state.items()} == {
        n: bits(t) for n, t in other.state.items()
    }
    assert any("lossy" in note for note in one.notes)


@few
def test_statistics_are_of_masks(tmp_path: Path, options: dict[str, Any]) -> None:
    base, tasks = coded_zoo()
    tallstore.pack(tmp_path / "zoo.tall", base, tasks, **options)
    with (
        tallstore.open(tmp_path / "zoo.tall") as store,
        pytest.raises(OptionError, match="mask"),
    ):
        store.statistics()


@few
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_tensors_with_what_is_not_finite_are_kept(
    tmp_path: Path, options: dict[str, Any], bad: float
) -> None:
    base, tasks = coded_zoo()
    x = tasks["x"]
    x["d"][17] = bad  # in the task
    base["c"][5] = bad  # in the base
    x["c"][5] = bad
    x["far"] = torch.full((3000,), -3e38)
    base["far"] = -x["far"]  # finite both, their difference is not
    for exact in (False, True):
        path = tmp_path / "zoo.tall"
        tallstore.pack(path, base, {"x": x}, exact=exact, overwrite=True, **options)
        found = tallstore.load(path, task="x")
        assert all(bits(found[key]) == bits(x[key]) for key in ("d", "c", "far", "head"))
        with tallstore.open(path) as store:
            record = store.tasks["x"]
            assert record.relative_error is not None and record.relative_error < 10
            assert set(store.describe("x").segment_stats()) <= set(base) - {"d", "c", "far"}


def test_tensors_whose_gain_is_undefined_are_kept(tmp_path: Path) -> None:
    """Of a thousand weights one moved, and neither hash nor density picks it."""
    base = {"w": torch.zeros(5000), "rest": torch.randn(4000)}
    task = {"w": base["w"].clone(), "rest": base["rest"] + 0.1}
    task["w"][4999] = 1e-42
    for options in (
        {"code": "seeded", "density": 0.001},
        {"code": "signs", "density": 1e-6},
        {"code": "levels", "bits": 2, "gain": "norm"},
    ):
        path = tmp_path / "zoo.tall"
        tallstore.pack(path, base, {"x": task}, overwrite=True, **options)  # type: ignore[arg-type]
        found = tallstore.load(path, task="x")
        assert torch.allclose(found["w"], task["w"], atol=1e-41, rtol=0)
        assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_other_bits_of_the_same_numbers_are_the_base_s(tmp_path: Path) -> None:
    base = {"w": torch.zeros(3000), "rest": torch.randn(4000)}
    task = {"w": -base["w"], "rest": base["rest"] + 0.1 * torch.randn(4000)}
    for options in CODES[1::3]:
        budget = {"bits_per_weight": 3} if "bits_per_weight" in options else {}
        for exact in (False, True):
            path = tmp_path / "zoo.tall"
            tallstore.pack(path, base, {"x": task}, exact=exact, overwrite=True, **options | budget)
            found = tallstore.load(path, task="x")
            assert torch.equal(found["w"], base["w"])
            assert not exact or bits(found["w"]) == bits(task["w"])
