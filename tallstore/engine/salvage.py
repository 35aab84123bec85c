"""Chunks found again where LMDB's tree does not lead to them any more.

Every leaf of the tree, and every older copy of one on pages that are free by now, says of some keys
where their values lie. A chunk is written once and its checksum covers its key, so any copy whose
checksum fits is the chunk, however it was found. The file is read once, page by page; nothing in
it is believed.
"""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from tallstore.engine.chunk import HEADER_SIZE, MAX_CHUNK, check_chunk
from tallstore.engine.datafile import PAGE_HEADER, check_data_file, read_metas
from tallstore.engine.keys import MANIFEST_KEY, Stream, chunk_key
from tallstore.engine.manifest import Manifest
from tallstore.engine.tree import walk
from tallstore.errors import CorruptStoreError, TallstoreError

__all__ = ["Salvage"]

_LEAF: Final = 2
_NODE: Final = struct.Struct("<HHHH")  # size, its high half, flags, size of the key
_BIG: Final = 1
_BLOCK: Final = 4 << 20
#: Copies of a value that are tried; more are no accident.
_MAX_COPIES: Final = 64
_MAX_VALUE: Final = MAX_CHUNK + HEADER_SIZE + 32


class Salvage:
    """All the places where a damaged file may hold a value.

    Parameters
    ----------
    descriptor
        The data file, open to read; it stays the caller's.
    path
        For messages.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path = path
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        try:
            self._page = read_metas(descriptor, path)[0].page_size
        except TallstoreError:
            self._page = os.sysconf("SC_PAGE_SIZE")
        self._places: dict[bytes, dict[tuple[int, int], None]] = defaultdict(dict)
        self._scan()

    def _scan(self) -> None:
        size = self._page
        for start in range(0, self._size, _BLOCK):
            block = os.pread(self._descriptor, min(_BLOCK, self._size - start), start)
            whole = np.frombuffer(block, "<u2", len(block) // size * size // 2).reshape(
                -1, size // 2
            )
            lower, upper = whole[:, 6], whole[:, 7]
            likely = (whole[:, 5] == _LEAF) & (lower > PAGE_HEADER) & (lower <= upper)
            for row in np.flatnonzero(likely & (upper <= size) & (lower % 2 == 0)):
                self._leaf(start + int(row) * size, whole[row], int(lower[row]))

    def _leaf(
        self, begin: int, words: np.ndarray[tuple[int], np.dtype[np.uint16]], lower: int
    ) -> None:
        data = words.tobytes()
        for offset in words[PAGE_HEADER // 2 : lower // 2].tolist():
            if offset + _NODE.size > len(data):
                continue
            low, high, flags, key_size = _NODE.unpack_from(data, offset)
            start = offset + _NODE.size
            key, value = data[start : start + key_size], start + key_size
            size = low | high << 16
            if size > _MAX_VALUE or not (key == MANIFEST_KEY or len(key) == 12):
                continue
            place = begin + value
            if flags & _BIG:
                place = int.from_bytes(data[value : value + 8], "little") * self._page + PAGE_HEADER
            if place + size <= self._size and len(self._places[key]) < _MAX_COPIES:
                self._places[key][place, size] = None

    def _copies(self, key: bytes) -> Iterator[memoryview]:
        for place, size in self._places.get(key, ()):
            data = os.pread(self._descriptor, size, place)
            if len(data) == size:
                yield memoryview(data)

    def manifest(self) -> tuple[Manifest, bool]:
        """A whole manifest, and whether it is the one in force.

        Where that one is damaged it is the newest of the copies that older pages still hold: of the
        same commit, or of one before.

        Raises
        ------
        CorruptStoreError
            There is none.
        """
        in_force = self._in_force()
        if in_force is not None:
            return in_force, True
        found: list[Manifest] = []
        for value in self._copies(MANIFEST_KEY):
            try:
                found.append(Manifest.from_bytes(value, what=str(self.path)))
            except TallstoreError:
                continue
        if not found:
            raise CorruptStoreError(
                f"{self.path}: no manifest in it is whole, and without one nothing can be told "
                "apart; restore it from a copy"
            )
        return max(found, key=lambda manifest: manifest.generation), False

    def _in_force(self) -> Manifest | None:
        try:
            file = check_data_file(self._descriptor, self.path)
            tree = walk(self._descriptor, file, file.main, path=self.path)
            row = int(np.flatnonzero(tree.keys[:, 2] == len(MANIFEST_KEY))[-1])
            size = min(int(tree.sizes[row]), _MAX_VALUE)
            value = os.pread(self._descriptor, size, int(tree.places[row]))
            return Manifest.from_bytes(memoryview(value), what=str(self.path))
        except (TallstoreError, IndexError):
            return None

    def chunk(self, store: bytes, stream: Stream, chunk: int) -> memoryview | None:
        """A chunk as it was written, or None where no copy of it is whole."""
        key = chunk_key(stream.number, chunk)
        for value in self._copies(key):
            try:
                checked = check_chunk(value, store=store, key=key, what="")
            except CorruptStoreError:
                continue
            if checked.raw_size == stream.raw_size(chunk):
                return value
        return None
