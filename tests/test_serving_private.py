"""Heads, integers and ties: what is a task's own follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_helpers import DEVICE
from serving_helpers import Net, assert_is
from zoo import State, bits, fine_tune, make_base

import tallstore
from tallstore.errors import MismatchError
from tallstore.serving import TaskSwitcher
from tallstore.serving.results import Residency
from tallstore.store import TallStore


class Classifier(torch.nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = torch.nn.Linear(40, 30)
        self.head = torch.nn.Linear(30, classes)
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))


def make_heads(path: Path) -> dict[str, State]:
    base = Classifier(2).body
    tasks = {}
    for name, classes in (("two", 2), ("five", 5), ("also two", 2)):
        model = Classifier(classes)
        model.counts += classes
        tasks[name] = model.state_dict()
        for key, tensor in base.state_dict().items():
            tasks[name][f"body.{key}"] = tensor + 0.01 * torch.randn(tensor.shape)
    tallstore.pack(path, {f"body.{k}": v for k, v in base.state_dict().items()}, tasks)
    return tasks


def test_heads_are_replaced(tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    make_heads(store)
    model = Classifier(2).to(DEVICE)
    own = model.head.weight
    with TaskSwitcher(model, store) as switcher:
        seen = set()
        for task, classes in (("two", 2), ("five", 5), ("also two", 2), ("five", 5), ("two", 2)):
            done = switcher.switch(task)
            changed = classes == 5 or done.previous == "five"
            assert done.replaced == (("counts", "head.bias", "head.weight") if changed else ())
            assert_is(model, store, task)
            assert model.head.out_features == classes
            assert isinstance(model.head.weight, torch.nn.Parameter)
            seen.add(model.head.weight)
        # One parameter for each shape, so that whoever refers to them can go on.
        assert len(seen) == 2 and own in seen


def test_heads_are_skipped(tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    make_heads(store)
    model = Classifier(2).to(DEVICE)
    with TaskSwitcher(model, store, private="skip") as switcher:
        assert switcher.switch("two").skipped == ()
        head = bits(model.head.weight.cpu())
        done = switcher.switch("five")
        assert set(done.skipped) == {"counts", "head.bias", "head.weight"} and not done.replaced
        assert bits(model.head.weight.cpu()) == head
        body = tallstore.load(store, task="five")["body.weight"]
        assert bits(model.body.weight.cpu()) == bits(body)


def test_a_dict_cannot_be_given_other_heads(tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    make_heads(store)
    state = Classifier(2).to(DEVICE).state_dict()
    with pytest.raises(MismatchError, match=r"task 'five'.*'head\.weight' has shape \[2, 30\]"):
        TaskSwitcher(state, store)
    with TaskSwitcher(state, store, private="skip") as switcher:
        switcher.switch("five")


def test_a_model_without_the_head(tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    tasks = make_heads(store)
    body = torch.nn.ModuleDict({"body": torch.nn.Linear(40, 30)}).to(DEVICE)
    with pytest.raises(MismatchError, match=r"'head\.weight' \[2, 30\] is not in the model"):
        TaskSwitcher(body, store)
    with TaskSwitcher(body, store, private="skip") as switcher:
        assert set(switcher.switch("two").skipped) == {"head.weight", "head.bias", "counts"}
    with TaskSwitcher(body, store, ignore=["head.*", "counts"]) as switcher:
        assert switcher.switch("five").skipped == ()
    wanted = tallstore.load(store, task="five")
    assert bits(body["body"].weight.detach().cpu()) == bits(wanted["body.weight"])
    assert len(tasks) == 3


def test_a_model_with_more_than_the_task(tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    make_heads(store)
    model = Classifier(2).to(DEVICE)
    model.extra = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    with pytest.raises(MismatchError, match=r"the task has no 'extra' \[3\]"):
        TaskSwitcher(model, store, tasks=["two"])
    with TaskSwitcher(model, store, tasks=["two"], ignore="extra") as switcher:
        switcher.switch("two")
    assert bool((model.extra == 1).all())


def test_integers_follow(tmp_path: Path) -> None:
    base = make_base()
    tuned = {"a": fine_tune(base, 1), "b": fine_tune(base, 2)}
    tuned["a"]["positions"] = torch.arange(11) + 5
    store = tmp_path / "zoo.tall"
    tallstore.pack(store, base, tuned)
    model = Net(base).to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        switcher.switch("a")
        assert model.positions.tolist() == list(range(5, 16))
        switcher.switch("b")
        assert model.positions.tolist() == list(range(11))


class Words(torch.nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(rows, 40)
        self.body = torch.nn.Linear(40, 30)


#: Codes by which rows in common are kept: none is exact; of few rows, only that one has any.
SHARED: dict[str, dict[str, Any]] = {
    "exact": {},
    "tall": {"code": "tall"},
    "signs": {"code": "signs"},
    "levels": {"code": "levels"},
    "seeded": {"code": "seeded"},
}


@pytest.fixture(scope="module", params=SHARED)
def shrunk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks with as many rows as the base, fewer, and more: those in common are the base's."""
    path = tmp_path_factory.mktemp("zoo") / "zoo.tall"
    base = Words(300).state_dict()
    tasks = {}
    for rows in (300, 280, 310):
        tasks[str(rows)] = {k: t + 0.01 * torch.randn(t.shape) for k, t in base.items()}
        more = torch.randn(10, 40)
        tasks[str(rows)]["embed.weight"] = torch.cat([tasks[str(rows)]["embed.weight"], more])[
            :rows
        ]
    if request.param == "exact":
        tallstore.save(base, path)
        tallstore.add(path, tasks)
    else:
        tallstore.pack(path, base, tasks, exact=request.param == "tall", **SHARED[request.param])
    with TallStore(path) as opened:
        document = opened.describe("280").task
        assert document is not None
        kinds = {p.kind for parts in document.parts for p in parts}
        assert kinds == {"c"}  # none of it is stored as the task's own
    return path


