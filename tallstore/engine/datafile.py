"""The LMDB data file's two meta pages, looked at with plain reads before LMDB maps the file.

LMDB believes its meta pages: it follows page numbers into its map without looking at the file's
length, so that a truncated file kills the process with SIGBUS. Here they are read first, and
everything in them that LMDB acts upon is checked; `tallstore.engine.tree` goes on from there.

Two commits in a row never write the same meta page: commit N goes to page N mod 2. So the numbers
of the two always differ by one, and each says which page it belongs on. A damaged number that still
fits these rules can only make the other page, one commit older, the one in force; LMDB keeps that
commit's pages whole for its own recovery, and `WriteSession` ends every write so that both commits
hold the same tasks.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tallstore.errors import (
    CorruptStoreError,
    NewerFormatError,
    NotAStoreError,
    TallstoreError,
    TruncatedStoreError,
)

__all__ = [
    "CURE",
    "LMDB_MAGIC",
    "NO_PAGE",
    "PAGE_HEADER",
    "DataFile",
    "Database",
    "check_data_file",
    "read_metas",
]

LMDB_MAGIC: Final = 0xBEEFC0DE
#: The root of an empty tree.
NO_PAGE: Final = (1 << 64) - 1
PAGE_HEADER: Final = 16
CURE: Final = "restore it from a copy, or save what is left with `tallstore verify --repair`"

_DATA_VERSION: Final = 1
# 64-bit page header: number, padding, flags, two bounds.
_HEADER: Final = struct.Struct("<QHHHH")
# 64-bit MDB_meta after it: magic, version, address, map size, then per database (free list, main)
# pad, flags, depth, four counts and the root; last page, transaction.
_META: Final = struct.Struct("<IIQQ" + "IHHQQQQQ" * 2 + "QQ")
_SIZE: Final = PAGE_HEADER + _META.size
_PAGE_SIZES: Final = frozenset(1 << n for n in range(9, 17))
_META_PAGE: Final = 0x08
_INTEGER_KEYS: Final = 0x08
_NO_SUBDIR: Final = 0x4000
_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class Database:
    """One of the two trees, as a meta page has it."""

    pad: int
    """The size of keys, where all have one: not of the main tree, where LMDB bounds it."""
    flags: int
    depth: int
    pages: int
    """Of its branches, leaves and large values."""
    root: int


@dataclass(frozen=True, slots=True)
class DataFile:
    """What a meta page says."""

    page_size: int
    pages: int
    """Pages in use, counted from the start of the file."""
    transaction: int
    free: Database
    """The list of free pages: key = transaction that freed them, value = page numbers."""
    main: Database
    """The chunks and the manifest."""

    @property
    def nbytes(self) -> int:
        """The length that the file must have."""
        return self.page_size * self.pages


def _meta(page: bytes) -> DataFile | None:
    """The meta page in `page`, None where it is not even like one."""
    if len(page) < _SIZE:
        return None
    magic, version, *rest = _META.unpack_from(page, PAGE_HEADER)
    if magic != LMDB_MAGIC or version != _DATA_VERSION or rest[2] not in _PAGE_SIZES:
        return None
    last_page, transaction = rest[-2:]
    free, main = (Database(r[0], r[1], r[2], sum(r[3:6]), r[7]) for r in (rest[2:10], rest[10:18]))
    return DataFile(rest[2], last_page + 1, transaction, free, main)


def _damage(number: int, page: bytes, meta: DataFile | None) -> str | None:
    """What is wrong with meta page `number`, on its own."""
    if meta is None:
        return "it is no meta page of LMDB"
    page_number, _, flags, _, _ = _HEADER.unpack_from(page)
    if page_number != number or flags != _META_PAGE:
        return f"its header says page {page_number} with flags {flags:#x}"
    if meta.free.flags & ~_NO_SUBDIR != _INTEGER_KEYS or meta.main.flags:
        return f"flags {meta.free.flags:#x} and {meta.main.flags:#x} of its trees"
    if meta.main.pad > meta.page_size - PAGE_HEADER:
        return f"keys of {meta.main.pad} bytes in its tree"
    if meta.transaction and meta.transaction % 2 != number:
        return f"transaction {meta.transaction} belongs on the other one"
    for tree in (meta.free, meta.main):
        if (tree.root == NO_PAGE) != (tree.depth == 0):
            return f"a tree of depth {tree.depth} with page {tree.root} at its root"
    return None


def read_metas(descriptor: int, path: Path) -> tuple[DataFile, DataFile]:
    """Both meta pages, checked.

    Parameters
    ----------
    descriptor
        The data file, open to read.
    path
        For messages.

    Raises
    ------
    NotAStoreError
        Something else, or written by a 32-bit host.
    NewerFormatError
        LMDB's own format is of another version.
    CorruptStoreError
        A meta page is damaged.
    TruncatedStoreError
        Not even the meta pages are there.
    """
    before: tuple[bytes, bytes] | None = None
    for _ in range(_ATTEMPTS):
        first = os.pread(descriptor, _SIZE, 0)
        guess = _meta(first)
        page_size = guess.page_size if guess else os.sysconf("SC_PAGE_SIZE")
        second = os.pread(descriptor, _SIZE, page_size)
        try:
            return _both(first, second, path, os.fstat(descriptor).st_size)
        except TallstoreError:
            # Read half of what another process was writing? Then it reads differently now.
            if (first, second) == before:
                raise
            before = first, second
    raise CorruptStoreError(f"{path}: its meta pages keep changing; {CURE}")


def _both(first: bytes, second: bytes, path: Path, size: int) -> tuple[DataFile, DataFile]:
    metas = [_meta(first), _meta(second)]
    if metas == [None, None]:
        raise _no_meta(first, path)
    for number, (page, meta) in enumerate(zip((first, second), metas, strict=True)):
        damage = _damage(number, page, meta)
        if len(page) < _SIZE:
            raise TruncatedStoreError(
                f"{path}: truncated after {size} bytes, in a meta page; {CURE}"
            )
        if damage is not None:
            raise CorruptStoreError(f"{path}: meta page {number} is damaged: {damage}; {CURE}")
    one, two = metas
    assert one is not None and two is not None  # _damage says so of None
    apart = abs(one.transaction - two.transaction)
    if apart != 1 and (one.transaction or two.transaction):
        raise CorruptStoreError(
            f"{path}: a meta page is damaged: transactions {one.transaction} and "
            f"{two.transaction} do not follow on each other; {CURE}"
        )
    if one.page_size != two.page_size:
        raise CorruptStoreError(f"{path}: a meta page is damaged: two page sizes; {CURE}")
    return one, two


def _no_meta(head: bytes, path: Path) -> TallstoreError:
    if len(head) < _SIZE:
        if head and LMDB_MAGIC.to_bytes(4, "little") in head[:20]:
            return TruncatedStoreError(
                f"{path}: cut off after {len(head)} bytes, before its first page ends; {CURE}"
            )
        return NotAStoreError(f"{path}: not a tallstore file ({len(head)} bytes)")
    magic, version = struct.unpack_from("<II", head, PAGE_HEADER)
    if magic == int.from_bytes(LMDB_MAGIC.to_bytes(4, "little"), "big"):
        return NotAStoreError(f"{path}: written by a host of the other byte order")
    if magic != LMDB_MAGIC:
        return NotAStoreError(f"{path}: not a tallstore file (no LMDB magic number)")
    if version != _DATA_VERSION:
        return NewerFormatError(
            f"{path}: LMDB data version {version}, tallstore keeps version {_DATA_VERSION}; "
            "update tallstore"
        )
    return NotAStoreError(
        f"{path}: an LMDB file made by a 32-bit host, or with both meta pages damaged; "
        "tallstore reads and writes stores on 64-bit hosts"
    )


def check_data_file(descriptor: int, path: Path) -> DataFile:
    """Check that a file is a whole 64-bit LMDB file of the data version tallstore writes.

    Returns
    -------
    DataFile
        The meta page in force: of the higher transaction, as LMDB chooses.

    Raises
    ------
    NotAStoreError, NewerFormatError, CorruptStoreError
        As `read_metas`.
    TruncatedStoreError
        Shorter than what was committed to it.
    """
    one, two = read_metas(descriptor, path)
    newest = two if two.transaction > one.transaction else one
    size = os.fstat(descriptor).st_size
    if size < newest.nbytes:
        raise TruncatedStoreError(f"{path}: truncated, {size} bytes of {newest.nbytes}; {CURE}")
    return newest
