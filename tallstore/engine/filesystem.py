"""What a store lies on: the kind of file system, whether other machines share it, its room."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tallstore.errors import StoreWarning

__all__ = ["FileSystem", "file_system", "free_room", "sync_directory", "warn_of_network"]

_MOUNTS: Final = Path("/proc/self/mountinfo")
#: Several machines, or a host and its guest, may have the same file.
_NETWORK: Final = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "drvfs",
        "gfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "mvfs",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "prl_fs",
        "pvfs2",
        "smb2",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
        "vmhgfs",
        "wekafs",
    ]
)
#: FUSE file systems over what is mounted on this machine; any other may be a network's.
_LOCAL_FUSE: Final = frozenset(
    [
        "bindfs",
        "encfs",
        "exfat",
        "fuse-overlayfs",
        "fuse-zip",
        "gocryptfs",
        "mergerfs",
        "ntfs",
        "ntfs-3g",
        "overlayfs",
        "portal",
        "squashfuse",
    ]
)
#: What a file system answers that cannot sync a directory at all.
_NO_DIRECTORY_SYNC: Final = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})


@dataclass(frozen=True, slots=True)
class FileSystem:
    """The file system that a path lies on."""

    kind: str
    """As the kernel calls it: "ext4", "nfs4", "fuse.sshfs"; "unknown" where it does not say."""
    source: str
    """What is mounted: a device, or "server:/export"."""
    mount_point: str
    read_only: bool
    network: bool
    """Whether other machines may have the same files: LMDB's locks and its map do not reach them.
    """


def _unescaped(text: str) -> str:
    """A field of mountinfo, in which blanks, newlines and backslashes are octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _is_network(kind: str) -> bool:
    family, _, member = kind.partition(".")
    if family == "fuse":
        return member not in _LOCAL_FUSE
    return family in _NETWORK


def file_system(path: Path, *, mounts: str | None = None) -> FileSystem:
    """The file system that `path`, or its nearest directory that exists, lies on.

    Parameters
    ----------
    path
        A file or directory; it need not exist.
    mounts
        The text of ``/proc/self/mountinfo`` (proc_pid_mountinfo(5)); None reads it.
    """
    place = os.path.realpath(path)
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text(errors="surrogateescape")
        except OSError:
            mounts = ""
    found = FileSystem("unknown", "", "", not _writable_mount(place), False)
    for line in mounts.splitlines():
        left, dash, right = line.partition(" - ")
        mounted, described = left.split(" "), right.split(" ")
        if not dash or len(mounted) < 6 or len(described) < 3:
            continue
        point = _unescaped(mounted[4])
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        # Of two mounts on one point, the later one hides the earlier.
        if inside and len(point) >= len(found.mount_point):
            options = {*mounted[5].split(","), *described[2].split(",")}
            kind = _unescaped(described[0])
            found = FileSystem(
                kind, _unescaped(described[1]), point, "ro" in options, _is_network(kind)
            )
    return found


def _nearest(place: str) -> str:
    while not os.path.exists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    return place


def _writable_mount(place: str) -> bool:
    try:
        return not os.statvfs(_nearest(place)).f_flag & os.ST_RDONLY
    except OSError:
        return True


def free_room(path: Path) -> int | None:
    """Bytes that this user may still write where `path` lies; None where nobody says.

    Quotas are not seen.
    """
    try:
        found = os.statvfs(_nearest(os.path.realpath(path)))
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def warn_of_network(path: Path) -> None:
    """Warn, once a store and process, if `path` is about to be written over a network."""
    found = file_system(path)
    if found.network:
        warnings.warn(
            f"{path}: on a file system that other machines may share ({found.kind}, "
            f"{found.source} at {found.mount_point}). Locks and the memory map hold within one "
            "machine: write to it from one machine alone, with no readers on others, or keep it "
            "on a local disk and copy it",
            StoreWarning,
            stacklevel=2,
        )


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable.

    Raises
    ------
    OSError
        The device failed. Where a file system cannot sync directories, a rename is as durable as
        it makes it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
