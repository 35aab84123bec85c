"""A store whose base is in another store, which was moved; and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import ok, ok_json, refused, run
from external_helpers import Stores, absent, made, stores
from helpers import assert_same
from zoo import run_child

import tallstore

__all__ = ["made", "stores"]  # fixtures


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
