"""A model whose tensors were replaced or moved is not written to, until it is bound anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_helpers import DEVICE
from serving_helpers import Net, assert_is, loops, make_store
from zoo import bits, make_base

import tallstore
from tallstore.errors import MismatchError
from tallstore.serving import TaskSwitcher

__all__ = ["loops"]  # a fixture

pytestmark = pytest.mark.usefixtures("loops")

GONE = "the model has other tensors, or elsewhere"
W = "layers.0.weight"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "zoo.tall"
    make_store(path)
    return path


def weight(model: Net) -> torch.nn.Parameter:
    found = model.get_parameter(W)
    assert isinstance(found, torch.nn.Parameter)
    return found


def other_data(model: Net) -> None:
    weight(model).data = torch.zeros_like(weight(model))


def other_view(model: Net) -> None:
    weight(model).data = torch.zeros(33, 130, device=DEVICE)[:, ::2]


def transposed(model: Net) -> None:
    """In the same memory."""
    weight(model).data = weight(model).data.view(65, 33).t()


def other_parameter(model: Net) -> None:
    layer = model.get_submodule("layers.0")
    layer.weight = torch.nn.Parameter(weight(model).detach().clone())


def assigned(model: Net) -> None:
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def other_module(model: Net) -> None:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight(model).detach().clone())
    layer.bias = torch.nn.Parameter(model.get_parameter("layers.0.bias").detach().clone())
    model.get_submodule("layers").add_module("0", layer)


def there_and_back(model: Net) -> None:
    model.double().float()


CHANGES = [
    other_data,
    other_view,
    transposed,
    other_parameter,
    assigned,
    other_module,
    there_and_back,
]


@pytest.mark.parametrize("resident", ["all", "masks-on-host", "stream"])
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_noticed(store: Path, change: Callable[[Net], None], resident: str) -> None:
    model = Net(make_base()).to(DEVICE)
    with TaskSwitcher(model, store, resident=resident) as switcher:  # type: ignore[arg-type]
        switcher.switch("a")
        change(model)
        before = {name: bits(t.cpu()) for name, t in model.state_dict().items()}
        for asked in (
            lambda: switcher.switch("b"),
            lambda: switcher.switch("b", rewrite=True),
            lambda: switcher.use("a").__enter__(),
            lambda: asyncio.run(switcher.aswitch("b")),
        ):
            with pytest.raises(MismatchError, match=rf"{GONE}.*'layers.*refresh\(\) takes"):
                asked()
        assert {name: bits(t.cpu()) for name, t in model.state_dict().items()} == before
        switcher.refresh()
        assert switcher.live is None
        for task in ("b", "a", "added", "a"):
            switcher.switch(task)
            assert_is(model, store, task)


def test_buffers_too(store: Path) -> None:
    model = Net(make_base()).to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        model.positions = torch.zeros(11, dtype=torch.int64, device=DEVICE)
        with pytest.raises(MismatchError, match="'positions'"):
            switcher.switch("a")


def test_a_dict_too(store: Path) -> None:
    state = {name: torch.zeros_like(t, device=DEVICE) for name, t in make_base().items()}
    with TaskSwitcher(state, store) as switcher:
        switcher.switch("a")
        state[W] = state[W].clone()
        with pytest.raises(MismatchError, match=rf"{GONE}.*'layers\.0\.weight'\. They"):
            switcher.switch("b")
        del state[W]
        with pytest.raises(MismatchError, match="'layers"):
            switcher.switch("b")
        with pytest.raises(MismatchError, match=r"is not in the model"):
            switcher.refresh()
        assert switcher.live == "a"
        state[W] = torch.zeros_like(make_base()[W], device=DEVICE)
        switcher.refresh()
        switcher.switch("b")
        for name, wanted in tallstore.load(store, task="b").items():
            assert bits(state[name].cpu()) == bits(wanted), name


def test_memory_that_moves_with_the_model_is_followed(store: Path) -> None:
    if DEVICE != "cpu":
        pytest.skip("share_memory() is the CPU's")
    model = Net(make_base())
    with TaskSwitcher(model, store) as switcher:
        switcher.switch("a")
        model.share_memory()
        for task in ("b", "a"):
            switcher.switch(task)
            assert_is(model, store, task)


def test_what_is_not_written_may_be_anything(store: Path) -> None:
    model = Net(make_base()).to(DEVICE)
    model.extra = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    with TaskSwitcher(model, store, ignore=["extra", "scale"]) as switcher:
        switcher.switch("a")
        model.extra = torch.nn.Parameter(torch.ones(4, device=DEVICE))
        model.scale.data = torch.ones((), device=DEVICE)
        switcher.switch("b")
        assert bits(model.norm.weight.cpu()) == bits(tallstore.load(store, task="b")["norm.weight"])


def test_a_refresh_keeps_what_did_not_move(store: Path) -> None:
    model = Net(make_base()).to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        switcher.switch("a")
        base, code = switcher._stock.offer.resident.base(0), switcher._stock.take("b").code
        switcher.refresh()
        assert switcher.live == "a" and switcher._stock.take("b").code is code
        other_data(model)
        switcher.refresh()
        assert switcher.live is None and switcher._stock.take("b").code is not code
        assert switcher._stock.offer.resident.base(0) is base


def test_tied_weights_that_were_untied(tmp_path: Path) -> None:
    base = {"a": torch.randn(20, 3)}
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"t": {"a": base["a"] + 1}, "u": {"a": base["a"] + 2}})
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(20, 3, device=DEVICE))
    model.b = model.a
    with TaskSwitcher(model, path) as switcher:
        switcher.switch("t")
        model.b = torch.nn.Parameter(torch.zeros(20, 3, device=DEVICE))
        with pytest.raises(MismatchError, match=f"{GONE}.*: 'b'"):
            switcher.switch("u")


# -- heads --------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = torch.nn.Linear(40, 30)
        self.head = torch.nn.Linear(30, classes)


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    path = tmp_path / "heads.tall"
    base = Classifier(2).state_dict()
    tuned = {f"{n}": {**base, **Classifier(n).state_dict()} for n in (2, 5, 3)}
    for state in tuned.values():
        state["body.weight"] = base["body.weight"] + 0.01 * torch.randn(30, 40)
        state["body.bias"] = base["body.bias"]
    tallstore.pack(path, base, tuned)
    return path


@pytest.mark.parametrize("live", ["2", "5"])
def test_heads_after_the_model_was_moved(heads: Path, live: str) -> None:
    """The model's own head comes back, even if another one was in its place in the meantime."""
    model = Classifier(2).to(DEVICE)
    own = model.head.weight
    with TaskSwitcher(model, heads) as switcher:
        kept = {}
        for task in ("5", "3", "2", live):
            switcher.switch(task)
            kept[task] = model.head.weight
        model.double().float()
        with pytest.raises(MismatchError, match=r"'body\.bias'"):
            switcher.switch("2")
        switcher.refresh()
        for task in ("3", "2", "5", "2"):
            switcher.switch(task)
            assert_is(model, heads, task)
            assert model.head.weight is kept[task] and model.head.out_features == int(task)
        assert kept["2"] is own


