"""A store whose base is in another store: everything works."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from external_helpers import Stores, absent, identity, made, stores, wrong
from helpers import assert_same
from safetensors.torch import load_file, save_file
from zoo import bits, fine_tune, make_base

import tallstore
from tallstore.documents import BaseDocument
from tallstore.externalbase import recorded_path
from tallstore.ring import Ring

__all__ = ["made", "stores"]  # fixtures


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
    for again, original in (("again", "base"), ("two again", "two")):
        for file in (base / "tokenizer.json", base / "config.json"):
            assert (tmp_path / again / file.name).read_bytes() == file.read_bytes()
        assert_same(
            load_file(tmp_path / again / "model.safetensors"),
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
