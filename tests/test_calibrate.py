"""Corrected biases: coded weights give, on average, what the original ones give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import bits

import tallstore
from tallstore.errors import MismatchError, OptionError
from tallstore.packing.calibrating import Calibration

State = dict[str, Tensor]


class Net(nn.Module):
    """Every kind of layer that has its channels somewhere else, and what is behind a rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.bn = nn.BatchNorm2d(32)
        self.up = nn.Linear(32, 256)
        self.norm = nn.LayerNorm(256)
        self.down = nn.Linear(256, 16)
        self.unused = nn.Linear(3, 3)

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        found = self.bn(self.conv(images)).relu().mean((2, 3)) * scale
        found = self.norm(self.up(found)).relu()
        result: Tensor = self.down(found)
        return result


def made(seed: int, start: State | None = None) -> State:
    torch.manual_seed(seed)
    if start is None:
        return {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    return {
        name: tensor + 0.03 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in start.items()
    }


BASE = made(0)
BASE["bn.running_var"] += 1.0
TASKS = {"one": made(1, BASE), "two": made(2, BASE)}
IMAGES = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LAYERS = ("conv", "bn", "up", "norm", "down")


def calibrate(task: str) -> tuple[nn.Module, list[Any]]:
    return Net(), [IMAGES[:32], (IMAGES[32:48], 2.0), {"images": IMAGES[48:]}]


def outputs(state: State) -> dict[str, Tensor]:
    """The mean of every layer's output, by channel."""
    net, found = Net(), {}
    net.load_state_dict(state)

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            found[name] = output.mean((0, 2, 3) if output.dim() == 4 else 0)

        return hook

    for name in LAYERS:
        net.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        net.eval()(IMAGES)
    return found


def far(state: State, task: str) -> float:
    """How far the means are from the task's, relative to how far those are from the base's."""
    one, own, base = outputs(state), outputs(TASKS[task]), outputs(BASE)
    away = sum(float((one[name] - own[name]).square().sum()) for name in LAYERS)
    return away / sum(float((base[name] - own[name]).square().sum()) for name in LAYERS)


def test_means_become_those_of_the_original() -> None:
    coded = made(9, TASKS["one"])
    calls = [IMAGES, IMAGES]
    found = Calibration("one", lambda _: (Net(), calls), TASKS["one"])
    assert found.names == tuple(f"{name}.bias" for name in LAYERS)
    corrected, far_off = found.corrected(coded, found.names)
    assert set(corrected) == set(found.names)
    means = outputs({**coded, **corrected})
    for name, wanted in outputs(TASKS["one"]).items():
        torch.testing.assert_close(means[name], wanted, rtol=1e-4, atol=1e-5)
    # Of some alone, the others being what they are.
    some, farther = found.corrected(coded, ["up.bias"])
    assert list(some) == ["up.bias"] and 0 < far_off < farther
    assert found.corrected(TASKS["one"], found.names)[1] < 1e-6
    means = outputs({**coded, **some})
    torch.testing.assert_close(means["up"], outputs(TASKS["one"])["up"], rtol=1e-4, atol=1e-5)


def test_the_module_is_left_as_it_was() -> None:
    net = Net().train()
    net.up.eval()
    before = {name: bits(tensor) for name, tensor in net.state_dict().items()}
    Calibration("one", lambda _: (net, [IMAGES]), TASKS["one"]).corrected(TASKS["two"], ["up.bias"])
    assert net.training and net.bn.training
    assert not any(module._forward_hooks for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not net.up.training
    # Statistics of batch norm were not counted on.
    assert {name: bits(tensor) for name, tensor in net.state_dict().items()} == before


def test_the_module_may_be_what_is_packed(tmp_path: Path) -> None:
    """Its weights are a task's, or the base's and of tasks where those did not move."""
    nets = {}
    for task, state in TASKS.items():
        nets[task] = Net()
        nets[task].load_state_dict(state)
    base = Net()
    base.load_state_dict(BASE)
    own = base.state_dict()
    zoos: list[tuple[Any, dict[str, Any], Any]] = [
        (BASE, {**nets}, lambda task: (nets[task], [IMAGES])),
        (
            own,
            {
                "one": {**own, "up.weight": TASKS["one"]["up.weight"]},
                "two": {**own, "down.weight": TASKS["two"]["down.weight"]},
            },
            lambda _: (base, [IMAGES]),
        ),
    ]
    for number, (start, tasks, function) in enumerate(zoos):
        wanted = {
            task: {name: bits(t) for name, t in (
                what.state_dict() if isinstance(what, nn.Module) else what
            ).items()}
            for task, what in tasks.items()
        }  # fmt: skip
        path = tmp_path / f"{number}.tall"
        tallstore.pack(path, start, tasks, code="signs", exact=True, calibrate=function)
        for task, raw in wanted.items():
            found = tallstore.load(path, task=task)
            assert {name: bits(tensor) for name, tensor in found.items()} == raw


def test_tied_weights_may_be_there_once(tmp_path: Path) -> None:
    """As safetensors has them."""

    def net() -> nn.Module:
        made = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        made[2].weight = made[0].weight
        return made

    base = {name: t.clone() for name, t in net().state_dict().items() if name != "2.weight"}
    path = tmp_path / "zoo.tall"
    tallstore.pack(
        path,
        base,
        {"one": made(1, base)},
        code="signs",
        calibrate=lambda _: (net(), [torch.rand(4, 8)]),
    )
    parameters = tallstore.open(path).tasks["one"].parameters
    assert parameters is not None and parameters["corrected"] == 2


def test_newcomers_are_coded_as_the_calibrated(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, BASE, TASKS, code="signs", calibrate=calibrate)
    for name in ("three", "four"):
        tallstore.add(path, {name: made(4, BASE)})
    with tallstore.open(path) as store:
        assert {record.code for record in store.tasks.values()} == {"signs"}


@pytest.mark.parametrize(
    "options",
    [
        {"code": "auto", "bits_per_weight": 2.0},
        {"code": "signs", "density": 0.1},
        {"code": "seeded", "density": 0.2},
        {"code": "levels", "bits": 1},
    ],
)
def test_codes_do_what_the_task_does(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, mended = tmp_path / "plain.tall", tmp_path / "mended.tall"
    tallstore.pack(plain, BASE, TASKS, **options)
    tallstore.pack(mended, BASE, TASKS, calibrate=calibrate, **options)
    with tallstore.open(mended) as store:
        for task in TASKS:
            parameters = store.tasks[task].parameters
            assert parameters is not None and 0 < parameters["corrected"] <= len(LAYERS)
            without = tallstore.load(plain, task=task)
            assert far(store.load(task), task) < 0.3 * far(without, task)
        # Other tensors are what they are without; of a budget biases take a part.
        if options["code"] != "auto":
            one = store.load("one")
            assert all(
                bits(one[name]) == bits(tensor)
                for name, tensor in tallstore.load(plain, task="one").items()
                if name not in {f"{layer}.bias" for layer in LAYERS}
            )


def test_the_exact_tier_is_the_original(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, BASE, TASKS, code="auto", exact=True, calibrate=calibrate)
    for task, state in TASKS.items():
        found = tallstore.load(path, task=task)
        assert all(bits(found[name]) == bits(tensor) for name, tensor in state.items())
        coded = tallstore.load(path, task=task, fidelity="codes")
        assert bits(coded["up.bias"]) != bits(state["up.bias"])
    assert tallstore.open(path).verify().ok


@pytest.mark.parametrize("moved", [True, False])
def test_exact_where_a_correction_is_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """What codes leave as the base has it still has a residual, and the other way round."""
    task = {**TASKS["one"]}
    if not moved:
        task["up.bias"] = BASE["up.bias"].clone()

    def back(self: Calibration, coded: State, names: Any) -> tuple[State, float]:
        return {"up.bias": BASE["up.bias"] if moved else BASE["up.bias"] + 1}, 0.0

    monkeypatch.setattr(Calibration, "corrected", back)
    for exact in (True, False):
        path = tmp_path / f"{exact}.tall"
        tallstore.pack(path, BASE, {"one": task}, code="signs", exact=exact, calibrate=calibrate)
        found = tallstore.load(path, task="one")
        if exact:
            assert all(bits(found[name]) == bits(tensor) for name, tensor in task.items())
            found = tallstore.load(path, task="one", fidelity="codes")
        wanted = BASE["up.bias"] if moved else BASE["up.bias"] + 1
        if moved and not exact:
            wanted = task["up.bias"]  # or its part would say that it is the base's
        torch.testing.assert_close(found["up.bias"], wanted)


def test_a_budget_is_kept(tmp_path: Path) -> None:
    """The smallest are corrected, as far as a quarter of the budget goes; perhaps none."""
    taken = {}
    for budget in (0.05, 0.3, 2.0):
        path = tmp_path / f"{budget}.tall"
        tallstore.pack(path, BASE, TASKS, code="auto", bits_per_weight=budget, calibrate=calibrate)
        with tallstore.open(path) as store:
            taken[budget] = (store.tasks["one"].parameters or {})["corrected"]
    assert taken[0.05] == 0 < taken[0.3] < taken[2.0] == len(LAYERS)


def test_repack_and_keep(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, BASE, TASKS, exact=True)
    tallstore.repack(path, code="signs", calibrate=calibrate, exact=False)
    with tallstore.open(path) as store:
        assert store.tasks["two"].parameters == {
            "density": 0.05, "gain": "unbiased", "corrected": len(LAYERS),
        }  # fmt: skip
    tallstore.pack(
        tmp_path / "kept.tall",
        BASE,
        TASKS,
        code="auto",
        keep=0.9,
        evaluate=lambda task, state: 1 - min(far(state, task), 1.0),
        calibrate=calibrate,
    )
    with tallstore.open(tmp_path / "kept.tall") as store:
        for record in store.tasks.values():
            assert record.score is not None and record.score >= 0.9
            assert set(record.parameters or {}) == {"gain", "keep", "corrected"}


def raising(task: str) -> Any:
    raise ValueError("no such data")


class Twice(Net):
    """Calls a layer once more after every run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        self.runs += 1
        for _ in range(self.runs):
            found = super().forward(images, scale)
        return found


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raising, "ValueError: no such data"),
        (lambda _: (Net(), []), "0 batches"),
        (lambda _: ("net", [IMAGES]), "str"),
        (lambda _: 3, "it gave int"),
        (lambda _: (nn.Sequential(nn.Linear(3, 3)), [IMAGES]), "'0.weight', which the module has"),
        (lambda _: (Net(), [IMAGES[:, :2]]), "failed with the original"),
        (lambda _: (Net(), [IMAGES * torch.nan]), "not finite"),
        (lambda _: (Twice(), [IMAGES]), "more often"),
    ],
)
def test_what_is_refused(tmp_path: Path, function: Any, said: str) -> None:
    path = tmp_path / "zoo.tall"
    with pytest.raises(OptionError, match=said) as caught:
        tallstore.pack(path, BASE, TASKS, code="signs", calibrate=function)
    assert "calibrate('one')" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"code": "levels", "over": "shared"}])
def test_not_over_a_shared_vector(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"shared vector.*over='none'"):
        tallstore.pack(tmp_path / "zoo.tall", BASE, TASKS, calibrate=calibrate, **options)


def test_max_error_is_no_budget_for_it(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"max_error=0\.5: .*bits_per_weight"):
        tallstore.pack(
            tmp_path / "zoo.tall", BASE, TASKS, code="auto", max_error=0.5, calibrate=calibrate
        )


@pytest.mark.parametrize("code", ["auto", "signs"])
def test_what_is_told_is_told_of_the_original(tmp_path: Path, code: str) -> None:
    """Errors are from the original, and the original is known by its distance from the base."""
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, BASE, TASKS, code=code, exact=True, calibrate=calibrate)
    with tallstore.open(path) as store:
        coded = store.load("one", fidelity="codes")
        found = store.segment_stats("one")
        for name in ("up.bias", "up.weight"):
            stats, moved = found[name], TASKS["one"][name] - BASE[name]
            off = coded[name] - TASKS["one"][name]
            assert stats.moved == pytest.approx(float(moved.norm()), rel=1e-4)
            assert stats.relative_error == pytest.approx(float(off.norm() / moved.norm()), rel=1e-2)
    tallstore.strip(path)
    wrong = {**TASKS["one"], "up.weight": TASKS["one"]["up.weight"] * 1.01}
    with pytest.raises(MismatchError):
        tallstore.add(path, {"one": wrong}, exact=True)
    tallstore.add(path, TASKS, exact=True)
    for task, state in TASKS.items():
        found_again = tallstore.load(path, task=task)
        assert all(bits(found_again[name]) == bits(tensor) for name, tensor in state.items())


def test_a_bias_of_two_layers_is_left_alone(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.c(self.b(self.a(x).relu()).relu())
            return result

    torch.manual_seed(0)
    base = Tied()
    task = Tied()
    task.load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    path = tmp_path / "zoo.tall"
    tallstore.pack(
        path, base, {"one": task}, code="signs", calibrate=lambda _: (Tied(), [torch.rand(32, 8)])
    )
    with tallstore.open(path) as store:
        assert (store.tasks["one"].parameters or {})["corrected"] == 1


@pytest.mark.parametrize(("off", "on"), [("", "model."), ("model.", "")])
def test_names_may_be_wrapped(tmp_path: Path, off: str, on: str) -> None:
    """As they may be between a base and its tasks."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()
            # Not in the checkpoint, and nothing that could be learnt.
            self.register_buffer("places", torch.arange(3))

        def forward(self, *given: Any, **named: Any) -> Any:
            return self.model(*given, **named)

    tasks = {task: {on + n: t for n, t in state.items()} for task, state in TASKS.items()}
    module = Wrapped() if off else Net()
    path = tmp_path / "zoo.tall"
    tallstore.pack(
        path,
        {on + name: tensor for name, tensor in BASE.items()},
        tasks,
        code="signs",
        calibrate=lambda task: (module, calibrate(task)[1]),
    )
    with tallstore.open(path) as store:
        assert (store.tasks["one"].parameters or {})["corrected"] == len(LAYERS)
        found = {name.removeprefix(on): tensor for name, tensor in store.load("one").items()}
    assert far(found, "one") < 1
