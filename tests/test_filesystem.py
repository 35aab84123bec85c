"""What a store lies on: kinds of file systems, network ones warned of, room, directory syncs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from zoo import fine_tune, make_base, run_child

import tallstore
from tallstore.engine import filesystem, writerlock
from tallstore.engine.filesystem import FileSystem, file_system, free_room, sync_directory
from tallstore.errors import StoreIOError, StoreWarning

MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
40 22 0:40 / /home rw,relatime shared:7 - nfs4 server:/export/home rw,vers=4.2,hard
41 40 0:41 / /home/local rw,relatime - xfs /dev/sdb1 rw
42 22 0:42 /sub /mnt/a\\040b rw - cifs //server/share\\134x rw
43 22 0:43 / /mnt/remote rw - fuse.sshfs me@there: rw
44 22 8:1 / /mnt/usb ro,relatime - fuseblk /dev/sdc1 rw
45 22 0:45 / /mnt/plain rw - fuse.gocryptfs /secret rw
46 22 0:46 / /mnt/unheard rw - fuse.somethingnew x rw
47 22 0:47 / /mnt/unheard rw - tmpfs over rw
48 22 7:0 / /media/disc rw - iso9660 /dev/sr0 ro
49 22 0:49 / /mnt/host rw - 9p shared rw
50 22 0:50 / /run/\\011tab rw - virtiofs share rw
this line says nothing
"""


@pytest.mark.parametrize(
    ("path", "kind", "network", "read_only"),
    [
        ("/", "ext4", False, False),
        ("/data/zoo.tall", "ext4", False, False),
        ("/homeless/zoo.tall", "ext4", False, False),
        ("/home/me/zoo.tall", "nfs4", True, False),
        ("/home/local/zoo.tall", "xfs", False, False),
        ("/mnt/a b/zoo.tall", "cifs", True, False),
        ("/mnt/remote/deep/down/zoo.tall", "fuse.sshfs", True, False),
        ("/mnt/usb/zoo.tall", "fuseblk", False, True),
        ("/mnt/plain/zoo.tall", "fuse.gocryptfs", False, False),
        ("/mnt/unheard/zoo.tall", "tmpfs", False, False),
        ("/media/disc/zoo.tall", "iso9660", False, True),
        ("/mnt/host/zoo.tall", "9p", True, False),
        ("/run/\ttab/zoo.tall", "virtiofs", True, False),
    ],
)
def test_kinds(path: str, kind: str, network: bool, read_only: bool) -> None:
    found = file_system(Path(path), mounts=MOUNTS)
    assert (found.kind, found.network, found.read_only) == (kind, network, read_only)


def test_fields_are_unescaped() -> None:
    found = file_system(Path("/mnt/a b/c"), mounts=MOUNTS)
    assert (found.mount_point, found.source) == ("/mnt/a b", "//server/share\\x")


def test_where_nobody_says() -> None:
    assert file_system(Path("/x/y"), mounts="") == FileSystem("unknown", "", "", False, False)


def test_this_machine(tmp_path: Path) -> None:
    found = file_system(tmp_path / "not" / "there")
    assert found.kind and not found.read_only
    assert file_system(Path("/proc/self/maps")).kind in ("proc", "unknown")
    room = free_room(tmp_path / "not" / "there")
    status = os.statvfs(tmp_path)
    assert room is not None
    assert abs(room - status.f_bavail * status.f_frsize) < 1 << 30


def test_a_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    link = tmp_path / "link.tall"
    link.symlink_to("/mnt/remote/zoo.tall")
    assert file_system(link, mounts=MOUNTS).kind == "fuse.sshfs"


@pytest.fixture
def on_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    found = FileSystem("nfs4", "server:/export", "/home", False, True)
    monkeypatch.setattr(filesystem, "file_system", lambda path: found)


@pytest.mark.usefixtures("on_a_network")
def test_writing_over_a_network_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    base = make_base()
    wanted = r"zoo\.tall: on a file system that other machines may share \(nfs4, server:/export"
    with pytest.warns(StoreWarning, match=wanted):
        tallstore.save(base, path)
    with pytest.warns(StoreWarning, match="keep it on a local disk"):
        tallstore.save(fine_tune(base, 1), path, task="t")
    with tallstore.open(path) as store:  # reading is not: a warning is an error here
        assert store.verify().ok
    assert os.listdir(tmp_path) == ["zoo.tall"]


@pytest.mark.usefixtures("on_a_network")
def test_a_warning_made_an_error_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    for _ in range(2):
        with pytest.raises(StoreWarning):
            tallstore.save(make_base(), path, timeout=0)
    assert os.listdir(tmp_path) == []
    assert writerlock.WriterLock(path, timeout=0)._descriptor == -1


def test_warned_once(tmp_path: Path) -> None:
    code = """
import sys, tallstore
from tallstore.engine import filesystem
from zoo import make_base
found = filesystem.FileSystem("cifs", "//server/share", "/mnt", False, True)
filesystem.file_system = lambda path: found
for name in ("a.tall", "a.tall", "b.tall", "a.tall"):
    tallstore.save(make_base(), sys.argv[1] + "/" + name)
"""
    said = run_child(code, tmp_path).stderr
    assert said.count("a.tall: on a file system") == 1
    assert said.count("b.tall: on a file system") == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_directory_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    sync_directory(tmp_path)


def test_a_directory_sync_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreIOError, match="Input/output error"):
        tallstore.save(make_base(), tmp_path / "zoo.tall")
