"""Adding to a store that is there: like its own tasks, with a code, and back to the exact tier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded_zoo import CODES, coded_zoo, name_of
from naive_codes import NaiveTask
from safetensors.torch import save_file
from zoo import State, bits

import tallstore
from tallstore.appending import options_like
from tallstore.errors import (
    MismatchError,
    OptionError,
    TaskExistsError,
    TaskNameError,
    UnknownTaskError,
)

#: Signs, seeded, levels over nothing, auto.
APPENDED = [CODES[n] for n in (1, 5, 9, 19)]


def same(path: Path, name: str, task: State) -> bool:
    found = tallstore.load(path, task=name)
    return all(bits(found[key]) == bits(tensor) for key, tensor in task.items())


def streams_of(path: Path, *names: str) -> dict[tuple[str, int], bytes]:
    """Every byte that tasks and base have in a store."""
    found = {}
    with tallstore.open(path) as store:
        snapshot = store._snapshot
        for name in names:
            record = store.tasks[name] if name else store.base
            for number in (record.document, *record.streams):
                if number:
                    stream = snapshot.stream(number)
                    data = np.empty(stream.raw, np.uint8)
                    snapshot.read(stream, 0, data)
                    found[name, number] = data.tobytes()
    return found


def measured(base: State, task: State, found: State) -> float:
    keys = [key for key in base if base[key].dtype == torch.float32 and task[key].isfinite().all()]
    keys = [key for key in keys if base[key].shape == task[key].shape]
    error = sum(float((found[k] - task[k]).square().sum()) for k in keys)
    return (error / sum(float((task[k] - base[k]).square().sum()) for k in keys)) ** 0.5


@pytest.mark.parametrize("options", APPENDED, ids=name_of)
def test_like_the_store_s_own(tmp_path: Path, options: dict[str, Any]) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": tasks["x"]}, **options)
    before = streams_of(path, "", "x")
    remarks = tallstore.add(path, {"y": tasks["y"]})
    assert all("was asked for" in remark for remark in remarks)  # its tensors are small
    with tallstore.open(path) as store:
        x, y = store.tasks["x"], store.tasks["y"]
        assert (y.code, y.parameters, y.exact) == (x.code, x.parameters, False)
        assert store.verify().ok
    # Nothing of the other task, or of the base, was written again.
    assert streams_of(path, "", "x") == before
    assert {n: bits(t) for n, t in tallstore.load(path, task="y").items()} == NaiveTask(
        path, "y"
    ).tensors()
    if options.get("seed", 0) == 0:
        # As if it had been packed with the others: nothing else enters.
        tallstore.pack(tmp_path / "both.tall", base, tasks, **options)
        both, alone = (
            tallstore.load(tmp_path / "both.tall", task="y"),
            tallstore.load(path, task="y"),
        )
        assert all(bits(both[key]) == bits(alone[key]) for key in both)


@pytest.mark.parametrize("options", APPENDED, ids=name_of)
def test_with_a_code_and_the_exact_tier(tmp_path: Path, options: dict[str, Any]) -> None:
    base, tasks = coded_zoo(torch.bfloat16)
    path = tmp_path / "zoo.tall"
    tallstore.save(base, path)
    tallstore.add(path, tasks, exact=True, **options)
    for name, task in tasks.items():
        assert same(path, name, task)
        found = tallstore.load(path, task=name, fidelity="codes")
        assert {n: bits(t) for n, t in found.items()} == NaiveTask(path, name).tensors()


def test_a_store_of_masks_keeps_newcomers_as_differences(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": tasks["x"]})
    tallstore.add(path, {"y": tasks["y"]})
    with tallstore.open(path) as store:
        assert store.tasks["y"].kept_as == "exact" and store.format_version == 2
    assert same(path, "y", tasks["y"])


def test_tasks_that_differ_are_no_pattern(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": tasks["x"]}, code="signs")
    tallstore.add(path, {"y": tasks["y"]}, code="levels")
    tallstore.add(path, {"z": tasks["y"]})
    with tallstore.open(path) as store:
        assert [t.code for t in store.tasks.values()] == ["signs", "levels", "none"]


def test_what_a_record_says_for_people_may_be_anything(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    tallstore.pack(tmp_path / "zoo.tall", base, {"x": tasks["x"]}, code="signs", density=0.2)
    with tallstore.open(tmp_path / "zoo.tall") as store:
        catalog = store._catalog
    record = catalog.tasks["x"]
    odd = {"density": 0.2, "keep": 0.9, "rotation": [1, {"by": 2}]}
    found = options_like(replace(catalog, tasks={"x": replace(record, parameters=odd)}))
    assert found is not None and (found.code, found.density, found.keep) == ("signs", 0.2, None)
    bad = replace(record, parameters={"density": [1]})
    with pytest.raises(OptionError, match="density"):
        options_like(replace(catalog, tasks={"x": bad}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1}, "density=0.1: it goes with a code"),
        ({"bits": 2}, "bits=2: it goes with a code"),
        ({"bits_per_weight": 0.1}, "bits_per_weight=0.1: it goes with a code"),
        ({"max_error": 0.1}, "max_error=0.1: it goes with a code"),
        ({"gain": "ls"}, "gain='ls': it goes with a code"),
        ({"over": "shared"}, "over='shared': it goes with a code"),
        ({"code": "exact", "density": 0.1}, "density=0.1: it goes with a code"),
        ({"code": "exact", "exact": False}, "keeps nothing"),
        ({"code": "signs", "density": 2.0}, "density=2.0"),
        ({"code": "signs", "originals": {"x": {}}}, "originals"),
        ({"code": "levels", "over": "shared"}, "the store's vector is none"),
        ({"code": "auto", "bits_per_weight": 0.001}, "at least"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.save(base, path)
    before = path.read_bytes()
    with pytest.raises(OptionError, match=message):
        tallstore.add(path, {"x": tasks["x"]}, **options)
    assert path.read_bytes() == before


def test_names_that_are_taken_or_none(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": tasks["x"]}, code="signs")
    with pytest.raises(TaskExistsError, match="overwrite"):
        tallstore.add(path, {"x": tasks["y"]}, code="signs")
    with pytest.raises(TaskNameError):
        tallstore.add(path, {"a/b": tasks["y"]}, code="signs")
    tallstore.add(path, {"x": tasks["y"]}, code="levels", overwrite=True)
    with tallstore.open(path) as store:
        assert store.tasks["x"].code == "levels"
        assert list(store.load("x")) == list(tasks["y"])


# -- a profile that is frozen -------------------------------------------------------------


def test_a_profile_that_serves_badly_gets_more_bits(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, code="levels", bits=2, over="shared")
    draw = torch.Generator().manual_seed(8)
    alike = dict(tasks["x"])
    alike["embed"] = alike["embed"][:280].clone()
    far = {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=draw) ** 3
        if tensor.dtype == torch.float32
        else tensor.clone()
        for key, tensor in base.items()
    }
    assert tallstore.add(path, {"alike": alike}) == []
    (note,) = tallstore.add(path, {"far": far})
    assert note.startswith("far: the stored profile was made without it and serves it badly")
    with tallstore.open(path) as store:
        records = store.tasks
        assert (records["alike"].bits, records["x"].bits) == (2, 2)
        assert records["far"].bits > 2 and records["far"].parameters is not None
        assert records["far"].parameters["bits"] == records["far"].bits
        assert store.vector is not None and store.vector.tasks == ("x", "y")
        error = measured(base, far, store.load("far"))
        assert records["far"].relative_error == pytest.approx(error, rel=0.01)
        assert f"{records['far'].relative_error:.2f}" in note


# -- the paper's masks --------------------------------------------------------------------


def test_masks_are_made_anew_from_originals_or_exact_tiers(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    first, both = tmp_path / "first.tall", tmp_path / "both.tall"
    tallstore.pack(both, base, tasks)
    for exact in (False, True):
        tallstore.pack(first, base, {"x": tasks["x"]}, exact=exact, overwrite=True)
        before = first.read_bytes()
        if not exact:
            with pytest.raises(OptionError, match=r"'x' there are codes alone.*--original"):
                tallstore.add(first, {"y": tasks["y"]}, code="tall")
            assert first.read_bytes() == before
        originals = None if exact else {"x": tasks["x"]}
        tallstore.add(first, {"y": tasks["y"]}, code="tall", originals=originals)
        for name in tasks:
            one = tallstore.load(first, task=name, fidelity="codes")
            other = tallstore.load(both, task=name)
            # Other dtypes have no codes: without the exact tier they are the base's.
            keys = [k for k in one if k not in ("double", "ids")]
            assert all(bits(one[key]) == bits(other[key]) for key in keys)
        with tallstore.open(first) as store:
            assert store.vector is not None and store.vector.tasks == ("x", "y")
            assert [task.exact for task in store.tasks.values()] == [exact, exact]


def test_masks_anew_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": tasks["x"]})
    before = path.read_bytes()
    with pytest.raises(UnknownTaskError, match="'nobody'"):
        tallstore.add(path, {"y": tasks["y"]}, code="tall", originals={"nobody": tasks["x"]})
    with pytest.raises(TaskExistsError):
        tallstore.add(path, {"x": tasks["y"]}, code="tall", originals={"x": tasks["x"]})
    assert path.read_bytes() == before


# -- the exact tier, back -----------------------------------------------------------------


@pytest.mark.parametrize("options", [CODES[n] for n in (0, 1, 5, 13, 19)], ids=name_of)
def test_the_exact_tier_comes_back_from_the_original(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, **options)
    codes = tallstore.load(path, task="x")
    others = streams_of(path, "", "y")
    # Another checkpoint: other weights; the same but for a head; for what never moved.
    x = tasks["x"]
    draw = torch.Generator().manual_seed(4)
    far = {
        k: t + 0.02 * torch.randn(t.shape, generator=draw) if k == "d" else t for k, t in x.items()
    }
    for wrong in (
        tasks["y"],
        far,
        {**x, "head": x["head"] + 1},
        {**x, "still": x["still"] + 1},
        {**x, "more": torch.zeros(3)},
    ):
        with pytest.raises(MismatchError, match=r"made from|coded from|made of"):
            tallstore.add(path, {"x": wrong}, exact=True)
    tallstore.add(path, {"x": x}, exact=True)
    assert same(path, "x", x)
    again = tallstore.load(path, task="x", fidelity="codes")
    assert all(bits(again[key]) == bits(codes[key]) for key in codes)
    assert streams_of(path, "", "y") == others
    with tallstore.open(path) as store:
        assert store.tasks["x"].exact and not store.tasks["y"].exact
        assert store.verify().ok
    with pytest.raises(TaskExistsError):
        tallstore.add(path, {"x": x}, exact=True)
    # The same weights in a file, where they stand in another order.
    copy = tmp_path / "y.safetensors"
    save_file({key: tasks["y"][key] for key in reversed(tasks["y"])}, copy)
    tallstore.add(path, {"y": str(copy)}, exact=True)
    assert same(path, "y", tasks["y"])
