"""Writing a safetensors file piece by piece."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tallstore.engine.filesystem import free_room, sync_directory
from tallstore.engine.temporary import claimed, remove_stale
from tallstore.errors import (
    OptionError,
    StoreFullError,
    StoreIOError,
    StoreReadOnlyError,
    TallstoreError,
    UnknownTensorError,
)
from tallstore.sources.safetensors_format import TensorLayout, plan_file, quoted

__all__ = ["SafetensorsWriter"]

#: Linux moves at most 2 GiB a call and macOS refuses more; the rest is written in further calls.
_CALL_BYTES: Final = 1 << 30


class _Coverage:
    """Which bytes of a run were written: disjoint intervals, in order, neighbours joined."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._done: list[tuple[int, int]] = []

    def add(self, begin: int, end: int) -> None:
        if begin == end:
            return
        apart: list[tuple[int, int]] = []
        for low, high in self._done:
            if high < begin or end < low:
                apart.append((low, high))
            else:
                begin, end = min(begin, low), max(end, high)
        self._done = sorted([*apart, (begin, end)])

    @property
    def missing(self) -> int:
        return self._size - sum(high - low for low, high in self._done)


class SafetensorsWriter:
    """Writes one safetensors file piece by piece; it appears whole or not at all.

    Use it as a context manager. The bytes go to a temporary file in the same directory, which
    on a clean exit is synced to the device and renamed to `path`, and on an error removed.

    Parameters
    ----------
    path
        The file to make; what is there is replaced, at the end.
    tensors
        Name, torch's name of the dtype, and shape of each tensor.
    metadata
        For ``__metadata__``.

    Raises
    ------
    StoreFullError, StoreReadOnlyError, StoreIOError
        The operating system refused, here or in `write` or on exit.
    OptionError, UnsupportedObjectError
        As `build_header`.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Sequence[TensorLayout],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._header, self._tensors = plan_file(tensors, metadata)
        self._coverage = {name: _Coverage(t.end - t.begin) for name, t in self._tensors.items()}
        self._lock = threading.Lock()
        self._temporary: Path | None = None
        self._fd = -1
        self._claim: int | None = None
        #: Size in bytes of the whole file.
        self.nbytes = max((t.end for t in self._tensors.values()), default=len(self._header))

    def __enter__(self) -> SafetensorsWriter:
        if self.path.is_dir():
            raise StoreIOError(f"{self.path} is a directory; name a file to write")
        remove_stale(self.path.parent, r"\.tallstore-[0-9a-f]{16}\.tmp")
        try:
            while self._claim is None:
                self._make()
            os.ftruncate(self._fd, self.nbytes)
            self._pwrite(memoryview(self._header), 0)
        except OSError as exc:
            self._discard()
            raise self._error(exc) from exc
        except BaseException:
            self._discard()
            raise
        return self

    def _make(self) -> None:
        # Not a prefix of the name: that may have all 255 bytes already.
        temporary = self.path.parent / f".tallstore-{secrets.token_hex(8)}.tmp"
        if self._fd >= 0:
            os.close(self._fd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(temporary, flags, 0o666)
        self._temporary = temporary
        self._claim = claimed(temporary)

    def write(self, name: str, start_byte: int, data: Any) -> None:
        """Write bytes of the tensor `name`, from its byte `start_byte` on. Thread-safe.

        Parameters
        ----------
        name
            One of the tensors given.
        start_byte
            Pieces may come in any order and size.
        data
            Any C-contiguous buffer.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise UnknownTensorError(f"{self.path}: no tensor {quoted(name)} was announced for it")
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        size = tensor.end - tensor.begin
        if start_byte < 0 or start_byte + len(view) > size:
            raise OptionError(
                f"{self.path}: bytes {start_byte} to {start_byte + len(view)} are not within "
                f"tensor {quoted(name)} of {size} bytes"
            )
        if self._fd < 0:
            raise OptionError(f"{self.path} is not open for writing; use `with` on its writer")
        try:
            self._pwrite(view, tensor.begin + start_byte)
        except OSError as exc:
            raise self._error(exc) from exc
        with self._lock:
            self._coverage[name].add(start_byte, start_byte + len(view))

    def __exit__(self, kind: object, *exc: object) -> None:
        try:
            if kind is None:
                self._check_complete()
                self._publish()
        finally:
            self._discard()

    def _pwrite(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done : done + _CALL_BYTES], offset + done)

    def _check_complete(self) -> None:
        for name, coverage in self._coverage.items():
            if missing := coverage.missing:
                raise OptionError(
                    f"{self.path} was not written: tensor {quoted(name)} lacks {missing} bytes; "
                    "write every tensor before leaving the writer"
                )

    def _publish(self) -> None:
        assert self._temporary is not None
        try:
            os.fsync(self._fd)
            os.replace(self._temporary, self.path)
            self._temporary = None
            sync_directory(self.path.parent)
        except OSError as exc:
            raise self._error(exc) from exc

    def _discard(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        claim, self._claim = self._claim, None
        if claim is not None:
            os.close(claim)

    def _error(self, exc: OSError) -> TallstoreError:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            free = free_room(self.path.parent)
            there = "" if free is None else f", {free} are free"
            return StoreFullError(
                f"no room to write {self.path}: the device or quota is full; it needs "
                f"{self.nbytes} bytes{there}; free them or write elsewhere"
            )
        if exc.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return StoreReadOnlyError(
                f"{self.path} cannot be written: {exc.strerror}; choose a directory that you "
                "may write to"
            )
        if exc.errno == errno.ENOENT:
            return StoreIOError(
                f"{self.path} cannot be written: there is no directory {self.path.parent}; "
                "make it first"
            )
        return StoreIOError(
            f"{self.path} cannot be written: {exc.strerror or exc}; check the path and the device"
        )
