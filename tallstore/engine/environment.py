"""One LMDB environment per file and process, opened the same way every time.

LMDB forbids opening a file twice in one process (closing either drops the locks of both), so
handles on one file share an environment, counted here. Each holds a shared ``flock`` on the data
file for as long as it is open: whoever wants to replace the file must get the exclusive one, so a
file never changes under LMDB's lock file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import lmdb

try:
    from lmdb import _envid
except ImportError:  # before 3.0
    _envid = None  # type: ignore[assignment]

from tallstore.advice import reserve
from tallstore.engine.datafile import check_data_file
from tallstore.engine.lockless import register
from tallstore.engine.refusals import (
    MAP_SIZE,
    MAX_READERS,
    check_path,
    lmdb_errors,
    system_refusal,
)
from tallstore.engine.waiting import attempts
from tallstore.errors import (
    NotAStoreError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
    TallstoreError,
)

__all__ = [
    "Environment",
    "create_environment",
    "is_open_here",
    "lmdb_errors",
    "lock_file",
    "open_environment",
]

_SMALLEST_MAP: Final = 1 << 28
#: Of LMDB's lock file with that many readers.
_LOCK_FILE_SIZE: Final = 1 << 15


def lock_file(path: Path) -> Path:
    """Where LMDB keeps its reader table for the data file at `path`."""
    return path.with_name(path.name + "-lock")


@dataclass(eq=False)
class Environment:
    """A counted LMDB environment; use `open_environment` and `close`."""

    path: Path
    lmdb: lmdb.Environment
    refusal: TallstoreError | None
    """Why it cannot be written; None if it can."""
    presence: int
    """File descriptor that holds the shared flock."""
    key: tuple[int, int] | None = None
    handles: int = 1
    process: int = field(default_factory=os.getpid)
    destination: Path | None = None
    """Where a file under a temporary name is to go: what messages call it."""
    walked: object = None
    """The commit that was checked last; `tallstore.engine.guard` keeps it here."""
    failure: TallstoreError | None = None
    """How the last write that failed did: LMDB may refuse everything from then on."""

    @property
    def writable(self) -> bool:
        """Whether it can be written."""
        return self.refusal is None

    @property
    def shown(self) -> Path:
        """The path for messages."""
        return self.destination or self.path

    @contextlib.contextmanager
    def errors(
        self, *, doing: str, needed: int | None = None, writing: bool = False
    ) -> Iterator[None]:
        """As `lmdb_errors`; what LMDB refuses since a write failed is refused as that write was."""
        try:
            with lmdb_errors(self.shown, doing=doing, needed=needed):
                yield
        except TallstoreError as exc:
            if isinstance(exc.__cause__, lmdb.PanicError):
                if self.failure is not None:
                    raise self.failure from exc
            elif writing:
                self.failure = exc
            raise

    def paged_bytes(self) -> int:
        """Bytes that the file must have for the pages of the newest transaction."""
        return int((self.lmdb.info()["last_pgno"] + 1) * self.lmdb.stat()["psize"])

    def close(self) -> None:
        """Give one handle back; the last one closes the environment."""
        with _REGISTRY.lock:
            self.handles -= 1
            if self.handles:
                return
            if self.key is not None and _REGISTRY.opened.get(self.key) is self:
                del _REGISTRY.opened[self.key]
            if self.process == os.getpid():
                self.lmdb.close()
                self._remove_lock_file()
            if self.presence >= 0:
                os.close(self.presence)

    def _remove_lock_file(self) -> None:
        """Leave no litter: LMDB's lock file goes with the last user of the data file."""
        if not self.writable:
            return
        with contextlib.suppress(OSError):
            if self.key is None:  # nobody else's
                lock_file(self.path).unlink(missing_ok=True)
                return
            fcntl.flock(self.presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self.presence), self.path.stat()):
                lock_file(self.path).unlink(missing_ok=True)

    def replace_with(self, other: Path, *, timeout: float) -> None:
        """Put the file `other` into this one's place, and close this handle.

        Waits until no other handle, in any process, is open: LMDB's lock file goes by name, and
        must never serve two files at once.

        Raises
        ------
        StoreLockedError
            Others still had it open after `timeout` seconds; nothing was changed.
        """
        told = f"{self.path}: in use by another reader"
        if not any(self._replaced(other) for _ in attempts(timeout, lambda: told)):
            self.close()
            raise StoreLockedError(
                f"{told}; close it and try again, or wait longer than {timeout:g} s (timeout=). "
                "Nothing was changed"
            )

    def _replaced(self, other: Path) -> bool:
        # In one hold of the registry: a thread that opens the file waits for the flock in there.
        with _REGISTRY.lock, lmdb_errors(self.path, doing="replace"):
            if not self.try_exclusive():
                return False
            try:
                self.lmdb.close()
                if self.key is not None:
                    del _REGISTRY.opened[self.key]
                self.handles = 0
                # First the lock file, then the data file: whoever comes between waits for the
                # flock.
                lock_file(self.path).unlink(missing_ok=True)
                os.replace(other, self.path)
            finally:
                os.close(self.presence)
            return True

    def in_use_elsewhere(self) -> bool:
        """Whether another process has the file open at this moment."""
        try:
            fcntl.flock(self.presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            fcntl.flock(self.presence, fcntl.LOCK_SH)
        return False

    def try_exclusive(self) -> bool:
        """Whether this is the only open handle on the file, in any process; holds others off."""
        with _REGISTRY.lock:
            if self.handles != 1:
                return False
            try:
                fcntl.flock(self.presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                # A failed upgrade may have dropped the shared lock: take it again.
                fcntl.flock(self.presence, fcntl.LOCK_SH)
                return False
            return True


class _Registry:
    """The open environments of this process, by device and inode."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.opened: dict[tuple[int, int], Environment] = {}
        self.inherited: list[Environment] = []

    def forget(self) -> None:
        """In a forked child: LMDB's handles belong to the parent; keep them, never close them."""
        self.lock = threading.RLock()
        for environment in self.opened.values():
            self.inherited.append(environment)
            # The lock stays the parent's: a child that lives on must not hold it too.
            with contextlib.suppress(OSError):
                os.close(environment.presence)
            environment.presence = -1
        self.opened = {}
        _forget_identities()


def _forget_identities() -> None:
    """Let py-lmdb open anew, in a forked child, what the parent has open.

    From 3.0 on it refuses a file of which the process, or a parent, has an environment; its
    handles cannot be closed here, since that would free the parent's reader slots. So files get
    another identity in each child; this module sees to it that each is opened once.
    """
    known = getattr(_envid, "env_keys", None)
    if known is not None:
        process = os.getpid()

        def env_keys(*arguments: Any) -> tuple[Any, ...]:
            return tuple((process, key) for key in known(*arguments))

        _envid.env_keys = env_keys


# The one piece of process-wide state: LMDB itself demands it.
_REGISTRY: Final = _Registry()
os.register_at_fork(after_in_child=_REGISTRY.forget)


def _lmdb_open(
    path: Path, *, readonly: bool, lock: bool, create: bool, sync: bool = True
) -> lmdb.Environment:
    options: dict[str, Any] = {
        "sync": sync,
        "subdir": False,
        "readonly": readonly,
        "lock": lock,
        "create": create,
        "readahead": True,
        "writemap": False,
        "meminit": True,
        "max_readers": MAX_READERS,
        "mode": 0o666,
        "max_spare_txns": 1,
    }
    size = MAP_SIZE
    if path.exists():
        size = max(size, 4 * path.stat().st_size)
    while True:
        try:
            try:
                # py-lmdb 3 carries two formats that cannot read each other: pin the old one.
                return lmdb.Environment(str(path), map_size=size, lib_version=0, **options)
            except TypeError:
                return lmdb.Environment(str(path), map_size=size, **options)
        except lmdb.MemoryError:
            # Address space is limited here (ulimit -v): a smaller map, grown when needed.
            if size <= _SMALLEST_MAP:
                raise
            size //= 4


def _can_write(path: Path) -> bool:
    lock = lock_file(path)
    lockable = os.access(lock, os.W_OK) if lock.exists() else os.access(path.parent, os.W_OK)
    return os.access(path, os.W_OK) and lockable


def _make_lock_file(path: Path) -> None:
    """Have the room that LMDB's lock file takes set aside.

    LMDB writes it through a map: on a full disk that would kill the process, even to read.
    """
    descriptor = os.open(lock_file(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        reserve(descriptor, os.fstat(descriptor).st_size or _LOCK_FILE_SIZE)
    finally:
        os.close(descriptor)


def _prepare_lock_file(path: Path) -> tuple[bool, TallstoreError | None]:
    """Whether there is a lock file to use, and why the store cannot be written, if it cannot."""
    refusal: TallstoreError | None = None
    if not _can_write(path):
        refusal = StoreReadOnlyError(
            f"{path}: it cannot be written, no permission; check those of the file, of its "
            "directory and of the file system"
        )
        if not os.access(lock_file(path), os.W_OK):
            return False, refusal
    try:
        _make_lock_file(path)
    except OSError as exc:
        found = system_refusal(exc.errno, lock_file(path), "make it", _LOCK_FILE_SIZE, str(exc))
        return False, refusal or found
    return True, refusal


def _presence(path: Path) -> int:
    """A descriptor with a shared flock on the file that `path` names right now."""
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_open_here(path: Path) -> bool:
    """Whether this process has the LMDB file at `path` open."""
    status = path.stat()
    with _REGISTRY.lock:
        return (status.st_dev, status.st_ino) in _REGISTRY.opened


def open_environment(path: Path) -> Environment:
    """Open the LMDB file at `path`, or take another handle on it.

    It is opened for writing wherever the file allows it, since all handles of a process share
    it; on a read-only file or file system it is opened read-only, without locks if need be.

    Raises
    ------
    StoreNotFoundError, NotAStoreError, TruncatedStoreError, StoreIOError, OptionError
    """
    check_path(path)
    if path.is_dir():
        raise NotAStoreError(f"{path}: a directory, not a tallstore file")
    with _REGISTRY.lock, lmdb_errors(path, doing="open"):
        if not path.exists():
            raise StoreNotFoundError(f"{path}: no such store")
        presence = _presence(path)
        try:
            status = os.fstat(presence)
            key = (status.st_dev, status.st_ino)
            found = _REGISTRY.opened.get(key)
            if found is not None:
                found.handles += 1
                os.close(presence)
                return found
            check_data_file(presence, path)
            lock, refusal = _prepare_lock_file(path)
            if not lock:
                register(presence)
            opened = _lmdb_open(path, readonly=refusal is not None, lock=lock, create=False)
        except BaseException:
            os.close(presence)
            raise
        if lock:
            opened.reader_check()  # slots of readers that were killed would pin old pages
        environment = Environment(path, opened, refusal, presence, key)
        _REGISTRY.opened[key] = environment
        return environment


def create_environment(path: Path, *, destination: Path) -> Environment:
    """Make an empty LMDB file at `path`, where nothing is yet, for this caller alone.

    It is to be moved to `destination`, which messages name.

    Its transactions are not synced one by one: nobody knows the file until it is moved to its
    place, and `WriteSession.commit` syncs it before that. It has a reader table all the same:
    without one, LMDB would use pages again that this process's own snapshots still read.
    """
    check_path(destination)
    with lmdb_errors(destination, doing="create", needed=_LOCK_FILE_SIZE):
        _make_lock_file(path)
        opened = _lmdb_open(path, readonly=False, lock=True, create=True, sync=False)
        presence = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(presence, fcntl.LOCK_EX)
        return Environment(path, opened, None, presence, destination=destination)
