"""What a store says of its codes is what they do: density, error, gain, cosine, bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coded_zoo import CODES, coded_zoo, name_of
from zoo import State

import tallstore
from tallstore.codes import SegmentStats

few = pytest.mark.parametrize("options", CODES[1::4], ids=name_of)


def vectors(base: State, task: State, found: State, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Task vector and coded task vector of a tensor, where base and task have it."""
    start, tuned, given = base[name], task[name], found[name]
    if start.dim():
        rows = min(len(start), len(tuned))
        start, tuned, given = start[:rows], tuned[:rows], given[:rows]
    return (tuned.double() - start.double()).flatten(), (given.double() - start.double()).flatten()


def check(stats: SegmentStats, moved: torch.Tensor, given: torch.Tensor) -> None:
    assert stats.moved == pytest.approx(float(moved.norm()), rel=1e-5)
    error = float((given - moved).norm() / moved.norm())
    assert stats.relative_error == pytest.approx(error, rel=1e-3, abs=1e-4)
    assert stats.projection == pytest.approx(float(given @ moved), rel=1e-3)
    assert stats.gain == pytest.approx(float(given @ moved / (moved @ moved)), rel=1e-3)
    if not given.norm():  # left as it was: it has no direction
        assert stats.cosine is None
        return
    cosine = float(given @ moved / (given.norm() * moved.norm()))
    assert stats.cosine == pytest.approx(cosine, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "gain"),
    [
        *((options, "unbiased") for options in CODES[1:]),
        *((options, gain) for options in CODES[1::4] for gain in ("norm", "ls")),
    ],
    ids=str,
)
def test_of_tensors_and_of_the_task(tmp_path: Path, options: dict[str, Any], gain: str) -> None:
    base, tasks = coded_zoo()
    del base["other"]  # bfloat16: rounding moves it as far as the code does
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, gain=gain, **options)
    with tallstore.open(path) as store:
        for name, task in tasks.items():
            found, described = store.load(name), store.describe(name)
            by_name = described.segment_stats()
            assert {"a", "c", "d", "embed"} <= set(by_name)
            every = [vectors(base, task, found, key) for key in by_name]
            for key, (moved, given) in zip(by_name, every, strict=True):
                stats = by_name[key]
                check(stats, moved, given)
                coding = described.code_of(_spec(described, key))
                if coding is not None and not coding.startswith("levels"):
                    touched = float((given != 0).double().mean())
                    assert stats.density == pytest.approx(touched, rel=1e-5)
                if options["code"] == "auto" and stats.density == 0:
                    assert stats.gain == 0 and stats.relative_error == 1  # left as it was
                elif gain == "unbiased" and options["code"] == "seeded" and moved.numel() < 100:
                    # Where the weights that are picked hardly moved, others are not made up for.
                    assert stats.gain is not None and 0 < stats.gain < 1 + 2e-5
                elif gain == "unbiased":
                    assert stats.gain == pytest.approx(1, rel=2e-5)
                elif gain == "norm":
                    assert float(given.norm()) == pytest.approx(stats.moved, rel=1e-3)
                else:
                    assert stats.relative_error <= 1
            moved, given = (torch.cat(column) for column in zip(*every, strict=True))
            assert described.gain is not None and described.cosine is not None
            assert described.gain == pytest.approx(float(given @ moved / (moved @ moved)), rel=1e-3)
            cosine = float(given @ moved / (given.norm() * moved.norm()))
            assert described.cosine == pytest.approx(cosine, rel=1e-3)
            record = store.tasks[name]
            error = float((given - moved).norm() / moved.norm())
            assert record.relative_error == pytest.approx(error, rel=1e-3)
            assert record.density is not None and 0 < record.density <= 1


def _spec(described: Any, name: str) -> Any:
    return next(tensor for tensor in described.contents.tensors if tensor.name == name)


@few
def test_least_squares_err_least(tmp_path: Path, options: dict[str, Any]) -> None:
    base, tasks = coded_zoo()
    errors = {}
    for gain in ("ls", "norm", "unbiased"):
        tallstore.pack(tmp_path / gain, base, tasks, gain=gain, **options)
        with tallstore.open(tmp_path / gain) as store:
            errors[gain] = [task.relative_error for task in store.tasks.values()]
    if options["code"] != "auto":  # a budget in errors buys other bits for other gains
        for other in ("norm", "unbiased"):
            pairs = zip(errors["ls"], errors[other], strict=True)
            assert all(a <= b for a, b in pairs if a is not None and b is not None)


@few
def test_bits_of_tensors_add_up_to_what_is_stored(tmp_path: Path, options: dict[str, Any]) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    for exact in (False, True):
        tallstore.pack(path, base, tasks, exact=exact, overwrite=True, **options)
        with tallstore.open(path) as store:
            for name, task in tasks.items():
                bits = store.tensor_bits(name)
                assert list(bits) == list(task)
                assert bits["still"] == 0 and bits["head"] > 0
                # The document, and each chunk's header, are nobody's.
                whole = sum(bits[key] * tensor.numel() for key, tensor in task.items()) / 8
                assert 0 < whole <= store.stored_bytes(name)
                document = store._snapshot.stream(store.tasks[name].document).stored
                assert whole == pytest.approx(store.stored_bytes(name) - document, rel=1e-6)


def test_what_did_not_move_costs_nothing(tmp_path: Path) -> None:
    base = {"w": torch.randn(5000), "ids": torch.arange(70), "none": torch.zeros(0)}
    tasks = {"same": {k: v.clone() for k, v in base.items()}}
    for options in CODES[::3]:
        path = tmp_path / "zoo.tall"
        tallstore.pack(path, base, tasks, overwrite=True, **options)
        with tallstore.open(path) as store:
            record = store.tasks["same"]
            assert (record.coded, record.own, record.exact) == (0, 0, True)
            assert set(store.tensor_bits("same").values()) == {0.0}
            assert store.stored_bytes("same") < 1500
            assert all(torch.equal(v, base[k]) for k, v in store.load("same").items())
