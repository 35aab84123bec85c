"""Reading a checkpoint's file: exact, thread-safe, and never fooled by one that changes."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import numpy as np

from tallstore.errors import CheckpointError
from tallstore.sources.source import Bytes

__all__ = ["ReadOnlyFile", "foreign_cause", "read_error"]

#: Linux moves at most 2 GiB a call and macOS refuses more; the rest is read in further calls.
_CALL_BYTES: Final = 1 << 30

#: Contents that people hand over in place of a checkpoint: first bytes, what it is and the cure.
_FOREIGN: Final = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights; run `git lfs pull`, or download it again",
    ),
    (
        b"GGUF",
        "is a GGUF file, whose weights are quantized for llama.cpp; "
        "give the checkpoint that it was converted from",
    ),
    (
        b"\x89HDF\r\n\x1a\n",
        "is an HDF5 file (Keras or TensorFlow); convert it to safetensors first",
    ),
    (
        b"\x93NUMPY",
        "is a numpy array without a name; save a dict of tensors with safetensors instead",
    ),
    (b"<!DOCTYPE", "is a web page, not a checkpoint; the download failed, download it again"),
    (b"<html", "is a web page, not a checkpoint; the download failed, download it again"),
)


def foreign_cause(head: bytes) -> str | None:
    """What a file that starts with `head` is, where that is a known mistake, and the cure."""
    for magic, cause in _FOREIGN:
        if head.startswith(magic):
            return cause
    return None


def read_error(path: str | Path, exc: OSError) -> CheckpointError:
    """`exc`, raised on opening or reading `path`, as an error that says what to do."""
    if isinstance(exc, FileNotFoundError):
        if Path(path).is_symlink():
            return CheckpointError(
                f"{path} is a link to {os.readlink(path)}, which is not there; download it again"
            )
        return CheckpointError(f"{path}: no such file or directory; check the path")
    if isinstance(exc, PermissionError):
        return CheckpointError(f"{path} cannot be read: permission denied; check its mode")
    reason = exc.strerror or str(exc)
    return CheckpointError(f"{path} cannot be read: {reason}; check the path and the device")


class ReadOnlyFile:
    """A regular file, open for positioned reads.

    There is no memory map: pages read do not stay in this process, and a file that somebody
    truncates meanwhile is an error message, not a SIGBUS.

    Parameters
    ----------
    path
        The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = -1
        try:
            # O_NONBLOCK: opening a named pipe must fail below, not wait for its writer.
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
            self._fd = os.open(self.path, flags)
            status = os.fstat(self._fd)
        except OSError as exc:
            self.close()
            raise read_error(self.path, exc) from exc
        except ValueError as exc:
            raise CheckpointError(f"{str(path)!r} is not a path: {exc}") from exc
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise CheckpointError(f"{self.path} is {kind}, not a file; give a checkpoint file")
        self.size = status.st_size
        self._identity = (status.st_dev, status.st_ino)
        self._mtime_ns = status.st_mtime_ns

    def read_into(self, offset: int, out: Bytes) -> None:
        """Fill `out` with the bytes from `offset` on. Thread-safe.

        Raises
        ------
        CheckpointError
            The file changed since it was opened, ends too early, or cannot be read.
        """
        if self._fd < 0:
            raise CheckpointError(f"{self.path} was closed; open it again to read from it")
        view = out.data.cast("B")
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done : done + _CALL_BYTES]], offset + done)
                if count == 0:
                    break
                done += count
            status = os.fstat(self._fd)
        except OSError as exc:
            raise read_error(self.path, exc) from exc
        if status.st_size != self.size or status.st_mtime_ns != self._mtime_ns:
            raise CheckpointError(
                f"{self.path} changed while it was being read ({self.size} bytes when opened, "
                f"{status.st_size} now); wait until its writer is done and start again"
            )
        if done < len(view):
            raise CheckpointError(
                f"{self.path} ends at byte {self.size}, but bytes up to {offset + len(view)} "
                "are needed; it is truncated, copy or download it again"
            )

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        out = np.empty(size, np.uint8)
        self.read_into(offset, out)
        return out.tobytes()

    def is_at(self, path: str | Path) -> bool:
        """Whether `path` still leads to this very file."""
        status = os.stat(path)
        return (status.st_dev, status.st_ino) == self._identity

    def close(self) -> None:
        """Close it; once more does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> ReadOnlyFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()
