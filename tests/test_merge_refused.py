"""What merging a store refuses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from helpers import assert_same
from merge_helpers import Flat, packed, zoo
from zoo import fine_tune, make_base

import tallstore
from tallstore.engine.keys import chunk_key
from tallstore.merging import Ties, merge_rule

# -- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rule": "mean"}, "OptionError", "no merge rule is called 'mean'; there are ta, average"),
        ({"alpha": 0}, "OptionError", "alpha=0: finite numbers above 0"),
        ({"alpha": -0.3}, "OptionError", "alpha=-0.3"),
        ({"alpha": float("nan")}, "OptionError", "alpha=nan"),
        ({"alpha": float("inf")}, "OptionError", "alpha=inf"),
        ({"alpha": "0.4"}, "OptionError", "alpha='0.4'"),
        ({"alpha": []}, "OptionError", "alpha=[]"),
        ({"alpha": True}, "OptionError", "alpha=True"),
        ({"alpha": [0.1, 0.2]}, "OptionError", "choosing one of several takes evaluate"),
        ({"rule": "consensus-ta", "k": [1, 2]}, "OptionError", "k=[1, 2]: choosing one of several"),
        ({"rule": "consensus-ta", "k": -1}, "OptionError", "k=-1: a whole number of tasks"),
        ({"rule": "consensus-ta", "k": 1.5}, "OptionError", "k=1.5"),
        ({"rule": "consensus-ta", "k": []}, "OptionError", "k=[]"),
        ({"rule": "ta", "k": 2}, "OptionError", "'ta' takes no k"),
        ({"rule": Ties(), "k": 2}, "OptionError", "k: goes with a rule's name"),
        ({"tasks": []}, "OptionError", "no tasks to merge"),
        ({"tasks": "t0"}, "OptionError", "tasks='t0': a list of names, such as ['t0']"),
        ({"tasks": ["t0", "t0"]}, "OptionError", "'t0' is named twice"),
        ({"tasks": ["t0", "t9"]}, "UnknownTaskError", "no task 't9'; there are 't0', 't1', 't2'"),
        ({"private": "t9"}, "UnknownTaskError", "private='t9' is no task; there are 'base'"),
        ({"out": "a", "as_task": "b"}, "OptionError", "goes to one of them"),
        ({"out": "/absent/there"}, "OptionError", "there is no directory /absent"),
        ({"out": "/tmp"}, "StoreExistsError", "/tmp: there already"),
        ({"as_task": "t1"}, "TaskExistsError", "holds a task 't1' already"),
        ({"as_task": "a/b"}, "TaskNameError", "'a/b'"),
        ({"device": "cuda:99"}, "DeviceError", "no CUDA device"),
        ({"device": "tpu"}, "OptionError", "device='tpu'"),
        (
            {"rule": merge_rule("average", weights={"t0": 1})},
            "OptionError",
            "no weight for 't1', 't2'",
        ),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], kind: str, message: str) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    if kind == "DeviceError" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(tallstore.TallstoreError) as caught:
        tallstore.merge(path, **{"alpha": 0.4, **options})
    assert type(caught.value).__name__ == kind
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["z.tall"]
    with tallstore.open(path) as store:
        assert store.verify().ok and list(store.tasks) == list(tasks)


def test_consensus_without_masks_is_refused_by_name(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    tallstore.add(path, {"late": fine_tune(base, 8)})
    with pytest.raises(tallstore.errors.OptionError) as caught:
        tallstore.merge(path, rule="consensus-ta", alpha=0.4)
    assert "consensus-ta counts TALL masks, and 'late' has none" in str(caught.value)
    assert "pack the originals again, all together, or name other tasks" in str(caught.value)
    tallstore.merge(path, rule="consensus-ta", alpha=0.4, tasks=list(tasks))
    plain = tmp_path / "plain.tall"
    tallstore.save(base, plain)
    tallstore.add(plain, {"a": tasks["t0"], "b": tasks["t1"]})
    with pytest.raises(tallstore.errors.OptionError, match="'a', 'b' has none"):
        tallstore.merge(plain, rule="consensus-ties", alpha=0.4)
    expected = Flat(base, {"a": tasks["t0"], "b": tasks["t1"]}).merge(base, "ties", ["a", "b"], 0.4)
    assert_same(tallstore.merge(plain, rule="ties", alpha=0.4).state, expected)


def test_masks_of_another_vector_are_refused_by_name(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    with tallstore.open(path) as store:
        vector = dataclasses.replace(store.vector, tasks=("t0", "t2"))  # type: ignore[type-var]
        store._catalog = dataclasses.replace(store._catalog, vector=vector)
        with pytest.raises(tallstore.errors.OptionError) as caught:
            store.merge(rule="consensus-ta", alpha=0.4)
        assert "the masks of 't1' were made for another shared vector" in str(caught.value)
        assert "which is of 't0', 't2'" in str(caught.value)
        store.merge(rule="consensus-ta", alpha=0.4, tasks=["t2", "t0"])


def test_stores_with_nothing_to_merge(tmp_path: Path) -> None:
    tallstore.save({"w": torch.ones(3)}, tmp_path / "alone.tall")
    with pytest.raises(tallstore.errors.OptionError, match="no tasks to merge; add some"):
        tallstore.merge(tmp_path / "alone.tall")
    tallstore.save({"n": torch.arange(9)}, tmp_path / "whole.tall")
    tallstore.save({"n": torch.arange(9) + 1}, tmp_path / "whole.tall", task="a")
    with pytest.raises(tallstore.errors.MismatchError, match="no float32, bfloat16 or float16"):
        tallstore.merge(tmp_path / "whole.tall")


def test_masks_are_no_rule_to_pack_with(tmp_path: Path) -> None:
    base, tasks = zoo()
    with pytest.raises(tallstore.errors.OptionError, match="merge='consensus-ta': it takes stored"):
        tallstore.pack(tmp_path / "z.tall", base, tasks, merge="consensus-ta")
    with pytest.raises(tallstore.errors.OptionError, match="no task 'x'"):
        rule = merge_rule("average", weights={"t0": 1, "t1": 1, "t2": 1, "x": 1})
        tallstore.pack(tmp_path / "z.tall", base, tasks, merge=rule)
    assert list(tmp_path.iterdir()) == []


def test_a_nest_merges_as_an_object_and_not_as_a_file(tmp_path: Path) -> None:
    base, tuned = make_base(), fine_tune(make_base(), 1)
    tallstore.save({"model": base, "step": 1}, tmp_path / "z.tall")
    tallstore.save({"model": tuned, "step": 2}, tmp_path / "z.tall", task="a")
    tallstore.save({"model": fine_tune(base, 2), "step": 3}, tmp_path / "z.tall", task="b")
    merge = tallstore.merge(tmp_path / "z.tall", alpha=0.5)
    expected = Flat(base, {"a": tuned, "b": fine_tune(base, 2)}).merge(base, "ta", ["a", "b"], 0.5)
    assert_same(merge.state, {"model": expected, "step": 1})
    with pytest.raises(tallstore.errors.OptionError, match="no flat dict of tensors"):
        tallstore.merge(tmp_path / "z.tall", tmp_path / "out", alpha=0.5)
    assert not (tmp_path / "out").exists()


def test_damage_is_found_and_nothing_is_left(tmp_path: Path) -> None:
    """A flipped bit in each kind of chunk that merging reads."""
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    with tallstore.open(path) as store:
        described = store.describe("t1")
        assert described.task is not None and store.vector is not None
        (code,) = [code for code in described.task.codes if code.planes]
        streams = [described.base.streams[code.arena], code.planes, code.exact]
    for stream in streams:
        assert stream is not None
        copy = Path(shutil.copyfile(path, tmp_path / f"{stream}.tall"))
        with (
            lmdb.Environment(str(copy), subdir=False, lock=False, lib_version=0) as environment,
            environment.begin(write=True) as transaction,
        ):
            value = bytearray(transaction.get(chunk_key(stream, 0)))
            value[-1] ^= 1
            transaction.put(chunk_key(stream, 0), bytes(value))
        for out in (tmp_path / "m.safetensors", tmp_path / "model"):
            with pytest.raises(tallstore.errors.CorruptStoreError):
                tallstore.merge(copy, out, rule="consensus-ta", alpha=0.5)
            assert not out.exists()
        with pytest.raises(tallstore.errors.CorruptStoreError):
            tallstore.merge(copy, as_task="merged", rule="consensus-ta", alpha=0.5)
        with tallstore.open(copy) as store:
            assert list(store.tasks) == list(tasks)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
