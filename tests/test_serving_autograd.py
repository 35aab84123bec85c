"""What torch knows of a switch: versions of weights, and models made in inference mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_helpers import DEVICE
from serving_helpers import Net, assert_is, loops, make_store, tensors
from zoo import bits, make_base

import tallstore
from tallstore.errors import ChecksumError
from tallstore.serving import TaskSwitcher
from tallstore.serving.results import Residency

__all__ = ["loops"]  # a fixture

pytestmark = pytest.mark.usefixtures("loops")

RESIDENT: tuple[tuple[Residency, int | None], ...] = (
    ("all", None),
    ("masks-on-host", None),
    ("stream", None),
    ("stream", 0),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "zoo.tall"
    make_store(path)
    tallstore.add(path, {"signs": tallstore.load(path, task="a")}, code="signs")
    return path


@pytest.mark.parametrize(("resident", "budget"), RESIDENT)
def test_a_graph_from_before_a_switch_fails(
    store: Path, resident: Residency, budget: int | None
) -> None:
    model = Net(make_base()).to(DEVICE)
    weight = model.get_parameter("layers.0.weight")
    x = torch.ones(2, 65, device=DEVICE, requires_grad=True)
    with TaskSwitcher(model, store, resident=resident, budget=budget) as switcher:
        switcher.switch("a")
        for task in ("b", "signs", "added", "a"):
            y = (x @ weight.t()).sum()
            versions = {name: t._version for name, t in tensors(model).items()}
            switcher.switch(task)
            assert all(t._version > versions[name] for name, t in tensors(model).items())
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()
        y = (x @ weight.t()).sum()
        versions = {name: t._version for name, t in tensors(model).items()}
        switcher.switch("a")  # it is live: nothing is written
        assert all(t._version == versions[name] for name, t in tensors(model).items())
        y.backward()


def test_a_switch_that_fails_halfway_counts(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(make_base()).to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        switcher.switch("b")
        before = model.scale._version

        def broken(code: object) -> None:
            raise ChecksumError("no")

        monkeypatch.setattr("tallstore.serving.writer._copy", broken)
        with pytest.raises(ChecksumError, match="partly overwritten"):
            switcher.switch("a")
        assert model.scale._version > before


def test_names_for_the_same_weights_that_have_versions_of_their_own(tmp_path: Path) -> None:
    base = {"a": torch.randn(20, 3)}
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"t": {"a": base["a"] + 1}})
    held = torch.zeros(20, 3, device=DEVICE)
    model = {"a": held, "b": held.data}
    with TaskSwitcher(model, path) as switcher:
        switcher.switch("t")
    assert model["a"]._version and model["b"]._version


@pytest.mark.parametrize(("resident", "budget"), RESIDENT)
def test_a_model_made_in_inference_mode(
    store: Path, resident: Residency, budget: int | None
) -> None:
    with torch.inference_mode():
        model = Net(make_base()).to(DEVICE)
        state = {name: torch.zeros_like(t)[::1] if t.dim() else t for name, t in
                 make_base().items()}  # fmt: skip
        state["layers.0.weight"] = torch.zeros(33, 130)[:, ::2]  # not in one piece
        state = {name: t.to(DEVICE) if DEVICE != "cpu" else t for name, t in state.items()}
    assert model.scale.is_inference() and state["layers.0.weight"].is_inference()
    for made in (model, state):
        with TaskSwitcher(made, store, resident=resident, budget=budget) as switcher:
            for task in ("a", "signs", "added", "b", "signs", "a"):
                switcher.switch(task)
                wanted = tallstore.load(store, task=task)
                found = tensors(model) if made is model else state
                for name, tensor in found.items():
                    assert bits(tensor.cpu()) == bits(wanted[name]), (task, name)


@pytest.mark.parametrize(("resident", "budget"), RESIDENT)
def test_a_switcher_used_in_inference_mode(
    store: Path, resident: Residency, budget: int | None
) -> None:
    """The model is none of it: it can be trained afterwards."""
    model = Net(make_base()).to(DEVICE)
    with torch.inference_mode():
        switcher = TaskSwitcher(model, store, resident=resident, budget=budget)
        switcher.switch("a")
    for task in ("b", "signs", "added"):
        switcher.switch(task)
        assert_is(model, store, task)
    with torch.inference_mode():
        switcher.switch("a", rewrite=True)
    assert_is(model, store, "a")
    (model.get_parameter("layers.0.weight") ** 2).sum().backward()
    switcher.close()


@pytest.mark.parametrize("inference", [False, True])
def test_heads_are_like_the_original(tmp_path: Path, inference: bool) -> None:
    base = {"w": torch.randn(30, 40), "head": torch.randn(2, 30)}
    tasks = {n: {"w": base["w"] + 0.1, "head": torch.randn(n, 30)} for n in (3, 2)}
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {str(n): state for n, state in tasks.items()})
    with torch.inference_mode(inference):
        model = Net(base).to(DEVICE)
    with torch.inference_mode(not inference), TaskSwitcher(model, path) as switcher:
        for task in ("3", "2", "3"):
            switcher.switch(task)
            assert_is(model, path, task)
            assert model.head.is_inference() == inference
