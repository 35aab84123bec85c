"""Trained values: coded weights give what the original gives, in as many bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from zoo import bits

import tallstore
from tallstore.codes import SEEDED
from tallstore.errors import OptionError
from tallstore.packing.distilling import _Pupil, _scaled
from tallstore.packing.drafts import Draft
from tallstore.seeding import Positions, picked
from tallstore.store import TallStore

State = dict[str, Tensor]
CODES: list[dict[str, Any]] = [
    {"code": "auto", "bits_per_weight": 0.6},
    {"code": "signs", "density": 0.1},
    {"code": "seeded", "density": 0.2, "bits": 2},
    {"code": "levels", "bits": 1},
]


class Net(nn.Module):
    """Two layers behind a table that is tied to what is in front of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 48)
        self.up = nn.Linear(48, 160)
        self.down = nn.Linear(160, 48)
        self.head = nn.Linear(48, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found = self.table(ids)
        logits: Tensor = self.head(found + self.down(self.up(found).relu()))
        return logits


def made(seed: int, start: State | None = None, dtype: torch.dtype = torch.float32) -> State:
    torch.manual_seed(seed)
    if start is None:
        return {name: tensor.clone().to(dtype) for name, tensor in Net().state_dict().items()}
    found = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in start.items()}
    return {**found, "head.weight": found["table.weight"]}


BASE = made(0)
BASE["head.weight"] = BASE["table.weight"]
TASKS = {"one": made(1, BASE), "two": made(2, BASE)}
IDS = torch.randint(40, (24, 12), generator=torch.Generator().manual_seed(3))


def calibrate(task: str) -> tuple[nn.Module, list[Any]]:
    return Net(), list(IDS.split(8))


def far(state: State, task: str) -> float:
    """The KL divergence from what the task gives."""
    net = Net()
    with torch.no_grad():
        net.load_state_dict(TASKS[task])
        wanted = net(IDS).log_softmax(-1)
        net.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        return float(kl_div(net(IDS).log_softmax(-1), wanted, log_target=True, reduction="sum"))


def packed(path: Path, **options: Any) -> Path:
    tallstore.pack(path, BASE, TASKS, calibrate=calibrate, overwrite=True, **options)
    return path


@pytest.mark.parametrize("options", CODES, ids=lambda given: given["code"])
def test_it_is_nearer_in_as_many_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = packed(tmp_path / "plain.tall", **options)
    trained = packed(tmp_path / "trained.tall", **options, distil=60)
    for task in TASKS:
        before, after = (far(tallstore.load(path, task=task), task) for path in (plain, trained))
        assert after < 0.6 * before
        with TallStore(plain) as one, TallStore(trained) as other:
            assert other.stored_bytes(task) < 1.05 * one.stored_bytes(task)
            assert (other.tasks[task].parameters or {})["distil"] == 60


def test_what_is_told_is_told_of_the_original(tmp_path: Path) -> None:
    for options in CODES:
        path = packed(tmp_path / "zoo.tall", **options, distil=20)
        loaded = tallstore.load(path, task="one")
        with TallStore(path) as store:
            told = store.segment_stats("one")
        for name in ("up.weight", "up.bias", "down.weight"):
            own, coded = (state[name] - BASE[name] for state in (TASKS["one"], loaded))
            wanted = float((own - coded).norm() / own.norm())
            assert told[name].relative_error == pytest.approx(wanted, rel=1e-3)
            if float(coded.norm()):
                cosine = float((own * coded).sum() / own.norm() / coded.norm())
                assert told[name].cosine == pytest.approx(cosine, abs=1e-3)


def test_weights_in_bfloat16_and_an_exact_tier(tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in BASE.items()}
    task = {name: tensor.bfloat16() for name, tensor in TASKS["one"].items()}
    path, found = tmp_path / "zoo.tall", []
    for steps in (None, 60):
        tallstore.pack(
            path, base, {"one": task}, code="seeded", density=0.2, exact=True,
            calibrate=calibrate, distil=steps, overwrite=True,
        )  # fmt: skip
        assert all(bits(t) == bits(task[n]) for n, t in tallstore.load(path, task="one").items())
        found.append(far(tallstore.load(path, task="one", fidelity="codes"), "one"))
    assert found[1] < 0.6 * found[0]


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    net = Net().train()
    before = {name: bits(tensor) for name, tensor in net.state_dict().items()}
    with torch.inference_mode():
        tallstore.pack(
            tmp_path / "zoo.tall", BASE, TASKS, code="signs",
            calibrate=lambda _: (net, list(IDS.clone().split(8))), distil=3,
        )  # fmt: skip
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())
    assert {name: bits(tensor) for name, tensor in net.state_dict().items()} == before


def test_what_does_worse_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tallstore.packing.distilling._RATES", (100.0,))
    found = []
    for steps in (None, 5):
        path = packed(tmp_path / f"{steps}.tall", code="signs", distil=steps)
        found.append(tallstore.load(path, task="one"))
        with tallstore.open(path) as store:
            assert "distil" not in (store.tasks["one"].parameters or {})
    assert all(bits(found[0][name]) == bits(found[1][name]) for name in BASE)


