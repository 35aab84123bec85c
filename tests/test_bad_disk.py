"""A disk that is full, locked, read-only, forbidden or failing: what was stored stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from stored import Stored, refused, remove
from zoo import child_environment, fine_tune, make_base, run_child

import tallstore
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import (
    CorruptStoreError,
    StoreFullError,
    StoreIOError,
    StoreLockedError,
    StoreReadOnlyError,
    StoreWarning,
    TruncatedStoreError,
)


def test_a_full_disk(small_disk: Path) -> None:
    base = make_base()
    tasks = {"one": fine_tune(base, 1), "two": fine_tune(base, 2)}
    stored = Stored(small_disk / "zoo.tall", base, tasks)
    tallstore.pack(stored.path, base, tasks, exact=True)
    draw = torch.Generator().manual_seed(0)
    large = {"w": torch.randn(4 << 20, generator=draw)}
    fitting = {"w": torch.randn(1 << 19, generator=draw)}  # and then no more
    for use in (
        lambda: tallstore.save(large, stored.path, overwrite=True),
        lambda: tallstore.save(large, stored.path, task="new"),
        lambda: tallstore.save(large, small_disk / "new.tall"),
        lambda: tallstore.pack(small_disk / "new.tall", large, {"a": fine_tune(large, 1)}),
    ):
        with refused(
            StoreFullError,
            small_disk,
            "no space left on the device",
            "more bytes are needed",
            "what was stored before is intact",
            "Free some space",
        ):
            use()
        stored.check()
        assert not (small_disk / "new.tall").exists()
        # What was aborted is given back.
        assert shutil.disk_usage(small_disk).free > 5 << 20
    # There is room for something smaller.
    tallstore.save(fitting, stored.path, task="fits")
    assert_same(tallstore.load(stored.path, task="fits"), fitting)
    with refused(StoreFullError, "no space left on the device"):
        tallstore.save({"w": fitting["w"].repeat(3)}, stored.path, task="more")
    assert_same(tallstore.load(stored.path, task="fits"), fitting)
    with tallstore.open(stored.path, "a") as store:
        store.remove("fits")
    stored.check()


def test_a_full_disk_while_a_reader_is_there(small_disk: Path) -> None:
    base = make_base()
    stored = Stored(small_disk / "zoo.tall", base, {"one": fine_tune(base, 1)})
    tallstore.pack(stored.path, base, stored.tasks, exact=True)
    large = {"w": torch.randn(4 << 20, generator=torch.Generator().manual_seed(0))}
    with tallstore.open(stored.path) as reader:
        with refused(StoreFullError, stored.path, "no space left"):
            tallstore.save(large, stored.path, overwrite=True)
        assert_same(reader.load("one"), stored.tasks["one"])
        reader.refresh()
        assert_same(reader.load("one"), stored.tasks["one"])
    stored.check()


def test_a_file_that_may_not_grow(stored: Stored) -> None:
    code = """
import resource, signal, sys
import torch, tallstore
from tallstore.errors import TallstoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
large = {"w": torch.arange(1 << 20).float().sin()}
for keywords in ({"task": "new"}, {"overwrite": True}):
    try:
        tallstore.save(large, sys.argv[1], **keywords)
    except TallstoreError as exc:
        print(type(exc).__name__, exc)
"""
    lines = run_child(code, stored.path).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        kind, _, message = line.partition(" ")
        assert kind in (StoreIOError.__name__, StoreFullError.__name__)
        assert str(stored.path) in message
    stored.check()


def test_a_store_locked_by_another_process(stored: Stored) -> None:
    code = """
import sys
from pathlib import Path
from tallstore.engine.writerlock import WriterLock
with WriterLock(Path(sys.argv[1]), timeout=0):
    print("held", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(stored.path)],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "held\n"
        base = stored.base
        message = f"another process (pid {child.pid}) is writing to it; waited 0.1 s"
        for use in (
            lambda: tallstore.save(base, stored.path, task="new", timeout=0.1),
            lambda: tallstore.save(base, stored.path, overwrite=True, timeout=0.1),
            lambda: tallstore.pack(stored.path, base, {"t": base}, overwrite=True, timeout=0.1),
            lambda: tallstore.compact(stored.path, timeout=0.1),
            lambda: remove(stored.path, "one", timeout=0.1),
        ):
            with refused(StoreLockedError, stored.path, message, "timeout="):
                use()
        # readers are not in the way of writers, nor the other way round
        for name, state in stored.tasks.items():
            assert_same(tallstore.load(stored.path, task=name), state)
        child.stdin.close()
        assert child.wait() == 0
    tallstore.save(base, stored.path, task="new", timeout=0)


