"""What a reader sees: one generation of a store, for as long as it likes."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tallstore.advice import fault_in, release_pages
from tallstore.codecs import Bytes
from tallstore.engine.chunk import HEADER_SIZE, CheckedChunk, check_chunk
from tallstore.engine.environment import Environment, lmdb_errors
from tallstore.engine.guard import begin_reading, page_damage, stray_keys
from tallstore.engine.keys import MANIFEST_KEY, Stream, chunk_key
from tallstore.engine.manifest import Manifest
from tallstore.errors import (
    CorruptStoreError,
    NotAStoreError,
    StoreClosedError,
    TallstoreError,
    TruncatedStoreError,
)

__all__ = ["Closable", "Snapshot"]


class Closable(Protocol):
    """Something to be closed."""

    def close(self) -> None: ...


_Companion = TypeVar("_Companion", bound=Closable)
_Result = TypeVar("_Result")


class Snapshot:
    """One LMDB read transaction and the manifest in it.

    It holds a handle on `environment`, given back by `close`. Reading chunks is thread-safe.

    Raises
    ------
    NotAStoreError, NewerFormatError, CorruptStoreError
    """

    def __init__(self, environment: Environment) -> None:
        self.path: Path = environment.path
        self._environment: Environment | None = environment
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._beside: dict[Hashable, Any] = {}
        with environment.errors(doing="read"):
            self._transaction, self._walked = begin_reading(environment)
            self._nbytes = environment.paged_bytes()
            try:
                self._check_run(MANIFEST_KEY, f"{self.path}: manifest")
                value = self._transaction.get(MANIFEST_KEY)
                if value is None:
                    raise NotAStoreError(f"{self.path}: an LMDB file, but not a tallstore")
                fault_in(value)
                self.manifest = Manifest.from_bytes(value, what=str(self.path))
            except BaseException:
                self._transaction.abort()
                raise

    @property
    def failed_write(self) -> TallstoreError | None:
        """How a write of this process to the same file failed, after which LMDB begins nothing."""
        return None if self._environment is None else self._environment.failure

    def close(self) -> None:
        """End the transaction, so that its pages can be used again."""
        environment, self._environment = self._environment, None
        beside, self._beside = self._beside, {}
        for companion in beside.values():
            companion.close()
        if environment is not None:
            if self._process == os.getpid():
                self._transaction.abort()
            environment.close()

    def beside(self, key: Hashable, make: Callable[[], _Companion]) -> _Companion:
        """What `make` gave when it was first asked for under `key`: closed with this snapshot.

        Raises
        ------
        StoreClosedError
            This snapshot was closed.
        """
        with self._lock:
            if self._environment is None or self._process != os.getpid():
                raise self._closed()
            if key not in self._beside:
                self._beside[key] = make()
            found: _Companion = self._beside[key]
            return found

    def _closed(self) -> StoreClosedError:
        return StoreClosedError(
            f"{self.path}: this handle was closed, or opened before a fork; open it again"
        )

    def stream(self, number: int) -> Stream:
        """The record of a live stream."""
        try:
            return self.manifest.streams[number]
        except KeyError:
            raise CorruptStoreError(
                f"{self.path}: stream {number} is referred to but not in the manifest"
            ) from None

    def _value(self, key: bytes, what: str) -> memoryview:
        if self._environment is None or self._process != os.getpid():
            raise self._closed()
        with self._lock, self._environment.errors(doing=f"read {what}"):
            # LMDB does not look, and pages behind the end of the file would kill the process.
            if os.fstat(self._environment.presence).st_size < self._nbytes:
                raise TruncatedStoreError(
                    f"{self.path}: somebody cut the file short while it was open; restore it "
                    "from a copy"
                )
            self._check_run(key, what)
            value: memoryview | None = self._transaction.get(key)
        if value is None:
            raise CorruptStoreError(f"{what} is missing from the store")
        return value

    def _check_run(self, key: bytes, what: str) -> None:
        if self._environment is not None:
            self._walked.check_run(self._environment.presence, key, what=what)

    def _checked(self, stream: Stream, chunk: int, what: str) -> tuple[memoryview, CheckedChunk]:
        key = chunk_key(stream.number, chunk)
        value = self._value(key, what)
        if len(value) > HEADER_SIZE + stream.stored:
            # Before a byte is touched: a damaged length would lead past the file's end.
            raise CorruptStoreError(f"{what}: {len(value)} bytes, more than its whole stream")
        with lmdb_errors(self.path, doing=f"read {what}"):
            fault_in(value)
        return value, check_chunk(value, store=self.manifest.store, key=key, what=what)

    def _what(self, stream: Stream, chunk: int) -> str:
        return f"{self.path}: stream {stream.number}, chunk {chunk}"

    def read_chunk(
        self, stream: Stream, chunk: int, out: Bytes | None, *, side: Bytes | None = None
    ) -> None:
        """Check one chunk and decode it into `out` (None: only check it).

        `side` is what its encoding had, if it had any.

        Raises
        ------
        ChecksumError, CorruptStoreError
        """
        what = self._what(stream, chunk)
        value, checked = self._checked(stream, chunk, what)
        if out is not None:
            checked.decode(out, what=what, side=side)
        release_pages(np.frombuffer(value, np.uint8))

    def use_chunk(
        self, stream: Stream, chunk: int, use: Callable[[CheckedChunk], _Result]
    ) -> _Result:
        """Check one chunk and give what `use` makes of it, which must hold no view of it.

        Raises
        ------
        ChecksumError, CorruptStoreError
        """
        what = self._what(stream, chunk)
        value, checked = self._checked(stream, chunk, what)
        if checked.raw_size != stream.raw_size(chunk):
            raise CorruptStoreError(f"{what}: {checked.raw_size} bytes, another size is expected")
        try:
            result = use(checked)
        except CorruptStoreError as exc:
            raise CorruptStoreError(f"{what}: {exc}") from exc
        release_pages(np.frombuffer(value, np.uint8))
        return result

    def view_chunk(self, stream: Stream, chunk: int, *, room: Callable[[int], Bytes]) -> Bytes:
        """Check one chunk and give its data, without a copy where it is stored as it is.

        Parameters
        ----------
        room
            Gives the memory to decode an encoded chunk into, from its size in bytes.

        Returns
        -------
        numpy.ndarray
            The memory that `room` gave; or the map's own, to be read alone (torch takes no arrays
            that are marked so), until `release_pages`, and never to leave this package.
        """
        what = self._what(stream, chunk)
        value, checked = self._checked(stream, chunk, what)
        if not checked.is_raw:
            out = room(stream.raw_size(chunk))
            checked.decode(out, what=what)
            release_pages(np.frombuffer(value, np.uint8))
            return out
        if checked.raw_size != stream.raw_size(chunk):
            raise CorruptStoreError(f"{what}: {checked.raw_size} bytes, another size is expected")
        data = np.frombuffer(checked.payload, np.uint8)
        alias = (ctypes.c_uint8 * data.size).from_address(data.ctypes.data)
        return np.ctypeslib.as_array(alias)

    def read(self, stream: Stream, start: int, out: Bytes) -> None:
        """Fill `out` with the stream's raw bytes from `start` on, whatever chunks they lie in."""
        if start + out.size > stream.raw:
            raise CorruptStoreError(
                f"{self.path}: bytes {start}..{start + out.size} of stream {stream.number}, "
                f"which has {stream.raw}"
            )
        filled = 0
        while filled < out.size:
            chunk, within = divmod(start + filled, stream.chunk_size)
            size = stream.raw_size(chunk)
            count = min(size - within, out.size - filled)
            if count == size:
                self.read_chunk(stream, chunk, out[filled : filled + count])
            else:
                whole = np.empty(size, np.uint8)
                self.read_chunk(stream, chunk, whole)
                out[filled : filled + count] = whole[within : within + count]
            filled += count

    def page_damage(self) -> list[str]:
        """Damage that only a write would mind."""
        if self._environment is None:
            raise StoreClosedError(f"{self.path}: this handle was closed; open it again")
        with lmdb_errors(self.path, doing="read its pages"):
            return page_damage(self._environment, self._walked)

    def strays(self) -> int:
        """How many chunks an interrupted write left; the next write removes them."""
        return len(stray_keys(self._walked.tree, self.manifest.streams))

    def stored_sizes(self) -> tuple[int, int]:
        """(bytes of the file that pages in use take, bytes of the file)."""
        if self._environment is None:
            raise StoreClosedError(f"{self.path}: this handle was closed; open it again")
        stat = self._environment.lmdb.stat()
        pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] + 2
        return pages * stat["psize"], self.path.stat().st_size
