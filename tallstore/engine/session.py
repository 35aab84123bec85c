"""A write: chunks go in under streams nobody refers to yet, then the manifest flips.

Chunks are committed in bounded transactions by one thread while other threads encode the next
ones. Until the manifest of the new generation is committed, readers and a crash see the old one;
what a killed write left behind belongs to no live stream, and the next write removes it first.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final

import numpy as np

from tallstore.advice import fault_in, release_pages, start_writeback
from tallstore.codecs import Bytes
from tallstore.engine.chunk import ChunkBuffer, Encoding, check_chunk, seal_chunk
from tallstore.engine.environment import Environment, lmdb_errors
from tallstore.engine.guard import check_before_writing
from tallstore.engine.keys import MANIFEST_KEY, Stream, chunk_key, split_key
from tallstore.engine.manifest import Manifest
from tallstore.errors import CorruptStoreError, TallstoreError

__all__ = ["StreamWriter", "WriteSession", "commit_again", "pages_in_use", "reclaim"]

#: Bytes of chunks a transaction; LMDB holds them a second time while it is open.
_BATCH: Final = 64 << 20
#: Bytes of sealed chunks that may wait for the disk.
_BACKLOG: Final = 96 << 20
#: Chunks a transaction removes when space is reclaimed.
_RECLAIM: Final = 4096
#: Bytes that a transaction may add beside its values: pages of the tree and of the free list.
_SPARE: Final = 4 << 20


class StreamWriter:
    """One stream being written; `put` is thread-safe and takes chunks in any order."""

    def __init__(self, session: WriteSession, number: int, chunk_size: int) -> None:
        self._session = session
        self._lock = threading.Lock()
        self.number = number
        self.chunk_size = chunk_size
        self.raw = 0
        self.stored = 0

    def put(self, chunk: int, data: Bytes, *, encoding: Encoding) -> None:
        """Seal a copy of `data` as chunk number `chunk` and hand it to the disk."""
        buffer = ChunkBuffer.of(data.size)
        np.copyto(buffer.data, data)
        self.put_buffer(chunk, buffer, encoding=encoding)

    def put_buffer(self, chunk: int, buffer: ChunkBuffer, *, encoding: Encoding) -> None:
        """Like `put`, without the copy; the buffer is given away."""
        key = chunk_key(self.number, chunk)
        value = seal_chunk(buffer, store=self._session.store, key=key, encoding=encoding)
        with self._lock:
            self.raw += buffer.data.size
            self.stored += len(value)
        self._session._enqueue(key, value)

    def record(self) -> Stream:
        """The finished stream."""
        return Stream(self.number, self.chunk_size, self.raw, self.stored)


class WriteSession:
    """All the chunks of one commit. The caller holds the store's `WriterLock`.

    Parameters
    ----------
    environment
        Where to write; the session takes no handle of its own.
    before
        The manifest in force, or a new one for a new store.
    room
        Bytes that all of it will take, as far as is known: for the message on a full disk.

    Raises
    ------
    CorruptStoreError
        The file is damaged where a write would spread the damage.
    """

    def __init__(self, environment: Environment, before: Manifest, *, room: int = 0) -> None:
        with lmdb_errors(environment.shown, doing="check its pages"):
            check_before_writing(environment, before.streams)
        self._environment = environment
        self._before = before
        self._next = before.next_stream
        self._writers: list[StreamWriter] = []
        self._queue: queue.Queue[tuple[bytes, memoryview] | None] = queue.Queue()
        self._room = threading.Condition()
        self._waiting = 0
        self._lacking = room
        self._failure: BaseException | None = None
        self._committed = False
        self._thread = threading.Thread(target=self._drain, name="tallstore-writer", daemon=True)
        self._thread.start()

    @property
    def store(self) -> bytes:
        """The store's identity."""
        return self._before.store

    def __enter__(self) -> WriteSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._committed:
            self.abort()

    def stream(self, chunk_size: int) -> StreamWriter:
        """Begin a stream."""
        writer = StreamWriter(self, self._next, chunk_size)
        self._next += 1
        self._writers.append(writer)
        return writer

    def copy(self, stream: Stream, chunk: int, value: memoryview) -> None:
        """Put a chunk of this very store back as it is; `value` is whole, and given away."""
        self._enqueue(chunk_key(stream.number, chunk), value)

    def step(self, name: str) -> None:
        """Called at each named point of a write; tests replace it to stop there."""

    # -- chunks ---------------------------------------------------------------------------

    def _enqueue(self, key: bytes, value: memoryview) -> None:
        with self._room:
            self._room.wait_for(
                lambda: (
                    self._failure is not None
                    or not self._waiting
                    or self._waiting + len(value) <= _BACKLOG
                )
            )
            if self._failure is not None:
                raise self._failure
            self._waiting += len(value)
        self._queue.put((key, value))

    def _drain(self) -> None:
        """The writer thread: LMDB ties a write transaction to its thread."""
        try:
            while self._drain_batch():
                pass
        except BaseException as exc:  # handed to whoever puts or commits next
            with self._room:
                self._failure = exc
                self._room.notify_all()

    def _drain_batch(self) -> bool:
        item = self._queue.get()
        batch: list[tuple[bytes, memoryview]] = []
        size = 0
        while item is not None:
            batch.append(item)
            size += len(item[1])
            if size >= _BATCH:
                break
            item = self._queue.get()
        if batch and self._failure is None:
            self._write(batch, size)
        with self._room:
            self._waiting -= size
            self._room.notify_all()
        return item is not None

    def _write(self, batch: list[tuple[bytes, memoryview]], size: int) -> None:
        self.step("chunks")
        environment = self._environment
        needed = max(size, self._lacking)
        with environment.errors(doing="write", needed=needed, writing=True):
            fit_file(environment, spare=size + _SPARE)
            with environment.lmdb.begin(write=True) as transaction:
                for key, value in batch:
                    if not transaction.put(key, value, overwrite=False):
                        what = f"{environment.shown}: chunk {split_key(key)}"
                        raise CorruptStoreError(f"{what} is there already, of another write")
            start_writeback(environment.presence)
            fit_file(environment)
            self._read_back([key for key, _ in batch])
        self._lacking -= size

    def _read_back(self, keys: list[bytes]) -> None:
        """No save succeeds with other bytes than it was given: check what the file gives back."""
        with self._environment.lmdb.begin(buffers=True) as transaction:
            for key in keys:
                value = transaction.get(key)
                what = f"{self._environment.shown}: read back of chunk {split_key(key)}"
                if value is None:
                    raise CorruptStoreError(f"{what}: it is not there")
                fault_in(value)
                check_chunk(value, store=self.store, key=key, what=what)
                release_pages(np.frombuffer(value, np.uint8))

    def _finish(self) -> None:
        self._queue.put(None)
        self._join()
        if self._failure is not None:
            raise self._failure

    def _join(self) -> None:
        """Wait for the writer thread, whoever interrupts: the lock must not go before it rests."""
        interrupt: BaseException | None = None
        while self._thread.is_alive():
            try:
                self._thread.join()
            except BaseException as exc:
                interrupt = exc
                self._give_up()
        if interrupt is not None:
            raise interrupt

    def _give_up(self) -> None:
        with self._room:
            self._failure = self._failure or CorruptStoreError("the write was given up")
            self._room.notify_all()

    # -- commit ---------------------------------------------------------------------------

    def commit(self, body: Mapping[str, Any], *, live: frozenset[int], written_by: str) -> Manifest:
        """Make everything visible at once.

        Parameters
        ----------
        body
            The new manifest's body.
        live
            The streams, old and new, that `body` refers to; all others are removed afterwards.
        written_by
            The program, for people.
        """
        self._finish()
        known = dict(self._before.streams)
        known.update((writer.number, writer.record()) for writer in self._writers)
        after = Manifest(
            store=self.store,
            generation=self._before.generation + 1,
            next_stream=self._next,
            streams={number: known[number] for number in sorted(live)},
            body=body,
            written_by=written_by,
        )
        value = after.to_bytes()
        environment = self._environment
        with environment.errors(doing="commit", needed=len(value), writing=True):
            environment.lmdb.sync(True)
            self.step("synced")
            fit_file(environment, spare=len(value) + _SPARE)
            with environment.lmdb.begin(write=True) as transaction:
                transaction.put(MANIFEST_KEY, value)
                self.step("manifest")
            environment.lmdb.sync(True)
            self.step("committed")
            self._committed = True
        with (
            contextlib.suppress(TallstoreError),
            environment.errors(doing="tidy up", needed=_SPARE, writing=True),
        ):
            # All is there, and durable: what cannot be tidied up now, the next write does.
            fit_file(environment)
            if not reclaim(environment, after, step=self.step):
                commit_again(environment)
        return after

    def abort(self) -> None:
        """Give up: nothing becomes visible, and the chunks written so far are removed.

        Unless an interrupt, or a device that failed, came after the manifest had flipped: then
        the new generation stays.
        """
        self._give_up()
        self._queue.put(None)
        self._join()
        with contextlib.suppress(TallstoreError):
            # What cannot be removed now, on a full disk say, the next write removes.
            reclaim(self._environment, self._in_force())

    def _in_force(self) -> Manifest:
        """The manifest that the file holds: what it refers to must stay."""
        shown = self._environment.shown
        with (
            self._environment.errors(doing="read"),
            self._environment.lmdb.begin(buffers=True) as transaction,
        ):
            value = transaction.get(MANIFEST_KEY)
            return self._before if value is None else Manifest.from_bytes(value, what=str(shown))