def test_a_read_only_file_system(stored: Stored, small_disk: Path) -> None:
    there = Stored(small_disk / "zoo.tall", stored.base, stored.tasks)
    shutil.copyfile(stored.path, there.path)
    before = there.path.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    there.check()
    for use in (
        lambda: tallstore.save(stored.base, there.path, overwrite=True),
        lambda: tallstore.save(stored.base, there.path, task="new"),
        lambda: tallstore.save(stored.base, small_disk / "new.tall"),
        lambda: tallstore.pack(small_disk / "new.tall", stored.base, {"t": stored.base}),
        lambda: remove(there.path, "one"),
        lambda: tallstore.compact(there.path),
    ):
        with refused(StoreReadOnlyError, small_disk, "no permission"):
            use()
    assert there.path.read_bytes() == before
    assert [p.name for p in small_disk.iterdir()] == ["zoo.tall"]


@pytest.mark.skipif(os.getuid() != 0, reason="takes root to become somebody without rights")
def test_files_and_directories_without_permission(stored: Stored) -> None:
    code = """
import os, shutil, sys, tempfile
import torch, tallstore, tallstore.loading, tallstore.checking, tallstore.writing
import tallstore.opening, tallstore.packing.pack, zoo
from helpers import assert_same
from stored import remove
from tallstore.errors import StoreReadOnlyError
place = tempfile.mkdtemp()
path = os.path.join(place, "zoo.tall")
secret = os.path.join(place, "secret.tall")
shutil.copyfile(sys.argv[1], path)
shutil.copyfile(sys.argv[1], secret)
os.chmod(place, 0o755)
os.chmod(path, int(sys.argv[2], 8))
os.chmod(secret, 0o600)
root = os.fork()
if root:
    status = os.waitpid(root, 0)[1]
    files = sorted(os.listdir(place))
    shutil.rmtree(place)
    assert files == ["secret.tall", "zoo.tall"], files
    sys.exit(os.waitstatus_to_exitcode(status))
os.setgid(65534)
os.setuid(65534)
base = zoo.make_base()
assert_same(tallstore.load(path), base)
with tallstore.open(path, "a") as store:
    assert_same(store.load("one"), zoo.fine_tune(base, 1))
    assert store.verify().ok
for use in (
    lambda: tallstore.save(base, path, overwrite=True),
    lambda: tallstore.save(base, path, task="new"),
    lambda: tallstore.save(base, os.path.join(place, "new.tall")),
    lambda: tallstore.compact(path),
    lambda: remove(path, "one"),
    lambda: tallstore.load(secret),
):
    try:
        use()
    except StoreReadOnlyError as exc:
        assert "no permission" in str(exc) and place in str(exc), exc
        assert isinstance(exc, PermissionError)
    else:
        raise SystemExit("nobody may do that")
assert_same(tallstore.load(path), base)
"""
    for mode in ("444", "666"):
        run_child(code, stored.path, mode)
    stored.check()


def test_a_failing_device(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with refused(StoreIOError, stored.path, "cannot write", "Input/output error"):
        tallstore.save(stored.base, stored.path, overwrite=True)
    monkeypatch.undo()
    stored.check()


def test_tidying_up_that_fails_after_a_write(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB begins nothing more then; what was written is there all the same, and is not refused."""
    failure = StoreFullError("no room to tidy up")

    def panicking(path: Path) -> Snapshot:
        monkeypatch.undo()
        raise failure

    with tallstore.open(stored.path, "a") as store:
        environment = store._held()._environment
        assert environment is not None
        environment.failure = failure
        monkeypatch.setattr("tallstore.store.open_snapshot", panicking)
        with pytest.warns(StoreWarning, match="is there, but this handle cannot .*no room to tidy"):
            store.add({"new": fine_tune(make_base(), 9)})
        assert "new" not in store.tasks
        monkeypatch.setattr("tallstore.store.open_snapshot", panicking)
        environment.failure = None
        with pytest.raises(StoreFullError, match="no room to tidy up"):
            store.remove("new")
    with tallstore.open(stored.path) as store:
        assert "new" not in store.tasks


def test_truncation_is_no_corruption_of_another_kind() -> None:
    assert issubclass(TruncatedStoreError, CorruptStoreError)
