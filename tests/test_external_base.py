"""A store whose base is in another store: everything works, and no other base ever serves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import ok, ok_json, refused, run
from helpers import assert_same
from safetensors.torch import load_file, save_file
from stored import damaged, rewrite_body, values
from zoo import State, bits, fine_tune, make_base, run_child

import tallstore
from tallstore.documents import BaseDocument
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
from tallstore.externalbase import recorded_path
from tallstore.repairing import repair_store
from tallstore.ring import Ring


@dataclass(frozen=True)
class Stores:
    """``base.tall`` with a base and the task ``first``; ``zoo.tall`` refers to that base."""

    base_path: Path
    path: Path
    base: State
    first: State
    tasks: Mapping[str, State]

    def check(self, **options: Any) -> None:
        for name, state in self.tasks.items():
            assert_same(tallstore.load(self.path, task=name, **options), state)
        assert_same(tallstore.load(self.path, **options), self.base)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = make_base()
    tasks = {name: fine_tune(base, seed) for seed, name in enumerate(("one", "two"))}
    tasks["two"]["head.weight"] = torch.ones(5, 65)  # of its own
    tallstore.pack(folder / "base.tall", base, {"first": fine_tune(base, 9)}, exact=True)
    tallstore.pack(folder / "zoo.tall", None, tasks, exact=True, external_base=folder / "base.tall")
    return folder


@pytest.fixture
def stores(made: Path, tmp_path: Path) -> Stores:
    for name in ("base.tall", "zoo.tall"):
        shutil.copyfile(made / name, tmp_path / name)
    base = make_base()
    tasks = {name: fine_tune(base, seed) for seed, name in enumerate(("one", "two"))}
    tasks["two"]["head.weight"] = torch.ones(5, 65)
    return Stores(tmp_path / "base.tall", tmp_path / "zoo.tall", base, fine_tune(base, 9), tasks)


def identity(path: Path) -> str:
    with tallstore.open(path) as store:
        return store.base.identity


# -- what is there ------------------------------------------------------------------------


def test_what_is_stored(stores: Stores) -> None:
    with tallstore.open(stores.path) as store, tallstore.open(stores.base_path) as there:
        assert store.format_version == there.format_version == 2
        assert store.external_base == stores.base_path and there.external_base is None
        assert store.base.external == "base.tall" and there.base.external is None
        assert store.base.identity == there.base.identity
        assert {task.base for task in store.tasks.values()} == {there.base.identity}
        document = store.describe().base
        assert isinstance(document, BaseDocument) and not any(document.streams)
        assert store.base.streams == ()  # no elements; this base has no files
        assert store.stored_bytes() < 2000 < there.stored_bytes()
        assert store.tensors() == there.tensors()


def test_loading(stores: Stores) -> None:
    stores.check()
    with tallstore.open(stores.path) as store:
        state = store.load("one", names=["layers.*"])
        assert set(state) == {"layers.0.weight", "layers.0.bias", "layers.1.weight"}
        for name, tensor in state.items():
            assert_same(tensor, stores.tasks["one"][name])
        out = {name: torch.zeros_like(tensor) for name, tensor in stores.tasks["two"].items()}
        assert store.load("two", out=out) is out
        assert_same(out, stores.tasks["two"])
        half = store.load("one", dtype="float16")
        assert_same(half["norm.weight"], stores.tasks["one"]["norm.weight"].half())


def test_masks_alone_are_those_of_a_store_that_holds_its_base(
    stores: Stores, tmp_path: Path
) -> None:
    """Every way to load gives the same bits as without the reference."""
    tallstore.pack(tmp_path / "whole.tall", stores.base, stores.tasks, exact=True)
    for name in stores.tasks:
        ours = tallstore.load(stores.path, task=name, fidelity="codes")
        theirs = tallstore.load(tmp_path / "whole.tall", task=name, fidelity="codes")
        assert_same(ours, theirs)
        assert any(bits(ours[key]) != bits(stores.tasks[name][key]) for key in ours)


def test_packed_without_the_exact_tier_from_a_base_of_every_size(tmp_path: Path) -> None:
    """More than a span, compressed or not, and bfloat16."""
    draw = torch.Generator().manual_seed(3)
    base = {
        "big": torch.randn(1100, 1000, generator=draw),
        "brain": torch.randn(700, 900, generator=draw).bfloat16(),
    }
    tuned = {k: (t.float() + 0.01 * torch.randn(t.shape, generator=draw)).to(t.dtype)
             for k, t in base.items()}  # fmt: skip
    for compress in (False, True):
        there = tmp_path / f"b{compress}.tall"
        tallstore.pack(there, base, {"t": tuned}, compress=compress)
        path = tmp_path / f"z{compress}.tall"
        tallstore.pack(path, None, {"t": tuned}, external_base=there)
        assert_same(tallstore.load(path, task="t"), tallstore.load(there, task="t"))
        assert_same(tallstore.load(path), base)
        with tallstore.open(path) as store:
            assert store.verify().ok and store.stored_bytes() < 1000


def test_the_ring_reads_it(stores: Stores) -> None:
    """What loads to CUDA, on tensors of the CPU: the same code."""
    with tallstore.open(stores.path) as store:
        loader = store._loader("one")
        targets = {
            number: torch.zeros(segment.nbytes, dtype=torch.uint8)
            for number, segment in enumerate(loader.contents.segments)
        }
        ring = Ring(loader.decoder, torch.device("cpu"), backend="cpu", threads=2)
        ring.run(list(targets), targets=targets, progress=lambda count: None)
        for tensor in loader.contents.tensors:
            assert targets[tensor.segment].numpy().tobytes() == bits(
                stores.tasks["one"][tensor.name]
            )


def test_files_are_kept_here_and_shared(tmp_path: Path) -> None:
    """A tokenizer is small, and comes back without the other store."""
    base = tmp_path / "base"
    base.mkdir()
    state = make_base()
    save_file(state, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    (base / "tokenizer.json").write_bytes(os.urandom(200_000))
    for name in ("one", "two"):
        shutil.copytree(base, tmp_path / name)
        save_file(fine_tune(state, len(name)), tmp_path / name / "model.safetensors")
    tallstore.pack(tmp_path / "base.tall", base, {"one": tmp_path / "one"}, exact=True)
    path = tmp_path / "zoo.tall"
    tallstore.pack(
        path, None, {"two": tmp_path / "two"}, exact=True, external_base=tmp_path / "base.tall"
    )
    with tallstore.open(path) as store:
        assert store.base.streams and store.stored_bytes() > 200_000
        assert store.file_bytes()[1] < 350_000, "the tokenizer is there twice"
        store.unpack(None, tmp_path / "again")
        store.unpack("two", tmp_path / "two again")
    for made, original in (("again", "base"), ("two again", "two")):
        for file in (base / "tokenizer.json", base / "config.json"):
            assert (tmp_path / made / file.name).read_bytes() == file.read_bytes()
        assert_same(
            load_file(tmp_path / made / "model.safetensors"),
            load_file(tmp_path / original / "model.safetensors"),
        )


# -- changing it --------------------------------------------------------------------------


def test_adding_removing_compacting(stores: Stores) -> None:
    late = fine_tune(stores.base, 5)
    tallstore.add(stores.path, {"late": late})
    tallstore.save(late, stores.path, task="saved")
    with tallstore.open(stores.path, "a") as store:
        store.remove("one")
        assert list(store.tasks) == ["two", "late", "saved"] and store.format_version == 2
    tallstore.compact(stores.path)
    for name, state in (("two", stores.tasks["two"]), ("late", late), ("saved", late)):
        assert_same(tallstore.load(stores.path, task=name), state)
    with tallstore.open(stores.path) as store:
        assert store.verify().ok and store.format_version == 2
        assert store.external_base == stores.base_path


def test_a_store_that_takes_a_base_of_its_own_again_is_of_version_1(stores: Stores) -> None:
    with tallstore.open(stores.path):  # in use: a new generation is written into it
        tallstore.save(stores.first, stores.path, overwrite=True)
    with tallstore.open(stores.path) as store:
        assert store.format_version == 1 and store.external_base is None
        assert_same(store.load(), stores.first)


def test_packing_from_it(stores: Stores, tmp_path: Path) -> None:
    """Its base and its tasks are checkpoints like any other."""
    path = tmp_path / "again.tall"
    tallstore.pack(path, stores.path, {"x": f"{stores.path}::one"}, exact=True)
    with tallstore.open(path) as store:
        assert store.external_base is None
        assert store.base.identity == identity(stores.base_path), "the same weights, another hash"
        assert_same(store.load("x"), stores.tasks["one"])
        assert_same(store.load(), stores.base)
    tallstore.add(stores.base_path, {"from there": f"{stores.path}::two"})
    assert_same(tallstore.load(stores.base_path, task="from there"), stores.tasks["two"])


def test_statistics_need_no_more_than_it_has(stores: Stores, tmp_path: Path) -> None:
    tallstore.pack(tmp_path / "whole.tall", stores.base, stores.tasks, exact=True)
    with tallstore.open(stores.path) as store, tallstore.open(tmp_path / "whole.tall") as whole:
        ours, theirs = (s.statistics(cosine=True).to_json() for s in (store, whole))
    assert ours == theirs and ours["tasks"]


def test_merging(stores: Stores, tmp_path: Path) -> None:
    tallstore.pack(tmp_path / "whole.tall", stores.base, stores.tasks, exact=True)
    for options in ({"rule": "ties"}, {"rule": "consensus-ta", "k": 1}):
        ours, theirs = (
            tallstore.merge(path, private="base", **options).state  # type: ignore[arg-type]
            for path in (stores.path, tmp_path / "whole.tall")
        )
        assert ours is not None
        assert_same(ours, theirs)
    tallstore.merge(stores.path, rule="average", private="base", as_task="mean")
    with tallstore.open(stores.path) as store:
        assert store.format_version == 2 and "mean" in store.tasks
        assert set(store.load("mean")) == set(stores.base)


def test_a_base_may_be_written_to_meanwhile(stores: Stores) -> None:
    """An open handle keeps the generation that it found; another task there concerns nobody."""
    with tallstore.open(stores.path) as store:
        assert_same(store.load("one"), stores.tasks["one"])
        tallstore.add(stores.base_path, {"more": stores.first})
        assert_same(store.load("two"), stores.tasks["two"])
        tallstore.save(stores.first, stores.base_path, overwrite=True)
        assert_same(store.load("two"), stores.tasks["two"])
        store.refresh()
        with wrong(stores.path, stores.base_path):
            store.load("two")


def test_the_other_store_is_closed_with_this_one(stores: Stores) -> None:
    with tallstore.open(stores.path) as store:
        store.load("one")
        assert stores.base_path.with_name("base.tall-lock").exists()
    assert not stores.base_path.with_name("base.tall-lock").exists()
    tallstore.compact(stores.base_path)  # refused while anybody reads it
    stores.check()


# -- where it is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "base", "recorded"),
    [
        ("/zoo/a.tall", "/zoo/base.tall", "base.tall"),
        ("/zoo/a.tall", "/zoo/bases/b.tall", "bases/b.tall"),
        ("/zoo/mine/a.tall", "/zoo/b.tall", "../b.tall"),
        ("/home/a.tall", "/mnt/b.tall", "/mnt/b.tall"),
        ("/a.tall", "/mnt/b.tall", "/mnt/b.tall"),
    ],
)
def test_paths_are_relative_where_there_is_something_in_common(
    store: str, base: str, recorded: str
) -> None:
    assert recorded_path(Path(store), Path(base)) == recorded


def test_both_can_be_moved_together(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    moved = tmp_path / "deep" / "er"
    moved.mkdir()
    for path in (stores.base_path, stores.path):
        shutil.move(path, moved / path.name)
    assert_same(tallstore.load(moved / "zoo.tall", task="one"), stores.tasks["one"])


def test_from_any_working_directory(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tallstore.pack("r.tall", None, stores.tasks, exact=True, external_base="base.tall")
    monkeypatch.chdir("/")
    assert_same(tallstore.load(tmp_path / "r.tall", task="one"), stores.tasks["one"])


def test_names_of_any_kind(stores: Stores, tmp_path: Path) -> None:
    odd = tmp_path / 'd"er ..  基\n.tall'
    shutil.move(stores.base_path, odd)
    assert tallstore.relink(stores.path, odd) == odd.name
    stores.check()


def test_links_are_followed(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, store_link = tmp_path / "link.tall", tmp_path / "elsewhere" / "z.tall"
    link.symlink_to("base.tall")
    store_link.symlink_to("../zoo.tall")
    assert tallstore.relink(stores.path, link) == "link.tall"
    assert_same(tallstore.load(store_link, task="one"), stores.tasks["one"])
    link.unlink()
    with absent(stores.path, link):
        tallstore.load(store_link, task="one")


# -- the wrong one ------------------------------------------------------------------------


@contextmanager
def refusing(kind: type[TallstoreError], *parts: object) -> Any:
    with pytest.raises(TallstoreError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {message}"
    for part in (*parts, "tallstore relink", "--external-base"):
        assert str(part) in message, message


def wrong(path: Path, place: Path) -> Any:
    """Refused, with both identities and the cure."""
    with tallstore.open(path) as store:
        wanted = store.base.identity
    found = identity(place)
    assert found != wanted
    return refusing(WrongBaseError, f"{path}: needs base {wanted}", place, f"is {found}")


def absent(path: Path, place: Path) -> Any:
    with tallstore.open(path) as store:
        wanted = store.base.identity
    return refusing(StoreNotFoundError, f"{path}: needs base {wanted}", f"{place}: no such store")


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


# -- relink, and reading without it -------------------------------------------------------


def test_a_moved_base(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    moved = tmp_path / "away" / "moved.tall"
    shutil.move(stores.base_path, moved)
    with absent(stores.path, stores.base_path):
        tallstore.load(stores.path, task="one")
    stores.check(external_base=moved)
    with tallstore.open(stores.path, external_base=moved) as store:
        assert store.verify().ok and store.external_base == moved
        store.unpack("one", tmp_path / "one.safetensors")
        store.refresh()
        assert_same(store.load("one"), stores.tasks["one"])
    with absent(stores.path, stores.base_path):  # said for once alone
        tallstore.load(stores.path, task="one")
    with tallstore.open(stores.path) as store:
        before = store.generation
    assert tallstore.relink(stores.path, moved) == "away/moved.tall"
    assert tallstore.relink(stores.path, moved) == "away/moved.tall"
    stores.check()
    with tallstore.open(stores.path) as store:
        assert store.generation == before + 1, "relinking to where it is wrote something"


def test_a_copy_of_the_base_serves_as_well(stores: Stores, tmp_path: Path) -> None:
    """The identity is that of the weights: the same ones, packed anew, are the same base."""
    stores.base_path.unlink()
    tallstore.save(stores.base, tmp_path / "saved.tall")
    tallstore.pack(tmp_path / "packed.tall", stores.base, {"x": stores.first}, compress=True)
    for name in ("saved.tall", "packed.tall"):
        stores.check(external_base=tmp_path / name)


def test_in_another_process_and_after_a_fork(stores: Stores) -> None:
    run_child(
        """