def reclaim(
    environment: Environment, manifest: Manifest, *, step: Callable[[str], None] | None = None
) -> int:
    """Remove the chunks of streams that `manifest` does not know; returns how many there were."""
    with environment.errors(doing="reclaim space", needed=_SPARE, writing=True):
        doomed = check_before_writing(environment, manifest.streams)
        for start in range(0, len(doomed), _RECLAIM):
            if step is not None:
                step("reclaim")
            fit_file(environment, spare=_SPARE)
            with environment.lmdb.begin(write=True) as transaction:
                for key in doomed[start : start + _RECLAIM]:
                    transaction.delete(key)
        fit_file(environment)
    return len(doomed)


def pages_in_use(environment: Environment) -> int:
    """Bytes of the pages that are not free: what a compacted copy takes."""
    stat = environment.lmdb.stat()
    return int(
        (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] + 2) * stat["psize"]
    )


def commit_again(environment: Environment) -> None:
    """Commit the manifest a second time, so that both of LMDB's meta pages lead to it.

    Were only the newest to do so, damage to that one page could bring back the store as it was
    before the write.
    """
    with environment.errors(doing="commit", needed=_SPARE, writing=True):
        fit_file(environment, spare=_SPARE)
        with environment.lmdb.begin(write=True) as transaction:
            value = transaction.get(MANIFEST_KEY)
            if value is not None:
                transaction.put(MANIFEST_KEY, value)
        environment.lmdb.sync(True)
        fit_file(environment)


def fit_file(environment: Environment, *, spare: int = 0) -> None:
    """Make the file as long as its pages, and `spare` bytes longer while a transaction runs.

    LMDB never writes a page that it allocated and freed within one transaction; where that was
    the last one the file would end early, which looks like a truncated file. And what a failed
    write appended is given back.
    """
    needed = environment.paged_bytes()
    size = os.stat(environment.path).st_size
    if size < needed + spare or (size > needed and not spare):
        os.truncate(environment.path, needed + spare)
