"""Calibrating and distilling with modules as few have them: used as they are, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import bits

import tallstore
from tallstore.errors import OptionError

State = dict[str, Tensor]
INPUTS = torch.rand(24, 16, generator=torch.Generator().manual_seed(3))
trained = pytest.mark.parametrize("steps", [None, 4])


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


def moved(state: State, by: float = 0.05) -> State:
    draw = torch.Generator().manual_seed(5)
    return {name: t + by * torch.randn(t.shape, generator=draw) for name, t in state.items()}


def pack(path: Path, module: nn.Module, task: State, steps: int | None, **options: Any) -> State:
    """Pack a task with a module that has the base's weights."""
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    options = options or {"code": "signs", "density": 0.3}
    tallstore.pack(
        path, base, {"t": task}, calibrate=lambda _: (module, list(INPUTS.split(8))), distil=steps,
        **options,
    )  # fmt: skip
    for name, tensor in module.state_dict().items():
        assert bits(tensor) == bits(base[name])
    return tallstore.load(path, task="t")


def recorded(path: Path) -> dict[str, Any]:
    with tallstore.open(path) as store:
        return dict(store.tasks["t"].parameters or {})


@trained
def test_a_layer_that_is_there_twice(tmp_path: Path, steps: int | None) -> None:
    layer = nn.Linear(16, 16)
    module = nn.Sequential(layer, nn.ReLU(), layer)
    one = moved(layer.state_dict())
    task = {f"{n}.{name}": tensor for n in (0, 2) for name, tensor in one.items()}
    before = layer.weight
    found = pack(tmp_path / "z.tall", module, task, steps)
    assert layer.weight is before
    assert isinstance(layer.weight, nn.Parameter)
    assert bits(found["0.weight"]) == bits(found["2.weight"])
    assert recorded(tmp_path / "z.tall").get("distil") == steps
    torch.optim.SGD(module.parameters(), lr=0.1).step()


@pytest.mark.parametrize("options", [{"code": "signs"}, {"code": "auto", "bits_per_weight": 2.0}])
def test_a_caller_in_inference_mode(tmp_path: Path, options: dict[str, Any]) -> None:
    with torch.inference_mode():
        module = plain()
        task = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        base = moved(task)
        tallstore.pack(
            tmp_path / "z.tall", base, {"t": module}, **options, exact=True,
            calibrate=lambda _: (module, [INPUTS]),
        )  # fmt: skip
        found = tallstore.load(tmp_path / "z.tall", task="t")
    for name, tensor in task.items():
        assert bits(module.state_dict()[name]) == bits(tensor) == bits(found[name])


