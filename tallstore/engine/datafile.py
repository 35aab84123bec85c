"""The LMDB data file looked at with plain reads, before LMDB maps it.

LMDB follows page numbers into its map without looking at the file's length: a truncated file
kills the process with SIGBUS. So the two meta pages are read here first.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tallstore.errors import NewerFormatError, NotAStoreError, TruncatedStoreError

__all__ = ["LMDB_MAGIC", "DataFile", "check_data_file"]

LMDB_MAGIC: Final = 0xBEEFC0DE
_DATA_VERSION: Final = 1
# 64-bit MDB_meta after the 16-byte page header: magic, version, address, map size, then per
# database (free list, main) pad, flags, depth, four counts and the root; last page, transaction.
_META: Final = struct.Struct("<IIQQ" + "IHHQQQQQ" * 2 + "QQ")
_PAGE_HEADER: Final = 16
_PAGE_SIZES: Final = frozenset(1 << n for n in range(9, 17))
_CURE: Final = "restore it from a copy"


@dataclass(frozen=True, slots=True)
class DataFile:
    """What the newest valid meta page says."""

    page_size: int
    pages: int
    """Pages in use, counted from the start of the file."""
    transaction: int

    @property
    def nbytes(self) -> int:
        """The length that the file must have."""
        return self.page_size * self.pages


def _meta(page: bytes) -> DataFile | None:
    magic, version, *rest = _META.unpack_from(page, _PAGE_HEADER)
    if magic != LMDB_MAGIC or version != _DATA_VERSION:
        return None
    page_size, last_page, transaction = rest[2], rest[-2], rest[-1]
    if page_size not in _PAGE_SIZES:
        return None
    return DataFile(page_size, last_page + 1, transaction)


def check_data_file(path: Path) -> DataFile:
    """Check that `path` is a whole 64-bit LMDB file of the data version tallstore writes.

    Raises
    ------
    NotAStoreError
        Something else, or written by a 32-bit host.
    NewerFormatError
        LMDB's own format is of another version.
    TruncatedStoreError
        Shorter than what was committed to it.
    """
    with path.open("rb") as file:
        head = file.read(_PAGE_HEADER + _META.size)
        size = os.fstat(file.fileno()).st_size
        if len(head) < _PAGE_HEADER + _META.size:
            if size and LMDB_MAGIC.to_bytes(4, "little") in head[:20]:
                raise TruncatedStoreError(
                    f"{path}: cut off after {size} bytes, before its first page ends; {_CURE}"
                )
            raise NotAStoreError(f"{path}: not a tallstore file ({size} bytes)")
        magic, version = struct.unpack_from("<II", head, _PAGE_HEADER)
        if magic != LMDB_MAGIC:
            if magic == int.from_bytes(LMDB_MAGIC.to_bytes(4, "little"), "big"):
                raise NotAStoreError(f"{path}: written by a host of the other byte order")
            raise NotAStoreError(f"{path}: not a tallstore file (no LMDB magic number)")
        if version != _DATA_VERSION:
            raise NewerFormatError(
                f"{path}: LMDB data version {version}, tallstore keeps version {_DATA_VERSION}; "
                "update tallstore"
            )
        first = _meta(head)
        page_size = first.page_size if first else os.sysconf("SC_PAGE_SIZE")
        file.seek(page_size)
        second_page = file.read(_PAGE_HEADER + _META.size)
    second = _meta(second_page) if len(second_page) == len(head) else None
    found = [meta for meta in (first, second) if meta is not None]
    if not found:
        raise NotAStoreError(
            f"{path}: an LMDB file made by a 32-bit host, or with both meta pages damaged; "
            "tallstore reads and writes stores on 64-bit hosts"
        )
    newest = max(found, key=lambda meta: meta.transaction)
    if size < newest.nbytes:
        raise TruncatedStoreError(f"{path}: truncated, {size} bytes of {newest.nbytes}; {_CURE}")
    return newest
