"""Media that are full or fail where no error number comes back: pages of a map kill the process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same
from zoo import child_environment, fine_tune, make_base, run_child

import tallstore
from tallstore import advice
from tallstore.engine import environment
from tallstore.engine.environment import lock_file
from tallstore.errors import StoreFullError

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")


@pytest.fixture
def full_disk(small_disk: Path) -> Iterator[Path]:
    """A store of a base and a task, on a file system that then was filled to the last byte."""
    path = small_disk / "zoo.tall"
    tallstore.save(make_base(), path)
    tallstore.save(fine_tune(make_base(), 1), path, task="t")
    with open(small_disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as exc:
            assert exc.errno == errno.ENOSPC
    yield path


def test_reading_on_a_full_disk(full_disk: Path) -> None:
    """LMDB writes its lock file through a map, which on a full disk is SIGBUS."""
    code = """
import sys, tallstore
from helpers import assert_same
from zoo import fine_tune, make_base
assert_same(tallstore.load(sys.argv[1]), make_base())
with tallstore.open(sys.argv[1], "a") as store:
    assert_same(store.load("t"), fine_tune(make_base(), 1))
    assert store.verify().ok
"""
    run_child(code, full_disk)


def test_writing_on_a_full_disk(full_disk: Path) -> None:
    code = """
import sys, tallstore
from tallstore.errors import StoreFullError
from zoo import fine_tune, make_base
def remove():
    with tallstore.open(sys.argv[1], "a") as store:
        store.remove("t")
for use in (
    lambda: tallstore.save(make_base(), sys.argv[1], task="new"),
    lambda: tallstore.save(make_base(), sys.argv[1], overwrite=True),
    lambda: tallstore.save(make_base(), sys.argv[1] + "2"),
    lambda: tallstore.compact(sys.argv[1]),
    remove,
):
    try:
        use()
    except StoreFullError as exc:
        print(exc)
"""
    lines = run_child(code, full_disk).stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        assert "no space left on the device" in line and "0 are free" in line, line
        assert "more bytes are needed" in line and "Free some space" in line, line
    (full_disk.parent / "ballast").unlink()
    assert_same(tallstore.load(full_disk), make_base())
    tallstore.save(make_base(), full_disk, task="new")
    with tallstore.open(full_disk) as store:
        assert list(store.tasks) == ["t", "new"] and store.verify().ok
    assert os.listdir(full_disk.parent) == ["zoo.tall"]


def test_how_much_room_a_save_takes(small_disk: Path) -> None:
    large = {"w": torch.randn(8 << 20, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(StoreFullError) as caught:
        tallstore.save(large, small_disk / "new.tall")
    message = str(caught.value)
    needed = int(message.split("about ")[1].split(" more bytes are needed")[0])
    assert 1 <= needed / large["w"].nbytes < 1.01
    free = int(message.split(" are free")[0].rsplit(" ", 1)[1])
    assert free <= 6 << 20
    assert os.listdir(small_disk) == []


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    code = """
import resource, sys, torch, tallstore
from tallstore.errors import StoreFullError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    tallstore.save({"w": torch.arange(1 << 20).float()}, sys.argv[1])
except StoreFullError as exc:
    print(exc)
"""
    said = run_child(code, tmp_path / "zoo.tall").stdout
    assert "the file may not grow so long" in said and f"a file may have {1 << 20}" in said
    assert "ulimit -f" in said
    assert os.listdir(tmp_path) == []


def test_the_lock_file_is_as_long_as_lmdb_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    tallstore.save(make_base(), path)
    with tallstore.open(path):
        assert lock_file(path).stat().st_size == environment._LOCK_FILE_SIZE


@linux
def test_a_file_cut_short_while_it_is_open() -> None:
    code = """
import os, sys, tempfile, torch, tallstore
from tallstore.errors import TruncatedStoreError
path = os.path.join(tempfile.mkdtemp(), "zoo.tall")
tallstore.save({"w": torch.randn(1 << 20)}, path)
with tallstore.open(path) as store:
    os.truncate(path, os.path.getsize(path) - 4096)
    try:
        store.load()
    except TruncatedStoreError as exc:
        print(exc)
    print(store.verify().problems[0].message)
os._exit(0)
"""
    lines = run_child(code).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "somebody cut the file short while it was open" in line, line


@linux
def test_pages_that_cannot_be_read() -> None:
    """Touching them would be SIGBUS; asking for them first is an error number."""
    code = """
import mmap, os, tempfile
from tallstore.advice import fault_in
with tempfile.TemporaryFile() as file:
    file.truncate(1 << 20)
    pages = mmap.mmap(file.fileno(), 1 << 20, prot=mmap.PROT_READ)
    view = memoryview(pages)
    fault_in(view)
    file.truncate(1 << 18)
    fault_in(view[: 1 << 18])
    try:
        fault_in(view[(1 << 18) - 1 : (1 << 18) + 4096])
    except OSError as exc:
        print(exc)
"""
    assert run_child(code).stdout == "[Errno 5] Input/output error\n"


@linux
def test_faulting_in_what_is_there(tmp_path: Path) -> None:
    value = np.arange(100_000, dtype=np.uint8)
    advice.fault_in(memoryview(value))
    advice.fault_in(memoryview(value[:0]))
    advice.fault_in(memoryview(value[17:18]))
    assert value[17] == 17


@linux
def test_setting_room_aside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"kept")
    with path.open("r+b") as file:
        advice.reserve(file.fileno(), 1 << 16)
        assert path.stat().st_size == 1 << 16
        advice.reserve(file.fileno(), 1 << 10)
    assert path.stat().st_size == 1 << 16
    assert path.read_bytes()[:5] == b"kept\0"


@pytest.fixture
def read_only_mount(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A directory, and the same mounted read-only: as another machine or container has it."""
    real, seen = tmp_path / "real", tmp_path / "seen"
    real.mkdir()
    seen.mkdir()
    done = subprocess.run(["mount", "--bind", real, seen], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("cannot mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", seen], check=True)
        yield real, seen
    finally:
        subprocess.run(["umount", "--lazy", seen], check=True)


def test_a_read_only_mount_of_a_store_that_is_written(
    read_only_mount: tuple[Path, Path],
) -> None:
    real, seen = (folder / "zoo.tall" for folder in read_only_mount)
    base = make_base()
    tallstore.save(base, real)
    tallstore.save(fine_tune(base, 0), real, task="t")
    code = """
import sys, tallstore
from helpers import assert_same
from zoo import fine_tune, make_base
with tallstore.open(sys.argv[1]) as store:
    print("open", flush=True)
    for line in sys.stdin:
        assert_same(store.load("t"), fine_tune(make_base(), 0))
        assert store.verify().ok
        print("same", flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(seen)],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "open\n"
        for number in range(3):
            with pytest.raises(tallstore.errors.StoreLockedError, match="read-only mount"):
                tallstore.save(fine_tune(base, number), real, task="t", overwrite=True, timeout=0)
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "same\n"
        child.stdin.close()
        assert child.wait(30) == 0
    tallstore.save(fine_tune(base, 5), real, task="t", overwrite=True, timeout=0)
    assert_same(tallstore.load(real, task="t"), fine_tune(base, 5))
