"""What a writer acts upon beside the tree: the list of free pages, the headers of page runs.

See `tallstore.engine.tree`. Readers need neither.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tallstore.engine.datafile import DataFile
from tallstore.engine.tree import Numbers, Tree, check_disjoint, walk
from tallstore.errors import CorruptStoreError

__all__ = ["check_free_pages", "check_runs"]

_OVERFLOW: Final = 4
_HEADER: Final = struct.Struct("<QHHI")  # number, padding, flags, pages


def _run_headers(descriptor: int, file: DataFile, runs: Numbers) -> Iterator[tuple[int, int, int]]:
    for run in runs:
        head = os.pread(descriptor, _HEADER.size, int(run) * file.page_size)
        if len(head) != _HEADER.size:
            yield 0, 0, 0
            continue
        page, _, flags, count = _HEADER.unpack(head)
        yield page, flags, count


def check_runs(
    descriptor: int, file: DataFile, tree: Tree, rows: Sequence[int] | NDArray[np.intp]
) -> list[int]:
    """The values, of some, whose pages have a damaged header; LMDB goes by it to free and to copy.

    Reads 16 bytes a value.

    Parameters
    ----------
    rows
        Of `tree`.

    Returns
    -------
    list of int
        Those of `rows` that are damaged.
    """
    chosen = np.asarray(rows, np.intp)
    chosen = chosen[tree.runs[chosen] > 0]
    headers = _run_headers(descriptor, file, tree.runs[chosen])
    wanted = zip(chosen, tree.runs[chosen], tree.counts[chosen], strict=True)
    return [
        int(row)
        for (row, run, count), header in zip(wanted, headers, strict=True)
        if header != (int(run), _OVERFLOW, int(count))
    ]


def check_free_pages(descriptor: int, file: DataFile, tree: Tree, *, path: Path) -> int:
    """Check the list of free pages: none of them may be one that is in use.

    Parameters
    ----------
    tree
        The main tree of the same meta page.

    Returns
    -------
    int
        How many pages are neither in use nor free, which does no harm but to LMDB's copying.

    Raises
    ------
    CorruptStoreError
        The list is damaged; a write could go over what is stored.
    """
    free = walk(
        descriptor, file, file.free, path=path, what="the list of free pages", integer_keys=True
    )
    extents = [tree.extents()]
    pages, counts = free.extents()
    big = free.runs > 0
    headers = list(_run_headers(descriptor, file, free.runs[big]))
    for run, count, header in zip(free.runs[big], free.counts[big], headers, strict=True):
        # LMDB leaves a run as it is when its value gets shorter before it is committed.
        if header[:2] != (int(run), _OVERFLOW) or not int(count) <= header[2] <= file.pages:
            raise _free_damaged(path, f"the header of page {int(run)}")
    counts[free.pages.size :] = np.array([header[2] for header in headers], np.uint64)
    if (pages + counts > file.pages).any():
        raise _free_damaged(path, "a run of pages that leads out of the file")
    if int(counts.sum()) != file.free.pages:
        raise _free_damaged(path, f"it takes {int(counts.sum())} pages, not {file.free.pages}")
    extents.append((pages, counts))
    for key, place, size in zip(free.keys[:, 0], free.places, free.sizes, strict=True):
        numbers = _page_numbers(descriptor, file, int(place), int(size))
        if not 0 < int(key) <= file.transaction or numbers is None:
            raise _free_damaged(path, f"what transaction {int(key)} freed")
        extents.append((numbers, np.ones_like(numbers)))
    try:
        check_disjoint(path, *extents)
    except CorruptStoreError as exc:
        raise _free_damaged(path, "it names pages that are in use") from exc
    return file.pages - 2 - sum(int(numbers.sum()) for _, numbers in extents)


def _free_damaged(path: Path, how: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path}: the list of free pages is damaged: {how}. What is stored can be read, but not "
        "written to; `tallstore verify --repair` makes a whole store of it"
    )


def _page_numbers(descriptor: int, file: DataFile, place: int, size: int) -> Numbers | None:
    """The pages that one record frees: a count, then as many numbers, falling."""
    count = int.from_bytes(os.pread(descriptor, 8, place), "little")
    if size != 8 * (count + 1) or count >= file.pages:
        return None
    data = os.pread(descriptor, 8 * count, place + 8)
    if len(data) != 8 * count:
        return None
    numbers = np.frombuffer(data, "<u8").astype(np.uint64)
    if count and (numbers.max() >= file.pages or numbers.min() < 2):
        return None
    return numbers if (numbers[:-1] > numbers[1:]).all() else None
