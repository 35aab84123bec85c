"""A store whose base is in another store: no other base ever serves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from external_helpers import Stores, absent, identity, made, refusing, stores, wrong
from helpers import assert_same
from stored import damaged, rewrite_body, values
from zoo import fine_tune, make_base

import tallstore
from tallstore.engine.keys import chunk_key
from tallstore.errors import (
    ChecksumError,
    MismatchError,
    NotAStoreError,
    OptionError,
    StoreNotFoundError,
    TallstoreError,
    WrongBaseError,
)
from tallstore.repairing import repair_store

__all__ = ["made", "stores"]  # fixtures


# -- the wrong one ------------------------------------------------------------------------


def every_use(stores: Stores, out: Path) -> dict[str, Callable[[], object]]:
    """What needs the base's elements."""
    path = stores.path
    like = {name: torch.zeros_like(tensor) for name, tensor in stores.tasks["one"].items()}

    def with_open(use: Callable[[tallstore.TallStore], object]) -> Callable[[], object]:
        def call() -> object:
            with tallstore.open(path) as store:
                return use(store)

        return call

    def packing() -> object:
        return tallstore.pack(out / "p.tall", stores.base, {"x": f"{path}::one"}, exact=True)

    return {
        "load": lambda: tallstore.load(path, task="one"),
        "load the base": lambda: tallstore.load(path),
        "names": lambda: tallstore.load(path, task="one", names=["norm.weight"]),
        "out": lambda: tallstore.load(path, task="one", out=like),
        "unpack": with_open(lambda store: store.unpack("one", out / "o.safetensors")),
        "unpack the base": with_open(lambda store: store.unpack(None, out / "o")),
        "statistics": with_open(lambda store: store.statistics(cosine=True)),
        "source": with_open(lambda store: store.source("one")),
        "add": lambda: tallstore.add(path, {"new": stores.first}),
        "save": lambda: tallstore.save(stores.first, path, task="new"),
        "pack from": packing,
    }


def lose(stores: Stores) -> None:
    stores.base_path.unlink()


def change(stores: Stores) -> None:
    """Another base at that place, its tasks overwritten."""
    tallstore.save(stores.first, stores.base_path, overwrite=True)


def mistake(stores: Stores) -> None:
    stores.base_path.write_text("a diary, no store")


