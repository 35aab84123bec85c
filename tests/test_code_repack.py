"""Coding a whole store anew, and dropping exact tiers: all or nothing, never from codes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coded_zoo import CODES, coded_zoo, name_of
from zoo import State, bits

import tallstore
from tallstore.errors import (
    MismatchError,
    OptionError,
    StoreExistsError,
    TaskExistsError,
    UnknownTaskError,
)

few = pytest.mark.parametrize("options", [CODES[n] for n in (0, 1, 5, 13, 19)], ids=name_of)


def as_bytes(state: State, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in state.items() if name not in but}


def kept(path: Path) -> dict[str, tuple[str, bool]]:
    with tallstore.open(path) as store:
        assert store.verify().ok
        return {name: (task.code, task.exact) for name, task in store.tasks.items()}


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    base, tasks = coded_zoo()
    path = tmp_path / "exact.tall"
    tallstore.pack(path, base, tasks, exact=True)
    return path


@few
def test_in_place_from_exact_tiers(tmp_path: Path, exact: Path, options: dict[str, Any]) -> None:
    base, tasks = coded_zoo()
    fresh = tmp_path / "fresh.tall"
    tallstore.pack(fresh, base, tasks, exact=True, **options)
    remarks = tallstore.repack(exact, **options)
    # Of masks, and of tensors that are small.
    assert all("smaller and closer" in one or "was asked for" in one for one in remarks)
    assert kept(exact) == dict.fromkeys(tasks, (options["code"], True))
    assert as_bytes(tallstore.load(exact)) == as_bytes(base)
    for name, task in tasks.items():
        assert as_bytes(tallstore.load(exact, task=name)) == as_bytes(task)
        one, other = (tallstore.load(p, task=name, fidelity="codes") for p in (exact, fresh))
        assert as_bytes(one) == as_bytes(other)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@few
def test_to_another_path_without_exact_tiers(
    tmp_path: Path, exact: Path, options: dict[str, Any]
) -> None:
    base, tasks = coded_zoo()
    before = exact.read_bytes()
    out, fresh = tmp_path / "out.tall", tmp_path / "fresh.tall"
    tallstore.pack(fresh, base, tasks, **options)
    tallstore.repack(exact, out, exact=False, **options)
    assert exact.read_bytes() == before
    assert kept(out) == dict.fromkeys(tasks, (options["code"], False))
    for name in tasks:
        one, other = (tallstore.load(p, task=name) for p in (out, fresh))
        assert as_bytes(one) == as_bytes(other)
    with pytest.raises(StoreExistsError):
        tallstore.repack(exact, out, **options)
    tallstore.repack(exact, out, overwrite=True, **options)
    assert kept(out) == dict.fromkeys(tasks, (options["code"], True))


def test_codes_alone_are_never_coded_again(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, code="signs")
    tallstore.add(path, {"whole": tasks["x"]}, code="exact")
    before = path.read_bytes()
    with pytest.raises(OptionError, match=r"of 'x', 'y' there are codes alone.*--original"):
        tallstore.repack(path, code="levels")
    with pytest.raises(OptionError, match=r"of 'y' there are codes alone"):
        tallstore.repack(path, code="levels", originals={"x": tasks["x"]})
    with pytest.raises(UnknownTaskError, match="'nobody'"):
        tallstore.repack(path, code="levels", originals={"nobody": tasks["x"]})
    assert path.read_bytes() == before
    tallstore.repack(path, code="levels", originals=tasks)
    assert kept(path) == {n: ("levels", False) for n in ("x", "y", "whole")}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("options", [{"code": "signs"}, {"code": "tall"}], ids=name_of)
def test_only_the_original_stands_in_for_a_task(
    tmp_path: Path, options: dict[str, Any], exact: bool
) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, exact=exact, **options)
    before = path.read_bytes()
    one = {name: tensor.clone() for name, tensor in tasks["x"].items()}
    one["b"][3, 5] += 1
    none = {**one, "b": one["b"].clone().fill_(torch.nan)}
    for other in (one, none, tasks["y"], {**tasks["x"], "more": torch.ones(2)}):
        with pytest.raises(MismatchError, match="name of its own"):
            tallstore.repack(path, code="levels", originals={**tasks, "x": other})
        assert path.read_bytes() == before
    remarks = tallstore.repack(path, code="levels", originals=tasks)
    assert not any("original" in remark for remark in remarks)
    assert kept(path) == dict.fromkeys(tasks, ("levels", exact))


def test_the_vector_stays_as_it_is(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    ways: list[tuple[dict[str, Any], dict[str, Any], tuple[str, str]]] = [
        ({"merge": "ties", "vector_dtype": "int8"}, {}, ("ties", "int8")),
        ({"merge": "ta", "vector_dtype": "float16"}, {"vector_dtype": "int4"}, ("ta", "int4")),
        ({"merge": "ta"}, {"merge": "ties"}, ("ties", "bfloat16")),
        (
            {"code": "levels", "over": "shared", "vector_dtype": "int4"},
            {"code": "levels", "over": "shared", "bits": 3},
            ("profile", "uint4"),
        ),
        ({"vector_dtype": "int8"}, {"code": "levels", "over": "shared"}, ("profile", "uint8")),
    ]
    for packed, again, (rule, dtype) in ways:
        tallstore.pack(path, base, tasks, exact=True, overwrite=True, **packed)
        tallstore.repack(path, **again)
        with tallstore.open(path) as store:
            assert store.vector is not None
            assert (store.vector.rule, store.vector.dtype) == (rule, dtype)
            assert all(as_bytes(store.load(n)) == as_bytes(task) for n, task in tasks.items())
    tallstore.repack(path, code="signs")
    with tallstore.open(path) as store:
        assert store.vector is None


def test_a_base_in_another_store(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    home, path = tmp_path / "home.tall", tmp_path / "zoo.tall"
    tallstore.save(base, home)
    tallstore.pack(path, None, tasks, external_base=home, code="signs", exact=True)
    (tmp_path / "below").mkdir()
    out = tmp_path / "below" / "out.tall"
    tallstore.repack(path, out, code="levels")
    tallstore.repack(path, code="levels")
    for place in (path, out):
        with tallstore.open(place) as store:
            assert store.external_base == home
            assert all(as_bytes(store.load(n)) == as_bytes(task) for n, task in tasks.items())


@pytest.mark.parametrize("failure", [RuntimeError("disk"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("when", ["evaluate", "tallstore.packing.newstore.encode_tasks",
                                  "tallstore.engine.newfile.NewFile.publish"])  # fmt: skip
def test_a_failure_leaves_the_store_as_it_was(
    tmp_path: Path,
    exact: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    when: str,
) -> None:
    def fail(*args: object, **options: object) -> float:
        raise failure

    before = exact.read_bytes()
    evaluate = fail if when == "evaluate" else None
    if evaluate is None:
        monkeypatch.setattr(when, fail)
    wanted = OptionError if evaluate and isinstance(failure, RuntimeError) else type(failure)
    with pytest.raises(wanted):
        tallstore.repack(exact, code="signs", evaluate=evaluate)
    monkeypatch.undo()
    assert exact.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    tallstore.repack(exact, code="signs")  # the lock was given back
    assert kept(exact) == dict.fromkeys("xy", ("signs", True))


def test_an_open_reader_goes_on_with_what_it_opened(exact: Path) -> None:
    _, tasks = coded_zoo()
    with tallstore.open(exact) as reader:
        with pytest.raises(tallstore.TallstoreError, match=r"(?i)open|reader|lock"):
            tallstore.repack(exact, code="signs", timeout=0.2)
        assert as_bytes(reader.load("x")) == as_bytes(tasks["x"])
    tallstore.repack(exact, code="signs")
    assert kept(exact) == dict.fromkeys("xy", ("signs", True))


# -- strip --------------------------------------------------------------------------------


@few
def test_strip_leaves_what_packing_without_leaves(tmp_path: Path, options: dict[str, Any]) -> None:
    base, tasks = coded_zoo()
    path, plain = tmp_path / "zoo.tall", tmp_path / "plain.tall"
    tallstore.pack(plain, base, tasks, **options)
    tallstore.pack(path, base, tasks, exact=True, **options)
    with tallstore.open(path) as store:
        before = store.stored_bytes("x")
    assert tallstore.strip(path, ["x"]) == ["x"]
    code = options["code"]
    assert kept(path) == {"x": (code, False), "y": (code, True)}
    assert as_bytes(tallstore.load(path, task="y")) == as_bytes(tasks["y"])
    assert tallstore.strip(path) == ["y"]
    for name in tasks:
        found, wanted = tallstore.load(path, task=name), tallstore.load(plain, task=name)
        assert as_bytes(found) == as_bytes(wanted)
    with tallstore.open(path) as store, tallstore.open(plain) as other:
        assert store.stored_bytes("x") < before
        for name, task in store.tasks.items():
            # Sums of floats in another order.
            assert task.relative_error == pytest.approx(other.tasks[name].relative_error)
    with pytest.raises(OptionError, match="nothing to strip"):
        tallstore.strip(path)
    with pytest.raises(OptionError, match="no exact tier"):
        tallstore.strip(path, ["x"])


def test_strip_refuses_what_would_leave_nothing(tmp_path: Path) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": tasks["x"]}, code="signs", exact=True)
    tallstore.add(path, {"y": tasks["y"]}, code="exact")
    before = path.read_bytes()
    with pytest.raises(OptionError, match="'y' has no codes"):
        tallstore.strip(path, ["x", "y"])
    with pytest.raises(UnknownTaskError, match="'z'"):
        tallstore.strip(path, ["z"])
    with pytest.raises(OptionError, match="list of names"):
        tallstore.strip(path, "x")  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert tallstore.strip(path) == ["x"]
    assert as_bytes(tallstore.load(path, task="y")) == as_bytes(tasks["y"])
    assert torch.equal(tallstore.load(path, task="x")["head"], tasks["x"]["head"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"code": "tall"},
        {"code": "signs"},
        {"code": "seeded"},
        {"code": "levels", "bits": 1, "over": "shared"},
        {"code": "levels", "bits": 4, "over": "shared", "vector_dtype": "int4"},
        {"code": "auto", "bits_per_weight": 0.3},
        {"code": "auto", "max_error": 0.5},
    ],
    ids=name_of,
)
def test_originals_that_hardly_moved(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """By about what their dtype resolves: rounded weights err by other amounts than codes."""
    draw = torch.Generator().manual_seed(0)
    base = {n: (0.05 * torch.randn(96, 128, generator=draw)).to(dtype) for n in "abc"}
    step = {torch.bfloat16: 3e-5, torch.float16: 1e-5, torch.float32: 3e-9}[dtype]
    tasks = {
        name: {
            n: (t.float() + step * torch.randn(t.shape, generator=draw)).to(dtype)
            for n, t in base.items()
        }
        for name in ("x", "y")
    }
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, **options)
    for name in tasks:
        tallstore.add(path, {name: tasks[name]}, exact=True)
    tallstore.strip(path)
    with pytest.raises(MismatchError, match="name of its own"):
        tallstore.repack(path, code="levels", originals={"x": tasks["y"], "y": tasks["x"]})
    tallstore.repack(path, code="levels", originals=tasks)
    assert kept(path) == dict.fromkeys(tasks, ("levels", False))


def test_what_an_original_has_otherwise(tmp_path: Path, exact: Path) -> None:
    _, tasks = coded_zoo()
    one = dict(tasks["x"])
    for other, said in (
        (
            {n: t for n, t in one.items() if n != "b"},
            "it has no tensor 'b', or has it tied to another",
        ),
        ({**one, "more": torch.ones(2)}, "it has a tensor 'more' of its own"),
        ({**one, "b": one["b"].half()}, r"its 'b' is float16 \[33, 65\]"),
    ):
        with pytest.raises(MismatchError, match=f"{said}, other than task 'x'"):
            tallstore.repack(exact, code="levels", originals={"x": other})
    turned = {**one, "a": one["a"].t().contiguous().t()}
    with pytest.raises(MismatchError, match="tied, or laid out otherwise; give it in the form"):
        tallstore.repack(exact, code="levels", originals={"x": turned})


@pytest.mark.parametrize("tied", [True, False])
def test_an_original_with_other_ties(tmp_path: Path, tied: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    path, base = tmp_path / "zoo.tall", torch.randn(60, 40, generator=draw)
    task = base + 0.1 * torch.randn(60, 40, generator=draw)
    forms = [{"in": task, "out": task}, {"in": task, "out": task.clone()}]
    one, other = forms if tied else forms[::-1]
    tallstore.pack(path, {"in": base, "out": base.clone()}, {"x": one}, code="signs")
    with pytest.raises(MismatchError, match=r"tied to another|of its own, other than"):
        tallstore.repack(path, code="levels", originals={"x": other})
    with pytest.raises(MismatchError, match=r"tied to another|of its own, other than"):
        tallstore.add(path, {"x": other}, exact=True)
    tallstore.repack(path, code="levels", originals={"x": one})


def test_a_task_is_replaced_among_masks(tmp_path: Path, exact: Path) -> None:
    _, tasks = coded_zoo()
    other = {name: t * 1.5 if t.is_floating_point() else t for name, t in tasks["x"].items()}
    with pytest.raises(TaskExistsError, match="'x' already"):
        tallstore.add(exact, {"x": other}, code="tall", exact=True)
    tallstore.add(exact, {"x": other}, code="tall", exact=True, overwrite=True)
    assert kept(exact) == dict.fromkeys(tasks, ("tall", True))
    found = tallstore.load(exact, task="x")
    assert as_bytes(found) == as_bytes(other)


def test_exact_tiers_of_those_that_have_none(exact: Path) -> None:
    _, tasks = coded_zoo()
    tallstore.strip(exact, ["x"])
    assert tallstore.add(exact, tasks, exact=True) == ["y: has its exact tier already"]
    assert kept(exact) == dict.fromkeys(tasks, ("tall", True))
