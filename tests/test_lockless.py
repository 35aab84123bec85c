"""Readers that may not write the lock file have no slot in it; writers see them all the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_concurrency import check_version, version
from zoo import child_environment

import tallstore
from tallstore.errors import StoreLockedError

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or sys.platform != "linux", reason="takes root to become somebody else"
)

#: A reader without rights, which keeps one handle open and loads whenever it is told to.
READER = """
import os, sys
import tallstore, tallstore.loading, tallstore.checking
from test_concurrency import check_version
path = sys.argv[1]
os.setgid(65534)
os.setuid(65534)
store = tallstore.open(path)
print("open", flush=True)
for line in sys.stdin:
    if line == "close\\n":
        store.close()
        print("closed", flush=True)
    else:
        print(check_version(store.load("t")), store.verify().ok, flush=True)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """Where anybody may read: pytest's own directories are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


class Reader:
    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, str(path)],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.ask() == "open"

    def ask(self, what: str = "") -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        if what:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.communicate(timeout=60)


def test_a_writer_waits_for_a_reader_without_a_slot(place: Path) -> None:
    path = place / "zoo.tall"
    tallstore.save(version(0), path)
    tallstore.save(version(0), path, task="t")
    reader = Reader(path)
    try:
        assert reader.ask("load") == "0 True"
        for number in range(1, 6):
            with pytest.raises(StoreLockedError, match=r"may not write .*zoo\.tall-lock"):
                tallstore.save(version(number), path, task="t", overwrite=True, timeout=0.1)
            assert reader.ask("load") == "0 True"
        assert reader.ask("close") == "closed"
        tallstore.save(version(9), path, task="t", overwrite=True, timeout=0)
        assert check_version(tallstore.load(path, task="t")) == 9
    finally:
        reader.end()
    assert os.listdir(place) == ["zoo.tall"]


def test_a_reader_without_a_slot_does_not_wait_for_a_writer(place: Path) -> None:
    path = place / "zoo.tall"
    tallstore.save(version(0), path)
    tallstore.save(version(0), path, task="t")
    readers = []
    step = tallstore.engine.session.WriteSession.step
    try:

        def stop(self: object, name: str) -> None:
            if name == "synced" and not readers:
                readers.append(Reader(path))
                assert readers[0].ask("load") == "0 True"

        tallstore.engine.session.WriteSession.step = stop  # type: ignore[method-assign]
        tallstore.save(version(1), path, task="t", overwrite=True)
        assert readers[0].ask("load") == "0 True"
        with pytest.raises(StoreLockedError):
            tallstore.compact(path, timeout=0.1)
        assert readers[0].ask("load") == "0 True"
    finally:
        tallstore.engine.session.WriteSession.step = step  # type: ignore[method-assign]
        for reader in readers:
            reader.end()
    assert check_version(tallstore.load(path, task="t")) == 1
