"""What a hostile user found, kept from coming back."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same

import tallstore
from tallstore.engine.readers import readers
from tallstore.errors import MismatchError, OptionError
from tallstore.repairing import repair_store

BASE = {"w": torch.arange(99.0)}
TASK = {"w": torch.arange(99.0) + torch.sin(torch.arange(99.0))}


@pytest.mark.parametrize("exact", [False, True])
def test_weights_too_far_apart_are_kept_as_they_are(tmp_path: Path, exact: bool) -> None:
    huge = torch.full((99,), 3e38)
    tallstore.pack(tmp_path / "q.tall", {"w": -huge}, {"a": {"w": huge}}, exact=exact)
    assert_same(tallstore.load(tmp_path / "q.tall", task="a"), {"w": huge})


@pytest.mark.parametrize("score", [float("inf"), float("-inf")])
def test_an_infinite_score_is_taken_but_not_kept(tmp_path: Path, score: float) -> None:
    path = tmp_path / "q.tall"
    tallstore.pack(path, BASE, {"a": TASK}, tall_lambda=[0.2, 0.4], evaluate=lambda t, s: score)
    with tallstore.open(path) as store:
        assert store.tasks["a"].score is None
        assert store.tasks["a"].tall_lambda == 0.2


def test_a_store_is_not_packed_over_itself(tmp_path: Path) -> None:
    path = tmp_path / "io.tall"
    tallstore.pack(path, BASE, {"a": TASK}, exact=True)
    with pytest.raises(OptionError, match="pack to another path"):
        tallstore.pack(path, path, {"a": f"{path}::a"}, overwrite=True)
    assert_same(tallstore.load(path, task="a"), TASK)


def test_a_link_is_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "target.tall", tmp_path / "link.tall"
    tallstore.save(BASE, target)
    link.symlink_to(target)
    tallstore.save(TASK, link)
    assert link.is_symlink()
    assert_same(tallstore.load(target), TASK)


def test_permissions_survive_a_save(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(BASE, path)
    path.chmod(0o664)
    before = os.umask(0o077)
    try:
        tallstore.save(TASK, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664


def test_arguments_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(BASE, path)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"names": [1]}, OptionError, "names of tensors are text"),
        ({"device": "meta"}, OptionError, "'cpu' or 'cuda'"),
        ({"out": {"w": 3}}, MismatchError, "is int, no tensor"),
        ({"out": {"w": torch.zeros(1).expand(99)}}, MismatchError, "is expanded"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            tallstore.load(path, **options)
    with pytest.raises(OptionError, match="NUL"):
        tallstore.save({}, "a\0b")
    with pytest.raises(OptionError, match="not negative"):
        tallstore.save(BASE, path, timeout=-1)


def test_a_path_may_hold_two_colons(tmp_path: Path) -> None:
    path = tmp_path / "a::b.tall"
    tallstore.pack(path, BASE, {"t": TASK}, exact=True)
    tallstore.pack(tmp_path / "c.tall", path, {"t": f"{path}::t"}, exact=True)
    assert_same(tallstore.load(tmp_path / "c.tall", task="t"), TASK)


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """LMDB cannot take it; checkpoints, which have no need of LMDB, may lie there."""
    good = tmp_path / "good.tall"
    tallstore.pack(good, BASE, {"a": TASK}, exact=True)
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    strange.mkdir()
    with tallstore.open(good) as store:
        store.unpack("a", strange / "a.safetensors")
    tallstore.add(good, {"b": strange / "a.safetensors"})
    assert_same(tallstore.load(good, task="b"), TASK)
    there = strange / "moved.tall"
    shutil.copyfile(good, there)
    before = set(strange.iterdir())
    for use in (
        lambda: tallstore.load(there),
        lambda: tallstore.open(there, "a"),
        lambda: tallstore.save(BASE, there, task="new"),
        lambda: tallstore.save(BASE, strange / "new.tall"),
        lambda: tallstore.pack(strange / "new.tall", BASE, {"a": TASK}),
        lambda: tallstore.pack(tmp_path / "new.tall", None, {"a": TASK}, external_base=there),
        lambda: tallstore.compact(there),
        lambda: repair_store(good, out=strange / "new.tall"),
        lambda: readers(there),
    ):
        with pytest.raises(OptionError, match=r"\\xff.*: no UTF-8.*rename") as caught:
            use()
        assert str(caught.value).isprintable()
    assert set(strange.iterdir()) == before, "litter"
    assert {path.name for path in tmp_path.iterdir() if path != strange} == {"good.tall"}
