"""Which bytes of a store are what."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from tallstore.codecs import CODECS
from tallstore.engine.chunk import HEADER_SIZE
from tallstore.engine.datafile import DataFile, check_data_file
from tallstore.engine.tree import Tree, walk

__all__ = ["Regions", "regions"]

#: (start, stop) in the file, by the kind of bytes.
Regions = dict[str, list[tuple[int, int]]]

_META_BYTES = 16 + 136
_LEAF_FLAG = 2
#: By codec.
_PAYLOADS = {
    number: f"{type(codec).__name__.removesuffix('Codec').lower()} payload"
    for number, codec in CODECS.items()
}


def _values(
    data: bytes, tree: Tree, file: DataFile, found: Regions
) -> dict[int, list[tuple[int, int]]]:
    """Sort out the values; returns those that lie in leaves, by page."""
    inline: dict[int, list[tuple[int, int]]] = defaultdict(list)
    columns = (tree.keys[:, 2], tree.places, tree.sizes, tree.runs, tree.counts)
    for length, place, size, run, count in zip(*(c.tolist() for c in columns), strict=True):
        stop = place + size
        if run:
            found["run header"].append((place - 16, place))
            found["padding"].append((stop, (run + count) * file.page_size))
        else:
            inline[place // file.page_size].append((place, stop))
        if length == 8:
            found["manifest"].append((place, stop))
            continue
        found["chunk header"].append((place, place + HEADER_SIZE))
        kind = _PAYLOADS[data[place + 4]]
        if stop > place + HEADER_SIZE:
            found[kind].append((place + HEADER_SIZE, stop))
    return inline


def regions(path: Path) -> Regions:
    """Every byte of a store, by what it is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        file = check_data_file(descriptor, path)
        tree = walk(descriptor, file, file.main, path=path)
        free = walk(descriptor, file, file.free, path=path, integer_keys=True)
    finally:
        os.close(descriptor)
    data = path.read_bytes()
    size = file.page_size
    found: Regions = defaultdict(list)
    for page in (0, 1):
        found["meta page"].append((page * size, page * size + _META_BYTES))
        found["padding"].append((page * size + _META_BYTES, (page + 1) * size))
    inline = _values(data, tree, file, found)
    for page in tree.pages.tolist():
        low = page * size
        leaf = data[low + 10] == _LEAF_FLAG
        lower, upper = np.frombuffer(data, "<u2", 2, low + 12).tolist()
        kind = "leaf page" if leaf else "branch page"
        found["padding"].append((low + lower, low + upper))
        found[kind].append((low, low + lower))
        start = low + upper
        for begin, stop in sorted(inline[page]):
            found[kind].append((start, begin))
            start = stop
        found[kind].append((start, low + size))
    starts, counts = (part.tolist() for part in free.extents())
    for start, count in zip(starts, counts, strict=True):
        found["free list"].append((start * size, (start + count) * size))
    used = np.zeros(file.pages, np.bool_)
    used[:2] = True
    for extents in (tree.extents(), free.extents()):
        for start, count in zip(*(part.tolist() for part in extents), strict=True):
            used[start : start + count] = True
    idle = np.flatnonzero(~used).tolist()
    found["free page"] += [(page * size, (page + 1) * size) for page in idle]
    return {kind: [e for e in extents if e[0] < e[1]] for kind, extents in found.items()}
