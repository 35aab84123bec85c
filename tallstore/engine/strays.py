"""Chunks of streams that no manifest knows: what an interrupted write left behind."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from tallstore.advice import release_pages
from tallstore.engine.keys import chunk_key, split_key

__all__ = ["stray_keys"]

_END = 1 << 62


def stray_keys(transaction: Any, live: Collection[int]) -> Iterator[bytes]:
    """Keys of chunks whose stream is not in `live`, in order.

    Parameters
    ----------
    transaction
        An LMDB transaction with buffers.
    live
        Stream numbers.
    """
    # py-lmdb reads every page of each value that a cursor comes by: so the cursor jumps from gap
    # to gap between live streams, and never walks over what a store mostly consists of.
    cursor = transaction.cursor()
    low = 0
    for high in [*sorted(live), _END]:
        found = low < high and cursor.set_range(chunk_key(low, 0))
        while found:
            place = split_key(bytes(cursor.key()))
            release_pages(np.frombuffer(cursor.value(), np.uint8))
            if place is None or place[0] >= high:
                break
            yield bytes(cursor.key())
            found = cursor.next()
        low = high + 1
