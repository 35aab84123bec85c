"""Distilling beside what modules have and do: buffers, ties, outputs of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from zoo import bits

import tallstore
from tallstore.packing.divergence import divergence
from tallstore.store import TallStore

State = dict[str, Any]
CODES: list[dict[str, Any]] = [
    {"code": "levels", "bits": 2},
    {"code": "signs", "density": 0.3},
    {"code": "seeded", "density": 0.3},
    {"code": "auto", "bits_per_weight": 2.0},
]


class Normed(nn.Module):
    """Running statistics are weights of a checkpoint, and no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 64), nn.BatchNorm1d(64)
        self.second = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.norm(self.first(x)).relu())
        return found


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 48), nn.Linear(48, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(ids))
        return found


class Counting(nn.Module):
    """Its forward writes to buffers, which no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 64)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls: Tensor
        self.calls.add_(1)
        found: Tensor = self.layer(x)
        return found


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).relu())
        return found.squeeze(-1)


class Unheeding(nn.Module):
    """Gives nothing that its weights have a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x


def moved(state: State, by: float) -> State:
    torch.manual_seed(5)
    return {
        # Running variances stay above nothing.
        name: tensor + by * torch.randn_like(tensor).abs() * tensor.sign()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def far(kind: Callable[[], nn.Module], state: State, other: State, given: Tensor) -> float:
    """How far outputs are from the other's: logits by KL divergence, numbers by squares."""
    outputs = []
    for weights in (other, state):
        module = kind().eval()
        module.load_state_dict(weights)
        with torch.no_grad():
            outputs.append(module(given))
    wanted, found = outputs
    if wanted.dim() == 1:
        return float((wanted - found).square().sum())
    return float(
        kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
    )


@pytest.mark.parametrize("options", CODES, ids=lambda given: given["code"])
def test_running_statistics_are_left_as_they_are_coded(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    base = Normed().state_dict()
    tuned, given = moved(base, 0.2), torch.randn(64, 8)
    found = {}
    for steps in (None, 40):
        tallstore.pack(
            tmp_path / f"{steps}.tall", base, {"t": tuned}, **options,
            calibrate=lambda _: (Normed(), list(given.split(16))), distil=steps,
        )  # fmt: skip
        found[steps] = tallstore.load(tmp_path / f"{steps}.tall", task="t")
    for name in ("norm.running_mean", "norm.running_var"):
        if options["code"] != "auto":  # which has biases corrected, and is free to choose
            assert bits(found[None][name]) == bits(found[40][name])
    assert far(Normed, found[40], tuned, given) < far(Normed, found[None], tuned, given)


@pytest.mark.parametrize("alike", ["object", "storage"])
def test_a_tied_tensor_is_trained_under_all_of_its_names(tmp_path: Path, alike: str) -> None:
    torch.manual_seed(1)
    # A row is not much more like itself than like the others.
    weights = 0.3 * Tied().table.weight.detach() + 0.5 * torch.randn(48)
    tuned, ids = weights + 0.1 * torch.randn(40, 48), torch.randint(40, (32, 12))

    def named(tensor: Tensor) -> State:
        other = tensor if alike == "object" else tensor.view(40, 48)
        return {"table.weight": tensor, "head.weight": other}

    distances = []
    for steps in (None, 60):
        path = tmp_path / f"{steps}.tall"
        tallstore.pack(
            path, named(weights), {"t": named(tuned)}, code="levels", bits=2,
            calibrate=lambda _: (Tied(), list(ids.split(8))), distil=steps,
        )  # fmt: skip
        distances.append(far(Tied, tallstore.load(path, task="t"), named(tuned), ids))
    assert distances[1] < 0.7 * distances[0]


@pytest.mark.parametrize("steps", [None, 4])
def test_buffers_that_the_module_writes_to_are_as_they_were(
    tmp_path: Path, steps: int | None
) -> None:
    module = Counting()
    base = {n: t.clone() for n, t in module.state_dict().items()}
    tallstore.pack(
        tmp_path / "z.tall", base, {"t": moved(base, 0.1)}, code="levels", bits=2,
        calibrate=lambda _: (module, [torch.rand(6, 8)]), distil=steps,
    )  # fmt: skip
    assert int(module.calls) == 0


def test_numbers_of_one_axis_are_no_logits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = Regression().state_dict()
    tuned, given = moved(base, 0.3), torch.randn(256, 8)
    distances = []
    for steps in (None, 100):
        path = tmp_path / f"{steps}.tall"
        tallstore.pack(
            path, base, {"t": tuned}, code="levels", bits=1,
            calibrate=lambda _: (Regression(), list(given.split(32))), distil=steps,
        )  # fmt: skip
        distances.append(far(Regression, tallstore.load(path, task="t"), tuned, given))
    assert distances[1] < 0.7 * distances[0]


@pytest.mark.parametrize("shape", [(), (5,), (5, 1)])
def test_an_offset_counts_where_there_are_no_logits(shape: tuple[int, ...]) -> None:
    wanted = torch.randn(shape)
    assert float(divergence(wanted + 2, wanted)) == pytest.approx(4 * wanted.numel(), rel=1e-5)
    assert float(divergence(torch.ones(5, 3), torch.zeros(5, 3))) == pytest.approx(0, abs=1e-5)


def test_where_there_is_nothing_to_learn_codes_stay(tmp_path: Path) -> None:
    base = Unheeding().state_dict()
    tuned, found = moved(base, 0.1), []
    for steps in (None, 8):
        path = tmp_path / f"{steps}.tall"
        tallstore.pack(
            path, base, {"t": tuned}, code="levels", bits=2,
            calibrate=lambda _: (Unheeding(), [torch.rand(6, 8)]), distil=steps,
        )  # fmt: skip
        found.append(tallstore.load(path, task="t"))
    assert all(bits(found[0][name]) == bits(found[1][name]) for name in base)


def test_a_bias_that_two_layers_add_is_corrected_for_neither(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.second.bias = self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.second(self.first(x).relu())
            return found

    torch.manual_seed(1)
    base = Shared().state_dict()
    tuned = moved(base, 0.1)
    for state in (base, tuned):
        state["second.bias"] = state["first.bias"]
    tallstore.pack(
        tmp_path / "z.tall", base, {"t": tuned}, code="levels", bits=2,
        calibrate=lambda _: (Shared(), [torch.rand(6, 32)]),
    )  # fmt: skip
    with TallStore(tmp_path / "z.tall") as store:
        assert not (store.tasks["t"].parameters or {}).get("corrected")