def test_newcomers_are_coded_alike_without(tmp_path: Path) -> None:
    path = packed(tmp_path / "zoo.tall", code="seeded", density=0.2, distil=5)
    tallstore.add(path, {"three": made(5, BASE)})
    with TallStore(path) as store:
        assert "distil" not in (store.tasks["three"].parameters or {})


class Stubborn(Net):
    """Works with numbers, not with gradients."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(super().forward(ids).numpy())


class Fickle(Net):
    """Gives more where gradients are asked for."""

    def forward(self, ids: Tensor) -> Any:
        found = super().forward(ids)
        return (found, found) if found.requires_grad else found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distil": 10, "code": "signs"}, "distil=10: it takes calibrate"),
        ({"distil": 0, "code": "signs", "calibrate": calibrate}, "distil=0: a number of steps"),
        ({"distil": True, "code": "signs", "calibrate": calibrate}, "distil=True: a number"),
        ({"distil": 1.5, "code": "signs", "calibrate": calibrate}, "distil=1.5: a number"),
        ({"distil": 5, "calibrate": calibrate}, "distil=5: code='tall' takes none"),
        (
            {"distil": 5, "code": "signs", "calibrate": lambda _: (Stubborn(), [IDS])},
            "distil=5: the module of task 'one' cannot be trained with",
        ),
        (
            {"distil": 5, "code": "signs", "calibrate": lambda _: (Fickle(), [IDS])},
            r"calibrate\('one'\): the module gives other shapes than with the original",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        tallstore.pack(tmp_path / "zoo.tall", BASE, TASKS, **options)
    assert not list(tmp_path.iterdir())


def test_progress_counts_bytes_as_all_stages_do(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def report(stage: str, done: int, total: int) -> None:
        if stage == "distil one":
            seen.append((done, total))

    packed(tmp_path / "zoo.tall", code="signs", distil=10, report=report)
    weights = 4 * sum(tensor.numel() for name, tensor in BASE.items() if name != "head.weight")
    steps = 10 + 4 * 1
    assert seen == [(n * weights, steps * weights) for n in range(steps + 1)]


# -- parts --------------------------------------------------------------------------------


def test_which_weights_are_picked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[int, Positions] = {}

    def keep(*args: Any, **options: Any) -> dict[int, Positions]:
        found.update(picked(*args, **options))
        return found

    monkeypatch.setattr("tallstore.packing.planning.picked", keep)
    options: dict[str, Any] = {"code": "seeded", "density": 0.1, "bits": 1, "seed": 7}
    loaded = tallstore.load(packed(tmp_path / "zoo.tall", **options, distil=1), task="one")
    # All biases are corrected, one value a weight.
    assert sorted(found) == [0, 1, 2, 3, 4]
    for name, at in zip(
        dict.fromkeys(n for n in BASE if n != "head.weight"), found.values(), strict=True
    ):
        moved = (loaded[name] - BASE[name]).view(-1).nonzero().view(-1).numpy()
        assert np.array_equal(at, moved), name


def test_levels_are_found_again() -> None:
    draw = torch.Generator().manual_seed(1)
    for magnitudes in ((1.0,), (0.5, 2.0), (0.1, 0.4, 0.9, 1.7)):
        for factor in (0.03, 5.0):
            chosen = torch.randint(len(magnitudes), (400,), generator=draw)
            sizes = factor * torch.tensor(magnitudes)[chosen]
            noise = 1 + 0.02 * torch.randn(400, generator=draw)
            wanted = [factor * level for level in magnitudes]
            assert _scaled(magnitudes, sizes, None) == pytest.approx(wanted, rel=1e-5)
            assert _scaled(magnitudes, sizes * noise, None) == pytest.approx(wanted, rel=0.02)
    assert _scaled((0.0,), torch.ones(3), None) == [0.0]
    assert _scaled((1.0,), torch.zeros(0), None) == [1.0]
    # Where all sizes are alike, only what was rounded tells which level they are.
    rounded = torch.tensor([0.0, 1.0, -1.0, 0.1])
    found = _scaled((0.0, 1.0, 2.0, 3.0), torch.tensor([0.0, 2.5, 2.5, 0.0]), rounded)
    assert found == pytest.approx([0.0, 2.5, 5.0, 7.5])


def test_a_gain_learns_by_what_it_makes_longer() -> None:
    draw = torch.Generator().manual_seed(5)
    moved = torch.tensor([0.5, 1.5])[torch.randint(2, (64,), generator=draw)]
    draft = Draft(0, SEEDED, (0.5, 1.5), 2, stride=1)
    pupil = _Pupil(("w",), 0, draft, np.arange(64), torch.zeros(64), moved, None)
    gain, values = pupil.numbers
    wanted = torch.randn(64, generator=draw)
    by_gain, by_values = torch.autograd.grad((pupil.weights() * wanted).sum(), [gain, values])
    # Weights stand at their levels: what is made longer is what is there.
    assert float(by_gain) == pytest.approx(float(moved @ wanted), rel=1e-4)
    size = float(moved.square().mean().sqrt())
    torch.testing.assert_close(by_values, wanted * size)
