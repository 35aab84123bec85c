"""Every code that a store can have is served, bit for bit, in the form that is kept in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_helpers import DEVICE
from serving_helpers import Net, assert_is, loops
from zoo import bits, fine_tune, make_base

import tallstore
from tallstore.ops import SeededCode, SparseCode
from tallstore.serving import TaskSwitcher
from tallstore.serving.forms import PlanesForm, SparseForm

__all__ = ["loops"]  # a fixture

pytestmark = pytest.mark.usefixtures("loops")

BASE = {**make_base(), "wide": torch.randn(60, 200, generator=torch.Generator().manual_seed(1))}


def make(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    base = {k: v.to(dtype) if v.is_floating_point() else v for k, v in BASE.items()}
    tuned = {name: fine_tune(base, n) for n, name in enumerate("abc")}
    tuned["a"]["positions"] = torch.arange(11) * 2
    tallstore.pack(path, base, tuned, **options)
    return base


def forms(switcher: TaskSwitcher) -> Counter[type]:
    """How many arenas have planes, and how many tensors which compact form."""
    found: Counter[type] = Counter()
    for task in switcher.tasks:
        for form in switcher._stock.take(task).code.forms:
            if isinstance(form, SparseForm):
                found.update(type(code) for code, _, _ in form.runs)
            elif isinstance(form, PlanesForm):
                found[type(form)] += 1
    return found


CODES: dict[str, tuple[dict[str, Any], set[type]]] = {
    "tall": ({}, {PlanesForm}),
    "signs": ({"code": "signs"}, {SparseCode}),
    "seeded": ({"code": "seeded"}, {SparseCode if DEVICE == "cpu" else SeededCode}),
    "much seeded": ({"code": "seeded", "density": 0.8}, {SeededCode}),
    "levels": ({"code": "levels"}, {PlanesForm}),
    "int8 vector": ({"vector_dtype": "int8"}, {PlanesForm}),
    "int4 vector": ({"vector_dtype": "int4"}, {PlanesForm}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CODES)
def test_it_is_what_load_gives(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    options, kinds = CODES[name]
    store = tmp_path / "zoo.tall"
    base = make(store, dtype, **options)
    model = Net(base).to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        assert set(forms(switcher)) == kinds
        need = switcher.need()
        held = switcher._stock.codes.nbytes()
        assert held == pytest.approx(need.codes, rel=0.01)
        if kinds != {PlanesForm}:
            assert need.vector == 0  # nobody uses it
        for task in "abcba":
            switcher.switch(task)
            assert_is(model, store, task)


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels hash as they go")
def test_a_budget_that_has_no_room_for_places(tmp_path: Path) -> None:
    store, wide = tmp_path / "zoo.tall", torch.randn(500, 400)
    base = {"wide": wide}
    tasks = {name: {"wide": wide + torch.randn(500, 400) / 50} for name in "ab"}
    tallstore.pack(store, base, tasks, code="seeded")
    model = {"wide": wide.clone()}
    with TaskSwitcher(model, store) as switcher:
        located = switcher.need().codes
        assert set(forms(switcher)) == {SparseCode}
    with TaskSwitcher(model, store, budget=located - 1) as switcher:
        assert set(forms(switcher)) == {SeededCode} and switcher.need().codes < located / 2
        for task in "aba":
            switcher.switch(task)
            assert bits(model["wide"]) == bits(tallstore.load(store, task=task)["wide"])


def test_codes_of_all_kinds_in_turn(tmp_path: Path) -> None:
    """From a sparse code to planes and back, to the base and to other sparse codes."""
    store = tmp_path / "zoo.tall"
    base = make(store)
    for number, code in enumerate(("signs", "seeded", "levels", "signs"), 10):
        tallstore.add(store, {f"{code} {number}": fine_tune(base, number)}, code=code)
    frozen = fine_tune(base, 20)
    frozen["wide"] = base["wide"].clone()
    tallstore.add(store, {"frozen": frozen}, code="signs")
    tallstore.add(store, {"exact": fine_tune(base, 21)})
    model = Net(base).to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        order = torch.randperm(60, generator=torch.Generator().manual_seed(0)) % len(switcher.tasks)
        for number in order.tolist():
            task = switcher.tasks[number]
            switcher.switch(task)
            assert_is(model, store, task)


def test_going_from_sparse_to_sparse_touches_little(tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    base = make(store, code="signs")
    model = Net(base).to(DEVICE)
    with TaskSwitcher(model, store) as switcher:
        whole = switcher.switch("b").moved
        assert switcher.switch("c").moved < whole / 4
        with torch.no_grad():
            model.wide.zero_()
        assert switcher.switch("b", rewrite=True).moved == whole
        assert_is(model, store, "b")


def test_sparse_codes_within_a_budget(tmp_path: Path) -> None:
    """What the live task touched is not known any more once its code is gone."""
    store = tmp_path / "zoo.tall"
    base = make(store, code="signs")
    model = Net(base).to(DEVICE)
    largest = TaskSwitcher(model, store).need().largest
    with TaskSwitcher(model, store, resident="masks-on-host", budget=largest + 100) as switcher:
        for task in "abcab":
            assert switcher.switch(task).source == "host"
            assert_is(model, store, task)
            assert switcher._stock.codes.nbytes() <= largest + 100


@pytest.mark.parametrize("code", ["tall", "signs"])
def test_weights_that_were_moved(tmp_path: Path, code: str) -> None:
    """`share_memory` moves what a storage holds: no address is good after it."""
    base = make_base()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {n: fine_tune(base, k) for k, n in enumerate("ab")}, code=code)
    model = Net(base)
    with TaskSwitcher(model, path) as switcher:
        for task in "ab":
            switcher.switch(task)
        model.share_memory()
        for task in "abab":
            switcher.switch(task, rewrite=True)
            assert_is(model, path, task)


@pytest.mark.parametrize("code", ["tall", "signs", "seeded"])
def test_a_view_of_coded_weights(tmp_path: Path, code: str) -> None:
    draw = torch.Generator().manual_seed(3)

    def joined(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"qkv": rows, "q": rows[:1000]}

    base = torch.randn(3000, 64, generator=draw)
    tasks = {n: joined(base + 0.01 * torch.randn(3000, 64, generator=draw)) for n in "ab"}
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, joined(base), tasks, code=code)
    wanted = {task: tallstore.load(path, task=task) for task in tasks}
    model = joined(torch.zeros(3000, 64))
    with TaskSwitcher(model, path) as switcher:
        for n in range(20):
            task = "ab"[n % 2]
            switcher.switch(task)
            assert all(torch.equal(model[key], wanted[task][key]) for key in model)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("code", ["tall", "signs", "seeded"])
def test_tied_in_the_model_and_listed_in_any_order(tmp_path: Path, code: str, frozen: bool) -> None:
    """One memory is over one of the base's tensors in a task, and over another in the next."""
    draw = torch.Generator().manual_seed(3)

    def drawn(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(300, 64, generator=draw)

    base = {"p": drawn(), "q": drawn(), "o": drawn()}
    first, second = (base[n] if frozen else base[n] + drawn(0.01) for n in "pq")
    tasks = {
        "a": {"p": first, "q": first, "o": base["o"] + drawn(0.01)},
        "b": {"q": second, "p": second, "o": base["o"] + drawn(0.01)},
    }
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, code=code)
    wanted = {task: tallstore.load(path, task=task) for task in tasks}
    tied = torch.zeros(300, 64)
    model = {"p": tied, "q": tied, "o": torch.zeros(300, 64)}
    with TaskSwitcher(model, path) as switcher:
        for task in "abaab":
            switcher.switch(task)
            assert all(torch.equal(model[key], wanted[task][key]) for key in model)
