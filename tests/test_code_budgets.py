"""``code="auto"``: budgets in bits, in error and in score; and where one cannot be met."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded_zoo import coded_zoo
from zoo import State, bits

import tallstore
from tallstore.errors import OptionError


def large_zoo() -> tuple[State, State]:
    """Matrices that moved by different lengths, and a few small tensors."""
    draw = torch.Generator().manual_seed(3)
    base = {f"w{n}": torch.randn(200, 300, generator=draw) for n in range(4)}
    base |= {f"norm{n}": torch.ones(64) for n in range(3)}
    steps = {"w0": 0.001, "w1": 0.004, "w2": 0.004, "w3": 0.02}
    task = {
        name: tensor + steps.get(name, 0.01) * torch.randn(tensor.shape, generator=draw)
        for name, tensor in base.items()
    }
    return base, task


@pytest.fixture(scope="module")
def large() -> tuple[State, State]:
    return large_zoo()


@pytest.mark.parametrize("budget", [0.03, 0.06, 0.15, 0.35, 1.0, 2.5, 4.0])
def test_bits_are_met(tmp_path: Path, large: tuple[State, State], budget: float) -> None:
    base, task = large
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": task}, code="auto", bits_per_weight=budget)
    weights = sum(tensor.numel() for tensor in task.values())
    with tallstore.open(path) as store:
        document = store._snapshot.stream(store.tasks["x"].document).stored
        found = 8 * (store.stored_bytes("x") - document) / weights
        # Values are padded to whole blocks of 1024 in each span, and a chunk has a header; small
        # tensors share a table of symbols, whatever their codes are.
        assert found <= 1.05 * budget + 0.02
        assert found >= 0.75 * budget
        assert store.tasks["x"].parameters is not None
        assert store.tasks["x"].parameters["bits_per_weight"] == budget


def test_more_is_spent_where_weights_moved_further(
    tmp_path: Path, large: tuple[State, State]
) -> None:
    base, task = large
    tallstore.pack(tmp_path / "zoo.tall", base, {"x": task}, code="auto")
    with tallstore.open(tmp_path / "zoo.tall") as store:
        stats = store.describe("x").segment_stats()
        record = store.tasks["x"]
    density = {name: found.density for name, found in stats.items()}
    assert density["w3"] > 2 * density["w1"] > 2 * density["w0"]
    assert density["w1"] == pytest.approx(density["w2"], rel=0.05)
    # No tensor is left to a handful of values, however little it moved.
    assert density["w0"] * base["w0"].numel() >= 32
    assert record.parameters == {"gain": "unbiased"}


def test_where_bits_are_plenty_levels_are_fitted(
    tmp_path: Path, large: tuple[State, State]
) -> None:
    base, task = large
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": task}, code="auto", bits_per_weight=4.0)
    away = tallstore.load(path, task="x")["w3"] - task["w3"]
    # Of sixteen multiples of a step those that reach as far are off by 0.114.
    assert 0 < float(away.norm() / (task["w3"] - base["w3"]).norm()) < 0.105


def test_a_tensor_that_moved_next_to_nothing_is_left_as_it_was(tmp_path: Path) -> None:
    base = {"large": torch.randn(300, 300), "quiet": torch.randn(50, 50)}
    task = {
        "large": base["large"] + 0.1 * torch.randn(300, 300),
        "quiet": base["quiet"] + 1e-5 * torch.randn(50, 50),
    }
    tallstore.pack(tmp_path / "zoo.tall", base, {"x": task}, code="auto", bits_per_weight=0.1)
    with tallstore.open(tmp_path / "zoo.tall") as store:
        quiet = store.describe("x").segment_stats()["quiet"]
        found = store.load("x")
    assert quiet.density == 0 and quiet.relative_error == 1 and quiet.gain == 0
    assert torch.equal(found["quiet"], base["quiet"])


@pytest.mark.parametrize("budget", [0.0005, 0.001])
def test_too_few_bits_and_how_many_it_takes(tmp_path: Path, budget: float) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    with pytest.raises(OptionError, match=r"takes [0-9.]+ at least") as caught:
        tallstore.pack(path, base, tasks, code="auto", bits_per_weight=budget)
    assert not path.exists()
    found = re.search(r"takes ([0-9.]+) at least", str(caught.value))
    assert found is not None
    least = float(found[1])
    one = {"x": tasks["x"]}
    tallstore.pack(path, base, one, code="auto", bits_per_weight=least)
    with pytest.raises(OptionError, match="at least"):
        tallstore.pack(path, base, one, code="auto", bits_per_weight=0.95 * least, overwrite=True)
    assert list(tallstore.load(path, task="x")) == list(tasks["x"])


@pytest.mark.parametrize("gain", ["unbiased", "ls"])
@pytest.mark.parametrize("error", [0.15, 0.5, 0.8, 1.2, 50.0])
def test_errors_are_met(
    tmp_path: Path, large: tuple[State, State], error: float, gain: str
) -> None:
    base, task = large
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": task}, code="auto", max_error=error, gain=gain)
    found = tallstore.load(path, task="x")
    moved = math.sqrt(sum(float((task[n] - base[n]).norm()) ** 2 for n in base))
    missed = math.sqrt(sum(float((found[n] - task[n]).norm()) ** 2 for n in base))
    assert missed / moved <= 1.01 * error
    with tallstore.open(path) as store:
        assert store.tasks["x"].relative_error == pytest.approx(missed / moved, rel=1e-3)
    if error < 1:
        assert missed / moved > 0.7 * error, "more is spent than was asked for"


def test_an_error_that_no_code_comes_to(tmp_path: Path, large: tuple[State, State]) -> None:
    base, task = large
    with pytest.raises(OptionError, match=r"max_error=0.001: .*'x' comes to 0\.\d+ .*exact=True"):
        tallstore.pack(tmp_path / "x", base, {"x": task}, code="auto", max_error=0.001)
    assert not (tmp_path / "x").exists()


# -- a score to keep ----------------------------------------------------------------------


class Score:
    """1 minus the relative error, less a constant; counts what it was asked."""

    def __init__(self, base: State, tasks: dict[str, State]) -> None:
        self.base, self.tasks = base, tasks
        self.calls: list[tuple[str, float]] = []
        self.last: dict[str, State] = {}

    def __call__(self, task: str, state: State) -> float:
        moved = given = 0.0
        for name, start in self.base.items():
            step = self.tasks[task][name] - start
            moved += float((step * step).sum())
            given += float((step * (state[name] - start)).sum())
        error = sum(float((state[n] - self.tasks[task][n]).square().sum()) for n in self.base)
        score = given / moved - 0.05 * math.sqrt(error / moved)
        self.calls.append((task, score))
        self.last[task] = {name: tensor.clone() for name, tensor in state.items()}
        return score


def test_the_first_rung_that_scores(tmp_path: Path, large: tuple[State, State]) -> None:
    base, task = large
    score = Score(base, {"x": task})
    path = tmp_path / "zoo.tall"
    notes = tallstore.pack(path, base, {"x": task}, code="auto", keep=0.9, evaluate=score)
    assert notes == []
    (_, whole), *tried = score.calls
    assert whole == 1.0
    reached = [found >= 0.9 for _, found in tried]
    assert reached[-1] and not any(reached[:-1]) and len(tried) > 1
    with tallstore.open(path) as store:
        record = store.tasks["x"]
        assert record.score == tried[-1][1] and not record.exact
        assert record.parameters == {"gain": "unbiased", "keep": 0.9}
        assert store.verify().ok
    # Just what was scored is what loads.
    found = tallstore.load(path, task="x")
    assert {n: bits(t) for n, t in found.items()} == {
        n: bits(t) for n, t in score.last["x"].items()
    }


def test_trials_leave_nothing_in_the_file(tmp_path: Path, large: tuple[State, State]) -> None:
    base, task = large
    score = Score(base, {"x": task, "y": task})
    both = {"x": task, "y": task}
    kept, plain = tmp_path / "kept.tall", tmp_path / "plain.tall"
    tallstore.pack(kept, base, both, code="auto", keep=0.94, evaluate=score)
    assert len(score.calls) > 6
    with tallstore.open(kept) as store:
        used, size = store.file_bytes()
        held = store.stored_bytes("x")
    tallstore.pack(plain, base, both, code="auto", bits_per_weight=1.0)
    assert kept.stat().st_size <= plain.stat().st_size + 2 * held + (64 << 10)
    assert size - used <= 64 << 10


def test_where_no_rung_scores_the_exact_tier_is_kept(
    tmp_path: Path, large: tuple[State, State]
) -> None:
    base, task = large

    def picky(name: str, state: State) -> float:
        return 2.0 if torch.equal(state["w0"], task["w0"]) else 1.0

    path = tmp_path / "zoo.tall"
    (note,) = tallstore.pack(path, base, {"x": task}, code="auto", keep=0.9, evaluate=picky)
    assert "x: 4 bits a weight score 1" in note and "the exact tier is kept" in note
    with tallstore.open(path) as store:
        assert store.tasks["x"].exact and store.tasks["x"].score == 2.0
    assert all(torch.equal(t, task[n]) for n, t in tallstore.load(path, task="x").items())


def test_each_task_is_asked_by_its_name(tmp_path: Path, large: tuple[State, State]) -> None:
    base, task = large
    other = {name: 2 * tensor - base[name] for name, tensor in task.items()}
    score = Score(base, {"x": task, "y": other})
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": task, "y": other}, code="signs", evaluate=score)
    assert [name for name, _ in score.calls] == ["x", "y"]
    with tallstore.open(path) as store:
        assert [t.score for t in store.tasks.values()] == [found for _, found in score.calls]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (math.nan, "gave NaN at"),
        (RuntimeError("no data"), "failed at .*RuntimeError: no data"),
        ("good", "failed at .*ValueError"),
        (None, "failed at .*TypeError"),
    ],
)
@pytest.mark.parametrize("options", [{"code": "signs"}, {"code": "auto", "keep": 0.9}])
def test_an_evaluate_that_fails(
    tmp_path: Path, result: Any, message: str, options: dict[str, Any]
) -> None:
    base, tasks = coded_zoo()

    def evaluate(task: str, state: State) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    with pytest.raises(OptionError, match=message):
        tallstore.pack(tmp_path / "zoo.tall", base, tasks, evaluate=evaluate, **options)
    assert not (tmp_path / "zoo.tall").exists()


@pytest.mark.parametrize("whole", [0.0, -1.0, math.inf])
def test_a_share_of_no_score(tmp_path: Path, whole: float) -> None:
    base, tasks = coded_zoo()
    with pytest.raises(OptionError, match="a share of it needs a score above 0"):
        tallstore.pack(
            tmp_path / "x", base, tasks, code="auto", keep=0.9, evaluate=lambda *_: whole
        )


def test_a_score_that_is_infinite_is_not_recorded(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    tallstore.pack(tmp_path / "x", base, tasks, code="signs", evaluate=lambda *_: math.inf)
    with tallstore.open(tmp_path / "x") as store:
        assert store.tasks["x"].score is None


def test_a_score_to_keep_beside_the_exact_tier(tmp_path: Path) -> None:
    """What was asked to be exact is, however few bits its codes take."""
    base = {"w": torch.randn(512, 64)}
    task = {"w": base["w"] + 0.01 * torch.randn(512, 64)}
    path = tmp_path / "zoo.tall"
    given = {"code": "auto", "keep": 0.5, "evaluate": lambda *_: 1.0}
    tallstore.pack(path, base, {"x": task}, exact=True, **given)
    for _ in range(2):
        with tallstore.open(path) as store:
            assert store.tasks["x"].exact and store.tasks["x"].coded
        assert torch.equal(tallstore.load(path, task="x")["w"], task["w"])
        tallstore.repack(path, **given)  # as it is


def test_a_score_that_is_infinite_for_codes_is_not_recorded(tmp_path: Path) -> None:
    base, task = large_zoo()
    path = tmp_path / "zoo.tall"
    scores = iter((1.0, math.inf))
    tallstore.pack(path, base, {"x": task}, code="auto", keep=0.9, evaluate=lambda *_: next(scores))
    with tallstore.open(path) as store:
        assert store.tasks["x"].score is None


@pytest.mark.parametrize("error", [math.inf, -math.inf, 0.0])
def test_an_error_that_is_no_number(tmp_path: Path, error: float) -> None:
    base, task = large_zoo()
    with pytest.raises(OptionError, match=f"max_error={error}: a number above 0 is needed"):
        tallstore.pack(tmp_path / "z.tall", base, {"x": task}, code="auto", max_error=error)
    assert list(tmp_path.iterdir()) == []


def test_any_error_may_be_allowed(tmp_path: Path) -> None:
    base, task = large_zoo()
    tallstore.pack(tmp_path / "z.tall", base, {"x": task}, code="auto", max_error=1e300)
    assert tallstore.load(tmp_path / "z.tall", task="x").keys() == task.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"code": "auto", "bits_per_weight": 0.5},
        {"code": "seeded", "density": 0.25, "bits": 2, "seed": 3},
        {"tall_lambda": 0.5},
    ],
    ids=lambda given: ",".join(given),
)
def test_numbers_may_be_of_numpy(tmp_path: Path, options: dict[str, Any]) -> None:
    base, task = large_zoo()
    found = []
    for n, kind in enumerate((lambda value: value, lambda value: np.array(value)[()])):
        given = {k: v if k == "code" else kind(v) for k, v in options.items()}
        tallstore.pack(tmp_path / f"{n}.tall", base, {"x": task}, **given)
        found.append(tallstore.load(tmp_path / f"{n}.tall", task="x"))
    tallstore.pack(tmp_path / "f.tall", base, {"x": task}, tall_lambda=np.float32(0.5))
    assert all(bits(found[0][name]) == bits(found[1][name]) for name in task)


@pytest.mark.parametrize("outlier", [0.1, 2.0, 1e4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [{"code": "auto", "bits_per_weight": bits} for bits in (0.06, 0.15, 0.5, 2.0)]
    + [{"code": "seeded", "density": 0.05}],
    ids=lambda given: ",".join(map(str, given.values())),
)
def test_what_carries_a_task_may_be_one_weight(
    tmp_path: Path, outlier: float, seed: int, options: dict[str, Any]
) -> None:
    """Where a hash does not pick it, the others are not made as long as it."""
    draw = torch.Generator().manual_seed(seed)
    base, step = 0.05 * torch.randn(256, 256, generator=draw), 0.001
    moves = step * torch.randn(256, 256, generator=draw)
    moves[3, 4] = outlier
    base = {"w": base, "v": base.clone()}
    task = {"w": base["w"] + moves, "v": base["v"] + step}
    try:
        tallstore.pack(tmp_path / "z.tall", base, {"x": task}, **options, seed=seed)
    except OptionError as exc:
        assert "takes" in str(exc)
        return
    found = tallstore.load(tmp_path / "z.tall", task="x")["w"] - base["w"]
    found[3, 4] = 0.0
    # As noise of one in twenty weights is, at most so many times as long as without it.
    assert float(found.norm()) < 2.5 * (20**0.5) * step * 256


def test_what_a_small_model_takes_beside_its_codes(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    base = {f"{n}.w": torch.randn(3 + n % 5, generator=draw) for n in range(100)}
    task = {name: tensor + 0.05 for name, tensor in base.items()}
    (remark,) = tallstore.pack(
        tmp_path / "z.tall", base, {"x": task}, code="auto", bits_per_weight=1.0
    )
    with tallstore.open(tmp_path / "z.tall") as store:
        whole = 8 * store.stored_bytes("x") / store.tasks["x"].coded
    found = re.fullmatch(
        r"x: codes take (\S+) bits a weight where 1 was asked for, and (\S+) more for the levels "
        r"of its tensors, .*",
        remark,
    )
    assert found is not None
    assert sum(map(float, found.groups())) == pytest.approx(whole, rel=0.02)
    base, task = large_zoo()
    path = tmp_path / "large.tall"
    assert tallstore.pack(path, base, {"x": task}, code="auto", bits_per_weight=2.0) == []
