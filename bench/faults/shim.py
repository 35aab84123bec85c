"""Building and arming ``shim.c``, and reading what it recorded."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["FAIL", "HALF", "KILL", "STICKY", "Event", "Shim", "build", "read_log"]

#: What happens at the call that was chosen: it fails, the process dies, of a write after half of
#: it; and whether later calls fail too.
FAIL, KILL, HALF, STICKY = 1, 2, 4, 8
#: Kinds of calls: write, truncate, sync, create, rename, unlink, mkdir, allocate; p, a read.
CHANGES: Final = "wtsoruda"

_SOURCE: Final = Path(__file__).with_name("shim.c")
_HEAD: Final = struct.Struct("<BBHHQQQ")


def build(folder: Path | None = None) -> Path | None:
    """Compile the shim into `folder`; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    out = Path(folder or tempfile.mkdtemp(prefix="tallstore-shim-")) / "shim.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", out, _SOURCE, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return out


@dataclass(frozen=True, slots=True)
class Event:
    """One recorded call."""

    kind: str
    durable: bool
    """A write through a descriptor that syncs each write."""
    path: str
    second: str
    data: bytes
    offset: int
    inode: int
    size: int


class Shim:
    """The shim of this process, which was started with it preloaded."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.fault_count.restype = ctypes.c_long

    def arm(
        self,
        directory: Path,
        *,
        log: Path | None = None,
        at: int = 0,
        error: int = 0,
        kinds: str = CHANGES,
        action: int = 0,
    ) -> None:
        """Watch `directory`: do `action` at call number `at` (from 1; 0: only count)."""
        self._library.fault_arm(
            os.fsencode(os.path.realpath(directory)),
            os.fsencode(log or ""),
            ctypes.c_long(at),
            ctypes.c_int(error),
            kinds.encode(),
            ctypes.c_int(action),
        )

    def disarm(self) -> None:
        self._library.fault_disarm()

    def mark(self, text: str) -> None:
        """Put a mark into the log."""
        self._library.fault_mark(text.encode())

    @property
    def count(self) -> int:
        """Calls that counted so far."""
        return int(self._library.fault_count())


def read_log(path: Path) -> Iterator[Event]:
    """The recorded calls, in order."""
    data = path.read_bytes()
    at = 0
    while at < len(data):
        kind, flags, first, second, size, offset, inode = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        name = os.fsdecode(data[at : at + first])
        at += first
        other = os.fsdecode(data[at : at + second])
        at += second
        payload = data[at : at + size]
        at += size
        yield Event(chr(kind), bool(flags), name, other, payload, offset, inode, size)
