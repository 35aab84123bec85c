"""Temporary names: what is claimed stays, what is stale goes, and nothing else is touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from zoo import fine_tune, make_base, run_child

import tallstore
from tallstore.engine.temporary import claimed, remove_stale
from tallstore.sources.safetensors_writer import SafetensorsWriter


def test_what_is_claimed_stays(tmp_path: Path) -> None:
    file, directory = tmp_path / "a1", tmp_path / "a2"
    file.write_bytes(b"data")
    directory.mkdir()
    (directory / "deep").mkdir()
    (directory / "deep" / "file").write_bytes(b"data")
    (tmp_path / "b1").write_bytes(b"another's")
    claims = [claimed(file), claimed(directory)]
    remove_stale(tmp_path, r"a\d")
    assert sorted(os.listdir(tmp_path)) == ["a1", "a2", "b1"]
    for claim in claims:
        assert claim is not None
        os.close(claim)
    remove_stale(tmp_path, r"a")
    assert sorted(os.listdir(tmp_path)) == ["a1", "a2", "b1"]
    remove_stale(tmp_path, r"a\d")
    assert os.listdir(tmp_path) == ["b1"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "kept"
    target.mkdir()
    (target / "file").write_bytes(b"data")
    (tmp_path / "a1").symlink_to(target)
    remove_stale(tmp_path, r"a1")
    assert (target / "file").exists()


def test_a_claim_that_came_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a1"
    path.write_bytes(b"")
    real = os.open

    def opened(*arguments: Any, **keywords: Any) -> int:
        descriptor = real(*arguments, **keywords)
        path.unlink(missing_ok=True)  # as the one who takes it for stale does
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    assert claimed(path) is None


def test_where_there_is_no_directory(tmp_path: Path) -> None:
    remove_stale(tmp_path / "absent", r".*")


def test_two_unpack_into_one_directory(tmp_path: Path) -> None:
    layout = [("w", "float32", (4,))]
    with SafetensorsWriter(tmp_path / "one.safetensors", layout) as one:
        with SafetensorsWriter(tmp_path / "two.safetensors", layout) as two:
            one.write("w", 0, bytes(16))
            two.write("w", 0, bytes(16))
        assert len(os.listdir(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors", "two.safetensors"]


def test_what_a_killed_unpack_left_goes_with_the_next(tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    tallstore.pack(store, make_base(), {"t": fine_tune(make_base(), 1)}, exact=True)
    code = """
import os, signal, sys, tallstore, tallstore.exporting
from tallstore.loading import Loader
Loader.stream = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
with tallstore.open(sys.argv[1]) as store:
    store.unpack("t", sys.argv[2])
"""
    for out in ("out", "out.safetensors"):
        assert run_child(code, store, tmp_path / out, check=False).returncode == -9
    left = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert len(left) == 2
    with tallstore.open(store) as opened:
        opened.unpack("t", tmp_path / "out")
        opened.unpack("t", tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.safetensors", "zoo.tall"]