def test_a_head_that_was_replaced(heads: Path) -> None:
    model = Classifier(2).to(DEVICE)
    with TaskSwitcher(model, heads) as switcher:
        switcher.switch("5")
        model.head.weight = torch.nn.Parameter(torch.zeros(5, 30, device=DEVICE))
        with pytest.raises(MismatchError, match=rf"{GONE}.*: 'head\.weight'\."):
            switcher.switch("2")


def test_a_refresh_that_fails_leaves_the_heads(heads: Path) -> None:
    model = Classifier(2).to(DEVICE)
    with TaskSwitcher(model, heads) as switcher:
        switcher.switch("5")
        head = model.head.weight
        model.more = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
        with pytest.raises(MismatchError, match="the task has no 'more'"):
            switcher.refresh()
        assert switcher.live == "5" and model.head.weight is head
        assert model.head.out_features == 5
        del model.more
        assert switcher.switch("5").source == "live"
        for task in ("2", "5", "3"):
            switcher.switch(task)
            assert_is(model, heads, task)


def test_one_module_at_two_places(heads: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(40, 30)
            self.head = torch.nn.Linear(30, 2)
            self.again = self.head

    model = Twice().to(DEVICE)
    with TaskSwitcher(model, heads) as switcher:
        for task in ("5", "2", "3", "5"):
            switcher.switch(task)
            wanted = tallstore.load(heads, task=task)["head.weight"]
            assert bits(model.again.weight.cpu()) == bits(wanted)
