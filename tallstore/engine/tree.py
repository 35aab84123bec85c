"""LMDB's tree walked with plain reads, so that LMDB is never led astray by damage in it.

LMDB checks nothing in its pages. It takes page numbers, offsets and sizes from them and follows
them into its map: a flipped bit there can end the process with SIGSEGV or SIGBUS, give a wrong
value, or send a writer over pages that are in use. Chunks have checksums of ours, but the branch
and leaf pages that lead to them have none. So before LMDB looks anything up, every page of the
tree is read with `pread` here, and all that LMDB relies on is checked:

- every page lies inside the file, carries its own number and the flags of its level, and is used
  once; all leaves are equally deep;
- every node lies inside its page, on none of the others, and its key too;
- keys ascend within a page and stay between the separators above it, so that a search comes
  wherever a key is;
- a value too large for its leaf is a run of pages inside the file, which nothing else uses.

After that LMDB's searches stay inside the tree that was checked. The cost follows the pages of the
tree, not the data: values of more than half a page lie in pages of their own, which are not read.

*The writer's part.* A writer also acts upon the list of free pages (a tree of its own; its values
are numbers of pages) and upon the header of every run it frees. A wrong number there would have it
write over chunks in use: `tallstore.engine.freepages` checks both before every write.

*Races.* A walk is good for one commit. The reader's transaction begins first (which reads nothing
but meta pages): from then on its slot in LMDB's reader table keeps writers from using any page of
that commit again. Then the meta page with the transaction's own number is read, and its tree
walked. Has another process meanwhile committed twice, that meta page is overwritten; the
transaction is ended and the next one begun. A writer holds the store's `WriterLock`, so nobody
commits between its walk and its write. Both walk and map see the same page cache: what goes wrong
in memory afterwards, or between the two on the medium, is not found here.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tallstore.engine.datafile import CURE, NO_PAGE, PAGE_HEADER, Database, DataFile
from tallstore.errors import CorruptStoreError, TruncatedStoreError

__all__ = ["Numbers", "Tree", "check_disjoint", "walk"]

_BRANCH: Final = 1
_LEAF: Final = 2
_NODE_HEADER: Final = 8
_BIG: Final = 1
#: Keys are read up to this length: those of a store have 12 and 8 bytes.
_MAX_KEY: Final = 16
_HALVES: Final = struct.Struct(">QQ")
_MAX_DEPTH: Final = 32
#: Pages looked at together.
_BATCH: Final = 64

Numbers = NDArray[np.uint64]
#: Rows of (first 8 bytes, next 8 bytes, length) of keys: they sort as LMDB sorts the keys.
Keys = NDArray[np.uint64]

_LOWEST: Final = np.zeros((1, 3), np.uint64)
_HIGHEST: Final = np.full((1, 3), NO_PAGE, np.uint64)


@dataclass(frozen=True, slots=True)
class Tree:
    """The leaves' nodes, in order of their keys, and the pages that the tree takes."""

    keys: Keys
    sizes: Numbers
    """Of the values, in bytes."""
    places: Numbers
    """Where in the file the values begin."""
    runs: Numbers
    """First page of the values that have pages of their own; 0 for those in their leaf."""
    counts: Numbers
    """How many pages those are."""
    pages: Numbers
    """The branch and leaf pages."""

    @classmethod
    def of(cls, parts: list[Tree], pages: list[Numbers]) -> Tree:
        """Parts one after another, with all the pages."""
        none = np.zeros(0, np.uint64)

        def joined(columns: list[Numbers]) -> Numbers:
            return np.concatenate([none, *columns])

        return cls(
            # Column by column in memory, for `row`.
            keys=np.asfortranarray(np.concatenate([_LOWEST[:0], *(part.keys for part in parts)])),
            sizes=joined([part.sizes for part in parts]),
            places=joined([part.places for part in parts]),
            runs=joined([part.runs for part in parts]),
            counts=joined([part.counts for part in parts]),
            pages=joined(pages),
        )

    def row(self, key: bytes) -> int | None:
        """Where a key of at most 16 bytes is among the rows; None where it is not."""
        first, second = _HALVES.unpack(key.ljust(_MAX_KEY, b"\0"))
        low, high = 0, len(self.keys)
        for column, wanted in enumerate((first, second, len(key))):
            some = self.keys[low:high, column]
            number = np.uint64(wanted)
            left, right = np.searchsorted(some, number), np.searchsorted(some, number, "right")
            low, high = low + int(left), low + int(right)
        return low if low < high else None

    def extents(self) -> tuple[Numbers, Numbers]:
        """First page and count of everything that the tree takes."""
        big = self.runs > 0
        starts = np.concatenate([self.pages, self.runs[big]])
        ones = np.ones(self.pages.size, np.uint64)
        return starts, np.concatenate([ones, self.counts[big]])


