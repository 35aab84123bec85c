"""Bits, packed LSB-first: weight i is bit ``i % 8`` of byte ``i // 8``.

This is numpy's ``bitorder="little"``, and a rule of the format.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["count_bits", "pack_bits", "packed_size", "unpack_bits"]


def packed_size(count: int) -> int:
    """Bytes that `count` packed bits take."""
    return (count + 7) // 8


def pack_bits(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Pack a flat bool array; bits past the end of the last byte are zero."""
    return np.packbits(flags, bitorder="little")


def unpack_bits(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.bool_]:
    """The first `count` bits as a flat bool array.

    Raises
    ------
    ValueError
        `packed` holds fewer than `count` bits.
    """
    if packed.size < packed_size(count):
        raise ValueError(f"{packed.size} bytes hold {packed.size * 8} bits, not {count}")
    flags = np.unpackbits(packed[: packed_size(count)], count=count, bitorder="little")
    result: npt.NDArray[Any] = flags.view(np.bool_)
    return result


def count_bits(packed: npt.NDArray[np.uint8]) -> int:
    """How many bits are set."""
    words = packed[: packed.size & ~7].view(np.uint64)
    tail = packed[packed.size & ~7 :]
    return int(np.bitwise_count(words).sum()) + int(np.bitwise_count(tail).sum())