@pytest.mark.parametrize(
    ("resident", "budget"),
    [("all", None), ("masks-on-host", None), ("stream", None), ("stream", 0)],
)
def test_fewer_rows_than_the_base(shrunk: Path, resident: Residency, budget: int | None) -> None:
    model = Words(300).to(DEVICE)
    options: dict[str, Any] = {"resident": resident, "budget": budget}
    with TaskSwitcher(model, shrunk, **options) as switcher:
        for rows in (280, 300, 310, 280, 310, 300):
            done = switcher.switch(str(rows))
            assert_is(model, shrunk, str(rows))
            assert model.embed.num_embeddings == rows and done.replaced == ("embed.weight",) * (
                (done.previous or "300") != str(rows)
            )
    with TaskSwitcher(model, shrunk, private="skip", **options) as switcher:
        before = bits(model.embed.weight.cpu())
        assert switcher.switch("280").skipped == ("embed.weight",)
        assert bits(model.embed.weight.cpu()) == before
        switcher.switch("300")
        assert_is(model, shrunk, "300")


def test_fewer_rows_under_codes_alone(shrunk: Path) -> None:
    model = Words(300).to(DEVICE)
    with TaskSwitcher(model, shrunk, fidelity="codes") as switcher, TallStore(shrunk) as opened:
        coded = opened.tasks["280"].code != "none"
        for task in ("280", "300", "280"):
            switcher.switch(task)
            assert_is(model, shrunk, task, **({"fidelity": "codes"} if coded else {}))


def test_the_model_is_what_is_wrong(shrunk: Path) -> None:
    """Where a task has the base's shape, a model of another shape is not taken for its head."""
    with pytest.raises(
        MismatchError, match=r"shape \[280, 40\] in the model, \[300, 40\] in the st"
    ):
        TaskSwitcher(Words(280).to(DEVICE), shrunk)
    with TaskSwitcher(Words(280).to(DEVICE), shrunk, tasks=["280"]) as switcher:
        switcher.switch("280")
        assert_is(switcher.model, shrunk, "280")
    state = Words(300).to(DEVICE).state_dict()
    with pytest.raises(MismatchError, match=r"\[280, 40\] in the task, and a dict of tensors"):
        TaskSwitcher(state, shrunk)


