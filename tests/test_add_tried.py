"""Newcomers whose codes are tried with the caller's functions: as if they had been packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coded_zoo import coded_zoo
from torch import Tensor, nn
from zoo import bits

import tallstore
from tallstore.errors import OptionError

State = dict[str, Tensor]
CODES: list[dict[str, Any]] = [
    {"code": "auto", "bits_per_weight": 1.5},
    {"code": "signs", "density": 0.2},
    {"code": "seeded", "density": 0.2, "bits": 2},
    {"code": "levels", "bits": 1},
]
every = pytest.mark.parametrize("options", CODES, ids=lambda given: given["code"])
INPUTS = torch.rand(24, 16, generator=torch.Generator().manual_seed(3))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 16))


BASE: State = {name: tensor.clone() for name, tensor in net().state_dict().items()}
TASKS = {
    task: {
        name: t + 0.05 * torch.randn(t.shape, generator=torch.Generator().manual_seed(n))
        for name, t in BASE.items()
    }
    for n, task in enumerate("xy")
}


def calibrate(task: str) -> tuple[nn.Module, list[Tensor]]:
    return net(), list(INPUTS.split(8))


def tried(path: Path, task: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    with tallstore.open(path) as store:
        assert store.verify().ok
        found = {name: bits(tensor) for name, tensor in store.load(task).items()}
        return found, dict(store.tasks[task].parameters or {})


@every
@pytest.mark.parametrize("steps", [None, 8])
@pytest.mark.parametrize("like", [True, False])
def test_as_if_packed(
    tmp_path: Path, options: dict[str, Any], steps: int | None, like: bool
) -> None:
    module: dict[str, Any] = {"calibrate": calibrate, "distil": steps}
    both, one = tmp_path / "both.tall", tmp_path / "one.tall"
    tallstore.pack(both, BASE, TASKS, **options, **module)
    tallstore.pack(one, BASE, {"x": TASKS["x"]}, **options, **module)
    before = tried(one, "x")
    tallstore.add(one, {"y": TASKS["y"]}, **({} if like else options), **module)
    assert tried(one, "y") == tried(both, "y")
    assert tried(one, "x") == before
    assert tried(one, "y")[1]["corrected"] >= 1
    assert {p.name for p in tmp_path.iterdir()} <= {
        "both.tall", "one.tall", "both.tall-lock", "one.tall-lock",
    }  # fmt: skip


def test_beside_a_base_that_is_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    home, path = tmp_path / "home.tall", tmp_path / "sub" / "zoo.tall"
    tallstore.pack(home, BASE, TASKS, code="signs", calibrate=calibrate)
    tallstore.pack(path, None, {"x": TASKS["x"]}, code="signs", external_base=home)
    tallstore.add(path, {"y": TASKS["y"]}, calibrate=calibrate, exact=True)
    with tallstore.open(path) as store:
        found = store.load("y", fidelity="codes")
        assert all(bits(store.load("y")[name]) == bits(t) for name, t in TASKS["y"].items())
    wanted = tallstore.load(home, task="y")
    assert all(bits(found[name]) == bits(wanted[name]) for name in wanted)


def test_a_share_of_the_score(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, BASE, {"x": TASKS["x"]})
    asked = []

    def evaluate(task: str, state: State) -> float:
        asked.append(task)
        return 1.0 if len(asked) in (1, 4) else 0.5

    tallstore.add(path, {"y": TASKS["y"]}, code="auto", keep=0.9, evaluate=evaluate)
    assert asked == ["y"] * 4
    with tallstore.open(path) as store:
        assert (store.tasks["y"].score, store.tasks["y"].code) == (1.0, "auto")
    tallstore.add(path, {"z": TASKS["y"]}, code="signs", evaluate=lambda *_: 0.25)
    with tallstore.open(path) as store:
        assert store.tasks["z"].score == 0.25


@pytest.mark.parametrize(
    ("packed", "added", "said"),
    [
        ({}, {"calibrate": calibrate}, "y would be kept exactly.*give another code="),
        ({}, {"calibrate": calibrate, "code": "exact"}, "y would be kept exactly"),
        ({}, {"evaluate": lambda *_: 1.0}, "y would be kept exactly"),
        ({"code": "signs"}, {"distil": 8}, "distil=8: it goes with a code"),
        ({"code": "signs"}, {"code": "signs", "distil": 8}, "distil=8: it takes calibrate"),
        ({"code": "signs"}, {"code": "auto", "keep": 0.9}, "keep=0.9: it takes evaluate"),
        ({"code": "levels", "over": "shared"}, {"evaluate": lambda *_: 1.0}, "over a vector that"),
        ({"code": "levels", "over": "shared"}, {"calibrate": calibrate}, "over a shared vector"),
        ({"code": "auto", "max_error": 0.9}, {"calibrate": calibrate}, "biases err on purpose"),
        ({"code": "signs"}, {"calibrate": lambda _: None}, r"calibrate\('y'\): it gave NoneType"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, packed: dict[str, Any], added: dict[str, Any], said: str
) -> None:
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, BASE, {"x": TASKS["x"]}, **packed)
    before = path.read_bytes()
    with pytest.raises(OptionError, match=said):
        tallstore.add(path, {"y": TASKS["y"]}, **added)
    assert path.read_bytes() == before


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, BASE, {"x": TASKS["x"]}, code="signs")
    before, calls = path.read_bytes(), []

    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            if len(calls) == 5:
                raise failure
            return super().forward(x)

    module = nn.Sequential(Failing(16, 96), nn.ReLU(), nn.Linear(96, 16))
    wanted = OptionError if isinstance(failure, RuntimeError) else type(failure)
    with pytest.raises(wanted):
        tallstore.add(path, {"y": TASKS["y"]}, calibrate=lambda _: (module, list(INPUTS.split(8))))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    tallstore.add(path, {"y": TASKS["y"]}, calibrate=calibrate)


def test_masks_are_made_anew_with_scores(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": tasks["x"]}, exact=True)
    tallstore.add(path, {"y": tasks["y"]}, code="tall", evaluate=lambda *_: 0.5)
    with tallstore.open(path) as store:
        assert [task.score for task in store.tasks.values()] == [0.5, 0.5]


def test_like_tasks_that_keep_a_share(tmp_path: Path) -> None:
    def evaluate(task: str, state: State) -> float:
        return 1.0 - float((state["0.weight"] - TASKS[task]["0.weight"]).norm())

    both, one = tmp_path / "both.tall", tmp_path / "one.tall"
    options: dict[str, Any] = {"code": "auto", "keep": 0.5, "evaluate": evaluate}
    tallstore.pack(both, BASE, TASKS, **options)
    tallstore.pack(one, BASE, {"x": TASKS["x"]}, **options)
    assert tallstore.add(one, {"y": TASKS["y"]}, evaluate=evaluate) == []
    assert tried(one, "y") == tried(both, "y")
    remarks = tallstore.add(one, {"z": TASKS["y"]})
    assert any("keep=0.5); what is added without keep= and evaluate= may" in r for r in remarks)


def test_a_budget_that_small_tensors_exceed(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    base = {f"{n}.w": torch.ones(5) for n in range(60)}
    task = {name: tensor + 0.1 for name, tensor in base.items()}
    packed = tallstore.pack(path, base, {"x": task}, code="auto", bits_per_weight=1.0)
    (added,) = tallstore.add(path, {"y": task})
    assert [added.replace("y", "x", 1)] == packed