import os, sys
import tallstore
store = tallstore.open(sys.argv[1])
want = store.load("one")
child = os.fork()
if not child:
    try:
        store.load("one")
    except tallstore.errors.StoreClosedError:
        again = tallstore.load(sys.argv[1], task="one")
        same = all(bool((again[name] == tensor).all()) for name, tensor in want.items())
        os._exit(0 if same else 3)
    os._exit(4)
assert os.waitpid(child, 0)[1] == 0
assert store.verify().ok
""",
        stores.path,
    )


# -- the command --------------------------------------------------------------------------


@pytest.fixture
def checkpoints(stores: Stores, tmp_path: Path) -> Path:
    for name, state in stores.tasks.items():
        torch.save(state, tmp_path / f"{name}.pt")
    return tmp_path


def test_the_command_packs_and_reads(checkpoints: Path, stores: Stores) -> None:
    place = checkpoints / "new.tall"
    tasks = [checkpoints / f"{name}.pt" for name in stores.tasks]
    facts = ok_json("pack", place, "--external-base", stores.base_path, "--exact", *tasks)
    assert facts["base"]["external"] == str(stores.base_path) and facts["format_version"] == 2
    originals = [tallstore.open(place).tasks[name].nbytes for name in stores.tasks]
    assert facts["original_bytes"] == sum(originals), "the base is not in this file"
    shown = ok("pack", place, "--external-base", stores.base_path, "--overwrite", "-y", *tasks)
    assert f"The base is not in it but in {stores.base_path}." in shown
    assert "(base)" not in shown and "2 checkpoints" in shown
    assert f"in another store, {stores.base_path}" in ok("info", place)
    assert "version 2" in ok("info", place)
    assert len(ok("ls", place).splitlines()) == 2
    ok("unpack", place, "one", checkpoints / "one.safetensors")
    said = ok("verify", place)
    assert f"of its base in {stores.base_path} 2 chunks" in said
    facts = ok_json("verify", place)
    assert facts["external_base"]["store"] == str(stores.base_path) and facts["ok"]
    assert ok_json("verify", stores.base_path).keys() == facts.keys() - {"external_base"}


def test_the_command_relinks(stores: Stores, tmp_path: Path) -> None:
    moved = tmp_path / "moved.tall"
    shutil.move(stores.base_path, moved)
    message = refused("unpack", stores.path, "one", tmp_path / "o.safetensors")
    assert "tallstore relink" in message and "no such store" in message
    assert json.loads(run("verify", stores.path, "--json").stdout)["ok"] is False
    for verb in (
        ("unpack", stores.path, "one", tmp_path / "o.safetensors"),
        ("verify", stores.path),
        ("stats", stores.path, "--cosine"),
    ):
        ok(*verb, "--external-base", moved)
    assert ok("relink", stores.path, moved) == f"{stores.path}: its base is in moved.tall\n"
    facts = ok_json("relink", stores.path, moved)
    assert facts == {"store": str(stores.path), "base": str(moved), "recorded": "moved.tall"}
    assert ok_json("verify", stores.path)["ok"]


def test_the_command_takes_one_base(checkpoints: Path, stores: Stores) -> None:
    place, task = checkpoints / "new.tall", checkpoints / "one.pt"
    both = ("--base", task, "--external-base", stores.base_path)
    for options in ((), both):
        message = refused("pack", place, *options, task, code=2)
        assert "One of --base and --external-base is needed" in message