# -- ties ---------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self, *, tie: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(300, 8)
        self.out = torch.nn.Linear(8, 300, bias=False)
        if tie:
            self.out.weight = self.embed.weight


def moved(model: torch.nn.Module, seed: int) -> State:
    """The model's state, tied as it is, moved a little."""
    draw = torch.Generator().manual_seed(seed)
    done: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in done:
            done[tensor.data_ptr()] = tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
        state[name] = done[tensor.data_ptr()]
    return state


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    base = Tied()
    one = {name: t for name, t in moved(base, 1).items() if name == "embed.weight"}
    for number, tuned in enumerate((moved(base, 2), one)):  # both names, or one as files have it
        store = tmp_path / f"{number}.tall"
        given = {name: t for name, t in base.state_dict().items() if name in tuned}
        tallstore.pack(store, given, {"t": tuned})
        model = Tied().to(DEVICE)
        with TaskSwitcher(model, store) as switcher:
            switcher.switch("t")
        assert model.out.weight is model.embed.weight
        wanted = tallstore.load(store, task="t")["embed.weight"]
        assert bits(model.embed.weight.detach().cpu()) == bits(wanted)


def test_tied_in_the_store_alone(tmp_path: Path) -> None:
    base = Tied()
    store = tmp_path / "zoo.tall"
    tallstore.pack(store, base.state_dict(), {"t": moved(base, 2)})
    model = Tied(tie=False).to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        switcher.switch("t")
    wanted = bits(tallstore.load(store, task="t")["embed.weight"])
    assert (
        bits(model.embed.weight.detach().cpu()) == bits(model.out.weight.detach().cpu()) == wanted
    )


def test_tied_in_the_model_alone(tmp_path: Path) -> None:
    base = {name: t.clone() for name, t in Tied().state_dict().items()}
    same = {name: base["embed.weight"] + 0.5 for name in base}
    same = {name: t.clone() for name, t in same.items()}
    other = {name: t + n for n, (name, t) in enumerate(base.items(), 1)}
    store = tmp_path / "zoo.tall"
    tallstore.save(base, store)
    tallstore.add(store, {"same": same, "other": other})
    model = Tied().to(DEVICE)
    with TaskSwitcher(model, store, tasks=["same"]) as switcher:
        switcher.switch("same")
    assert bits(model.out.weight.detach().cpu()) == bits(same["out.weight"])
    with pytest.raises(MismatchError, match="ties 'embed"):
        TaskSwitcher(model, store)


def test_a_tied_embedding_that_grew(tmp_path: Path) -> None:
    base = Tied()
    more = moved(base, 3)
    longer = torch.cat([more["embed.weight"], torch.ones(20, 8)])
    grown = {"embed.weight": longer, "out.weight": longer}
    store = tmp_path / "zoo.tall"
    tallstore.pack(store, base.state_dict(), {"t": moved(base, 2), "grown": grown})
    model = Tied().to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        assert set(switcher.switch("grown").replaced) == {"embed.weight", "out.weight"}
        assert_is(model, store, "grown")
        assert model.out.weight is model.embed.weight and model.embed.num_embeddings == 320
        switcher.switch("t")
        assert_is(model, store, "t")
        assert model.out.weight is model.embed.weight and model.embed.num_embeddings == 300


def test_a_head_that_is_tied_to_another_shape(tmp_path: Path) -> None:
    base = {"head": torch.randn(5, 33), "other": torch.randn(5, 33), "big": torch.randn(99, 33)}
    path = tmp_path / "zoo.tall"
    task = {name: tensor + 1 for name, tensor in base.items()}
    tallstore.pack(path, base, {"a": {**task, "head": torch.randn(7, 33)}})
    model = torch.nn.Module()
    model.head = model.other = torch.nn.Parameter(torch.zeros(5, 33, device=DEVICE))
    model.big = torch.nn.Parameter(torch.zeros(99, 33, device=DEVICE))
    with pytest.raises(MismatchError, match=r"'other' is tied .* \[7, 33\] .* \[5, 33\]"):
        TaskSwitcher(model, path)