class Rebinding(nn.Module):
    """Holds other tensors after each call, and loads by taking what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.register_buffer("seen", x)
        found: Tensor = self.layer(x)
        return found

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return super().load_state_dict(*args, **{**options, "assign": True})


@trained
def test_what_a_module_holds_afterwards(tmp_path: Path, steps: int | None) -> None:
    torch.manual_seed(0)
    module = Rebinding()
    held = dict(module.named_parameters()), dict(module.named_buffers())
    pack(tmp_path / "z.tall", module, moved(module.state_dict()), steps)
    after = dict(module.named_parameters()), dict(module.named_buffers())
    for before, now in zip(held, after, strict=True):
        assert {n: id(tensor) for n, tensor in before.items()} == {
            n: id(tensor) for n, tensor in now.items()
        }


@dataclass
class Answer:
    note: str
    logits: Tensor


class Giving(nn.Module):
    """Gives its logits in something."""

    def __init__(self, inside: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)
        self.inside = inside

    def forward(self, x: Tensor) -> Any:
        return self.inside(self.layer(x))


@trained
@pytest.mark.parametrize(
    "inside",
    [lambda x: Answer("yes", x), lambda x: (None, [x]), lambda x: x.to_sparse()],
    ids=["dataclass", "nest", "sparse"],
)
def test_outputs_in_something(
    tmp_path: Path, inside: Callable[[Tensor], Any], steps: int | None
) -> None:
    found, wanted = [
        pack(tmp_path / f"{n}.tall", module, moved(module.state_dict()), steps)
        for n, module in enumerate((Giving(inside), Giving(lambda x: x)))
    ]
    assert all(bits(found[name]) == bits(wanted[name]) for name in wanted)


class WithBias(nn.Linear):
    """Gives its bias beside what it is to be added to, as some parallel layers do."""

    def forward(self, x: Tensor) -> Any:
        return nn.functional.linear(x, self.weight), self.bias


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = WithBias(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        product, bias = self.layer(x)
        found: Tensor = self.last(product + bias)
        return found


@trained
def test_a_bias_that_is_not_added_is_not_corrected(tmp_path: Path, steps: int | None) -> None:
    module = Adding()
    pack(tmp_path / "z.tall", module, moved(module.state_dict()), steps)
    assert recorded(tmp_path / "z.tall")["corrected"] == 1


@pytest.mark.parametrize(
    "options", [{"code": "signs"}, {"code": "levels", "bits": 2}], ids=lambda o: o["code"]
)
def test_outputs_without_gradients_teach_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    found = []
    for steps in (None, 8):
        module = Giving(torch.Tensor.detach)
        task = moved(module.state_dict())
        found.append(pack(tmp_path / f"{steps}.tall", module, task, steps, **options))
    assert all(bits(found[0][name]) == bits(found[1][name]) for name in found[0])
    assert "distil" not in recorded(tmp_path / "8.tall")


class Stateless(nn.Linear):
    def state_dict(self, *_: Any, **__: Any) -> Any:
        raise ValueError("none of your business")


def short_of_memory(x: Tensor) -> Any:
    raise MemoryError


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(16, 16)


@trained
@pytest.mark.parametrize(
    ("module", "batch", "said"),
    [
        (lambda: nn.LazyLinear(16), INPUTS, "'weight' of the module has no numbers yet.*once"),
        (on_meta, INPUTS, "'weight' of the module has no numbers yet.*to_empty"),
        (lambda: Stateless(16, 16), INPUTS, "has no state dict: ValueError: none of your"),
        (lambda: nn.Linear(16, 16), INPUTS[:0], "gives nothing for a batch: is the batch empty"),
        (lambda: Giving(lambda x: x.int()), INPUTS, "gives a Tensor without floating-point num"),
        (lambda: Giving(lambda _: None), INPUTS, "gives None without floating-point numbers"),
        (lambda: Giving(short_of_memory), INPUTS, "failed with the original: MemoryError"),
    ],
    ids=["lazy", "meta", "stateless", "empty", "integers", "nothing", "memory"],
)
def test_what_is_refused(
    tmp_path: Path, module: Callable[[], nn.Module], batch: Tensor, said: str, steps: int | None
) -> None:
    given = module()
    names = ("layer.weight", "layer.bias") if isinstance(given, Giving) else ("weight", "bias")
    base = dict(zip(names, (torch.randn(16, 16), torch.randn(16)), strict=True))
    with pytest.raises(OptionError, match=rf"calibrate\('t'\): .*{said}") as refusal:
        tallstore.pack(
            tmp_path / "z.tall", base, {"t": moved(base)}, code="signs",
            calibrate=lambda _: (given, [batch]), distil=steps,
        )  # fmt: skip
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_other_keys(tmp_path: Path) -> None:
    base: dict[Any, Tensor] = dict(plain().state_dict())
    base[7] = torch.ones(3)
    task = {name: tensor + 0.1 for name, tensor in base.items()}
    with pytest.raises(OptionError, match=r"the checkpoint is no state dict, .* but a dict"):
        tallstore.pack(
            tmp_path / "z.tall", base, {"t": task}, code="signs",
            calibrate=lambda _: (plain(), [INPUTS]),
        )  # fmt: skip