class _Walk:
    def __init__(
        self, descriptor: int, file: DataFile, path: Path, *, what: str, integer_keys: bool
    ) -> None:
        self.descriptor = descriptor
        self.file = file
        self.path = path
        self.what = what
        self.integer_keys = integer_keys

    def damaged(self, page: Any, how: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self.path}: page {int(page)} of {self.what} is damaged: {how}; {CURE}"
        )

    def require(self, good: NDArray[np.bool_], pages: Numbers, how: str) -> None:
        """Raise for the first of `pages` where `good` is false."""
        if not good.all():
            raise self.damaged(pages[int(np.argmin(good))], how)

    def inside(self, starts: Numbers, counts: Numbers, pages: Numbers, how: str) -> None:
        end = np.uint64(self.file.pages)
        within = (starts >= 2) & (starts < end)
        self.require(within & (counts <= end - np.minimum(starts, end)), pages, how)

    def read(self, pages: Numbers) -> NDArray[np.uint8]:
        size = self.file.page_size
        data = b"".join(os.pread(self.descriptor, size, int(page) * size) for page in pages)
        if len(data) != size * pages.size:
            raise TruncatedStoreError(f"{self.path}: truncated while it was read; {CURE}")
        return np.frombuffer(data, np.uint8)

    def level(
        self, pages: Numbers, low: Keys, high: Keys, *, leaf: bool
    ) -> tuple[Tree, Numbers, Keys, Keys]:
        """Check some pages of one level; what its leaves hold, or its children and their bounds."""
        size = self.file.page_size
        data = self.read(pages)
        words = data.view("<u2").reshape(pages.size, size // 2)
        flag = _LEAF if leaf else _BRANCH
        own = data.view("<u8").reshape(pages.size, size // 8)[:, 0]
        self.require(own == pages, pages, "it carries another page's number")
        self.require(words[:, 5] == flag, pages, f"flags other than {flag} at its depth")
        lower, upper = words[:, 6].astype(np.int64), words[:, 7].astype(np.int64)
        least = 1 if leaf or self.integer_keys else 2
        self.require(
            (lower % 2 == 0)
            & (lower >= PAGE_HEADER + 2 * least)
            & (lower <= upper)
            & (upper <= size),
            pages,
            "bounds that cannot be",
        )
        counts = (lower - PAGE_HEADER) // 2
        row = np.repeat(np.arange(pages.size), counts)
        first = np.cumsum(counts) - counts
        slot = np.arange(row.size) - first[row]
        offset = words[row, PAGE_HEADER // 2 + slot].astype(np.int64)
        where = pages[row]
        self.require(
            (offset % 2 == 0) & (offset >= upper[row]) & (offset <= size - _NODE_HEADER),
            where,
            "a node outside of it",
        )
        node = row * size + offset
        low_half, high_half, flags, key_size = (
            data.view("<u2")[node // 2 + i].astype(np.uint64) for i in range(4)
        )
        end = offset + _NODE_HEADER + key_size.astype(np.int64)
        value = low_half | high_half << np.uint64(16)
        if leaf:
            self.require((flags & ~np.uint64(_BIG)) == 0, where, "a node of an unknown kind")
            big = flags == _BIG
            self.require(big | (value <= size), where, "a value that its page cannot hold")
            end += np.where(big, 8, np.minimum(value, size).astype(np.int64))
        self.require(end <= size, where, "a node that runs past its end")
        order = np.argsort(node)
        ends = (row * size + end + 1) // 2 * 2
        self.require(
            np.append(ends[order][:-1] <= node[order][1:], True), where[order], "nodes that overlap"
        )
        keys = self.keys(data, node, key_size)
        head = slot == 0
        if leaf:
            length = (key_size == 8) if self.integer_keys else (key_size > 0)
            self.require(length & (key_size <= _MAX_KEY), where, "a key of another length")
            self.require(~_less(keys[first], low), pages, "keys below its range")
        else:
            # LMDB takes a branch's first key for lower than all, whatever it is.
            self.require(head | (key_size <= _MAX_KEY), where, "a key of another length")
            keys[first] = low
        rises = np.append(_less(keys[:-1], keys[1:]), True)
        self.require(rises | np.append(head[1:], True), where, "keys out of order")
        last = first + counts - 1
        self.require(_less(keys[last], high), pages, "keys above its range")
        if leaf:
            found = self.leaves(data, where, end, row * size, keys, value, big)
            return found, pages[:0], low[:0], high[:0]
        children = value | flags << np.uint64(32)
        self.inside(children, np.ones_like(children), where, "a branch that leads out of the file")
        following = np.concatenate([keys[1:], high[-1:]])
        following[last] = high
        nothing = Tree.of([], [])
        return nothing, children, keys, following

    def keys(self, data: NDArray[np.uint8], node: Any, key_size: Numbers) -> Keys:
        column = np.arange(_MAX_KEY)
        index = np.minimum(node[:, None] + _NODE_HEADER + column, data.size - 1)
        text = np.where(column < key_size[:, None], data[index], 0).astype(np.uint8)
        order = "<u8" if self.integer_keys else ">u8"
        found = np.empty((node.size, 3), np.uint64)
        found[:, :2] = text.view(order)
        found[:, 2] = key_size
        return found

    def leaves(
        self,
        data: NDArray[np.uint8],
        where: Numbers,
        end: Any,
        base: Any,
        keys: Keys,
        value: Numbers,
        big: NDArray[np.bool_],
    ) -> Tree:
        """The nodes of leaves; `base` and `end` are where their pages begin and they end."""
        size = np.uint64(self.file.page_size)
        runs, counts = np.zeros_like(value), np.zeros_like(value)
        runs[big] = data[(base + end - 8)[big][:, None] + np.arange(8)].view("<u8")[:, 0]
        counts[big] = (value[big] + np.uint64(PAGE_HEADER - 1)) // size + np.uint64(1)
        self.inside(runs[big], counts[big], where[big], "a value outside of the file")
        inline = where * size + end.astype(np.uint64) - value
        places = np.where(big, runs * size + np.uint64(PAGE_HEADER), inline)
        return Tree(keys, value, places, runs, counts, where[:0])


def _less(a: Keys, b: Keys) -> NDArray[np.bool_]:
    """Whether keys sort before others, row by row."""
    second = (a[:, 1] < b[:, 1]) | ((a[:, 1] == b[:, 1]) & (a[:, 2] < b[:, 2]))
    less: NDArray[np.bool_] = (a[:, 0] < b[:, 0]) | ((a[:, 0] == b[:, 0]) & second)
    return less


def walk(
    descriptor: int,
    file: DataFile,
    database: Database,
    *,
    path: Path,
    what: str = "the tree",
    integer_keys: bool = False,
) -> Tree:
    """Check every page of one tree.

    Parameters
    ----------
    descriptor
        The data file, open to read.
    file, database
        A meta page, and the tree of it that is meant.
    path, what
        For messages.
    integer_keys
        Whether the keys are numbers of 8 bytes, as in the list of free pages.

    Raises
    ------
    CorruptStoreError
        A page is damaged; the message has its number.
    """
    if database.root == NO_PAGE:
        return Tree.of([], [])
    task = _Walk(descriptor, file, path, what=what, integer_keys=integer_keys)
    pages = np.array([database.root], np.uint64)
    if database.depth > _MAX_DEPTH:
        raise task.damaged(database.root, f"it would be {database.depth} pages deep")
    task.inside(pages, np.ones_like(pages), pages, "the root is outside of the file")
    low, high = _LOWEST, _HIGHEST
    leaves: list[Tree] = []
    seen: list[Numbers] = []
    for depth in range(database.depth):
        seen.append(pages)
        if sum(map(len, seen)) > file.pages:
            raise task.damaged(pages[0], "more pages are referred to than there are")
        below: list[tuple[Numbers, Keys, Keys]] = []
        for start in range(0, pages.size, _BATCH):
            some = slice(start, start + _BATCH)
            found, *children = task.level(
                pages[some], low[some], high[some], leaf=depth == database.depth - 1
            )
            leaves.append(found)
            below.append((children[0], children[1], children[2]))
        pages, low, high = (np.concatenate(column) for column in zip(*below, strict=True))
    tree = Tree.of(leaves, seen)
    check_disjoint(path, tree.extents())
    return tree


def check_disjoint(path: Path, *extents: tuple[Numbers, Numbers]) -> None:
    """Check that no page is used twice; raises CorruptStoreError."""
    starts, counts = (np.concatenate(column) for column in zip(*extents, strict=True))
    order = np.argsort(starts)
    starts, counts = starts[order], counts[order]
    twice = starts[:-1] + counts[:-1] > starts[1:]
    if twice.any():
        page = int(starts[1:][int(np.argmax(twice))])
        raise CorruptStoreError(f"{path}: the tree is damaged: page {page} is used twice; {CURE}")