@pytest.mark.parametrize(
    ("harm", "kind"),
    [(lose, StoreNotFoundError), (change, WrongBaseError), (mistake, NotAStoreError)],
)
def test_without_its_base_every_use_is_refused_and_listing_is_not(
    stores: Stores, tmp_path: Path, harm: Callable[[Stores], None], kind: type[TallstoreError]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    wanted = identity(stores.base_path)
    before = stores.path.read_bytes()
    harm(stores)
    for what, use in every_use(stores, out).items():
        with refusing(kind, f"{stores.path}: needs base {wanted}", stores.base_path):
            use()
            pytest.fail(f"{what} went on without the base")
    assert list(out.iterdir()) == []
    assert stores.path.read_bytes() == before
    with tallstore.open(stores.path) as store:
        (problem,) = store.verify().problems
        assert problem.owners == ("external base",) and wanted in problem.message
        assert list(store.tasks) == ["one", "two"]
        assert len(store.tensors("two")) == len(stores.tasks["two"])
        assert store.segment_stats("one") and store.stored_bytes("one")
    with tallstore.open(stores.path, "a") as store:
        store.remove("two")  # takes no weights
    tallstore.compact(stores.path)


def test_a_changed_base_is_named_beside_the_one_that_is_needed(stores: Stores) -> None:
    change(stores)
    with wrong(stores.path, stores.base_path):
        tallstore.load(stores.path, task="one")


def test_another_base_is_not_taken_for_it(stores: Stores, tmp_path: Path) -> None:
    """One bit of one weight is another base."""
    other = {name: tensor.clone() for name, tensor in stores.base.items()}
    other["norm.weight"].view(torch.int32)[3] ^= 1
    tallstore.save(other, tmp_path / "other.tall")
    with wrong(stores.path, tmp_path / "other.tall"):
        tallstore.load(stores.path, task="one", external_base=tmp_path / "other.tall")
    before = stores.path.read_bytes()
    with wrong(stores.path, tmp_path / "other.tall"):
        tallstore.relink(stores.path, tmp_path / "other.tall")
    assert stores.path.read_bytes() == before
    stores.check()


def test_the_matrix_of_bases_and_tasks(stores: Stores, tmp_path: Path) -> None:
    """A task is read with the base it was written against, and with no other."""
    bases = {"a": stores.base_path, "b": tmp_path / "b.tall", "c": tmp_path / "c.tall"}
    weights = {"a": stores.base, "b": make_base(1), "c": make_base(2)}
    for name in ("b", "c"):
        tallstore.save(weights[name], bases[name])
    read = 0
    for own, state in weights.items():
        tuned = fine_tune(state, 3)
        path = tmp_path / f"zoo {own}.tall"
        tallstore.pack(path, None, {"t": tuned}, exact=True, external_base=bases[own])
        for given, place in bases.items():
            if given == own:
                assert_same(tallstore.load(path, task="t", external_base=place), tuned)
                read += 1
            else:
                with wrong(path, place):
                    tallstore.load(path, task="t", external_base=place)
    assert read == 3
    with pytest.raises(MismatchError):  # nor is a fine-tune of another shape packed against it
        tallstore.pack(
            tmp_path / "no.tall", None, {"t": {"w": torch.ones(3)}}, external_base=bases["a"]
        )


def test_a_task_record_of_another_base_is_refused(stores: Stores) -> None:
    """Should the catalog itself be at odds."""

    def other(body: dict[str, Any]) -> None:
        body["tasks"]["one"]["base"] = "0" * 64

    rewrite_body(stores.path, other)
    with pytest.raises(WrongBaseError, match="written against base 0000000000000000"):
        tallstore.load(stores.path, task="one")
    assert_same(tallstore.load(stores.path, task="two"), stores.tasks["two"])


def test_damage_in_the_base_is_found_by_every_load_and_by_verify(stores: Stores) -> None:
    with tallstore.open(stores.base_path) as store:
        stream = store.describe().base.streams[0]
    value = values(stores.base_path)[chunk_key(stream, 0)]
    stores.base_path.write_bytes(damaged(stores.base_path.read_bytes(), value, 500, 3))
    for task in (None, "one"):
        with pytest.raises(ChecksumError, match=f"{stores.base_path}: stream {stream}, chunk 0"):
            tallstore.load(stores.path, task=task)
    with tallstore.open(stores.path) as store:
        found = store.verify()
        (problem,) = found.problems
        assert problem.owners == ("external base",) and str(stores.base_path) in problem.message
        assert found.external is not None and found.external.path == stores.base_path


def test_verify_tells_whom_damage_concerns(stores: Stores) -> None:
    """Streams of the two stores have the same numbers: they are not mixed up."""
    with tallstore.open(stores.base_path) as store:
        there = store.describe().base.streams[0]
    with tallstore.open(stores.path) as store:
        document = store.describe("one").task
        assert document is not None
        planes, exact = document.codes[0].planes, document.codes[0].exact
        floats = [t.name for t in store.tensors("one") if t.dtype == "float32"]
        own = [t.name for t in store.tensors("two") if t.name == "head.weight"]
    whole = stores.base_path.read_bytes()
    value = values(stores.base_path)[chunk_key(there, 0)]
    stores.base_path.write_bytes(damaged(whole, value, 500, 3))
    with tallstore.open(stores.path) as store:
        found = store.verify()
    assert set(found.tasks) == {"one", "two"} and found.base is not None
    assert found.tasks["one"].roles == found.base.roles == {"external base"}
    assert set(found.tasks["one"].tensors) == set(floats)
    assert own and set(found.tasks["two"].tensors) == set(floats) - set(own)
    stores.base_path.write_bytes(whole)
    whole = stores.path.read_bytes()
    for stream, roles in ((exact, {"residual"}), (planes, set())):
        assert stream is not None
        value = values(stores.path)[chunk_key(stream, 0)]
        stores.path.write_bytes(damaged(whole, value, 60, 3))
        with tallstore.open(stores.path) as store:
            found = store.verify()
        assert [problem.owners for problem in found.problems] == [("task 'one'",)]
        assert found.base is None
        # The exact tier does without the mask: the task loads.
        assert {n: d.roles for n, d in found.tasks.items()} == ({"one": roles} if roles else {})
        stores.path.write_bytes(whole)


def test_repairing(stores: Stores, tmp_path: Path) -> None:
    """Its own chunks are saved; the base is not its to repair, but has to be there."""
    with tallstore.open(stores.path) as store:
        document = store.describe("one").task
        assert document is not None and document.codes[0].exact is not None
        lost = document.codes[0].exact
    value = values(stores.path)[chunk_key(lost, 0)]
    stores.path.write_bytes(damaged(stores.path.read_bytes(), value, 60, 3))
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "repaired.tall"
    done = repair_store(stores.path, out=out)
    assert done.whole == ("two",) and set(done.lossy) == {"one"} and not done.lost
    with tallstore.open(out) as store:
        assert store.verify().ok and store.external_base == stores.base_path
        assert store.base.external == "../base.tall"
        assert_same(store.load("two"), stores.tasks["two"])
    moved = shutil.move(stores.base_path, tmp_path / "moved.tall")
    before = stores.path.read_bytes()
    with absent(stores.path, stores.base_path):
        repair_store(stores.path)
    assert stores.path.read_bytes() == before
    shutil.move(moved, stores.base_path)
    assert repair_store(stores.path).whole == ("two",)
    assert_same(tallstore.load(stores.path, task="two"), stores.tasks["two"])


def test_verify_hashes_the_base_anew(stores: Stores) -> None:
    """A store that claims another base's identity is found out, its checksums being right."""
    claimed = identity(stores.base_path)
    change(stores)

    def claim(body: dict[str, Any]) -> None:
        body["base"]["identity"] = claimed

    rewrite_body(stores.base_path, claim)
    with tallstore.open(stores.path) as store:
        (problem,) = store.verify().problems
    assert problem.owners == ("external base",)
    assert f"is said to be {claimed}, but holds the weights of" in problem.message


def test_verify_says_what_it_checked(stores: Stores) -> None:
    with tallstore.open(stores.path) as store, tallstore.open(stores.base_path) as there:
        found = store.verify()
        streams = [there._held().stream(n) for n in there.describe().base.streams]
    assert found.ok and found.external is not None
    assert found.external.path == stores.base_path
    assert found.external.chunks == sum(stream.chunks for stream in streams) == 2
    assert found.external.nbytes == sum(stream.stored for stream in streams)


def test_no_chains(stores: Stores, tmp_path: Path) -> None:
    """A base is never two stores away."""
    with pytest.raises(OptionError, match=f"another store; give that one: {stores.base_path}"):
        tallstore.pack(tmp_path / "c.tall", None, stores.tasks, external_base=stores.path)
    shutil.copyfile(stores.path, tmp_path / "copy.tall")
    with pytest.raises(WrongBaseError, match=f"has it from a third, {stores.base_path}"):
        tallstore.load(stores.path, external_base=tmp_path / "copy.tall")
    with pytest.raises(OptionError, match="not itself"):
        tallstore.relink(stores.path, stores.path)
    stores.check()


def test_options_that_make_no_sense(stores: Stores, tmp_path: Path) -> None:
    path = tmp_path / "n.tall"
    for base, external in ((None, None), (stores.base, stores.base_path)):
        with pytest.raises(OptionError, match="either a base, or external_base="):
            tallstore.pack(path, base, stores.tasks, external_base=external)
    with pytest.raises(OptionError, match="holds its base itself"):
        tallstore.load(stores.base_path, external_base=stores.base_path)
    with pytest.raises(OptionError, match="holds its base itself"):
        tallstore.relink(stores.base_path, stores.path)
    with pytest.raises(OptionError, match=r"for reading alone; .* tallstore relink"):
        tallstore.open(stores.path, "a", external_base=stores.base_path)
    with pytest.raises(OptionError, match="pack to another path"):
        tallstore.pack(
            stores.base_path, None, stores.tasks, external_base=stores.base_path, overwrite=True
        )
    with pytest.raises(StoreNotFoundError):
        tallstore.pack(path, None, stores.tasks, external_base=tmp_path / "none.tall")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotAStoreError):
        tallstore.pack(path, None, stores.tasks, external_base=tmp_path / "folder")
    assert not path.exists()
