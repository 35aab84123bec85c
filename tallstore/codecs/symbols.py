"""Bit planes of codes, coded together: a bit of a code is likely or not given its other bits.

Rounded levels take few bits because most weights have the same few codes. Each plane by itself does
not know of the others: levels of 1.66 bits of entropy took 2.07. So codes are laid side by side, as
many as a byte holds, and the bytes get a Huffman code: 1.68 (`bench.codecs`; where more than two
thirds of the codes are nothing, most bytes are worth less than the bit which that gives them).

The bits are turned by transposing matrices of 8 x 8, each a word of 64 bits (Warren, Hacker's
Delight, section 7-3), a block of words at a time, in the cache.

Payload: one zstd frame of the symbols. `parameter` is K, 2 to 4 planes. With g = 8 // K, symbol
8 * m + i holds bit i of the g bytes from m * g on of each plane: that of byte m * g + j of plane k
is its bit j * K + k. The symbols of K = 3 have two bits more, which are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tallstore.codecs import zstd
from tallstore.codecs.codec import Bytes
from tallstore.errors import CorruptStoreError
from tallstore.scratch import Scratch

__all__ = ["SymbolsCodec"]

#: Words that are turned at once: they stay in the nearest cache.
_BLOCK: Final = 1 << 11
#: How far apart the bits are that change places, and which those are.
_SWAPS: Final = tuple(
    (np.uint64(shift), np.uint64(mask))
    for shift, mask in (
        (7, 0x00AA00AA00AA00AA),
        (14, 0x0000CCCC0000CCCC),
        (28, 0x00000000F0F0F0F0),
    )
)


class SymbolsCodec:
    """Codes side by side; see the module's text for the payload."""

    number: Final[int] = 5

    def __init__(self) -> None:
        self._scratch = Scratch()

    def encode(
        self, data: Bytes, *, parameter: int, min_gain: float, side: Bytes | None = None
    ) -> bytes | None:
        """Lay codes side by side; of two ways to compress them the one that takes less."""
        words = _words(parameter, data.size)
        if words is None:
            raise ValueError(f"{data.size} bytes are no {parameter} planes of whole symbols")
        symbols = self._scratch.take("symbols", 8 * words)
        rows = symbols.reshape(-1, 8)
        rows.fill(0)
        for row, part in _places(data, parameter):
            rows[:, row] = part
        self._turn(symbols)
        # Where most codes are nothing they repeat; else repetitions are chance.
        frames = zstd.literals(symbols), zstd.compress(symbols, min_gain=0.0)
        frame = min((one for one in frames if one is not None), key=len)
        return frame if len(frame) <= (1 - min_gain) * data.size else None

    def decode(
        self, payload: memoryview, out: Bytes, *, parameter: int, side: Bytes | None = None
    ) -> None:
        """Decompress the symbols and take them apart."""
        words = _words(parameter, out.size)
        if words is None:
            raise CorruptStoreError(f"{out.size} bytes are no {parameter} planes of whole symbols")
        symbols = self._scratch.take("symbols", 8 * words)
        zstd.decompress(payload, symbols)
        self._turn(symbols)
        rows = symbols.reshape(-1, 8)
        if rows[:, 8 // parameter * parameter :].any():
            raise CorruptStoreError("a symbol has bits of more planes than there are")
        for row, part in _places(out, parameter):
            part[:] = rows[:, row]

    def _turn(self, symbols: Bytes) -> None:
        """Transpose every word: byte r, bit c becomes byte c, bit r."""
        words: npt.NDArray[Any] = symbols.view("<u8")
        spare = self._scratch.take("turned", 8 * _BLOCK).view("<u8")
        for start in range(0, words.size, _BLOCK):
            some = words[start : start + _BLOCK]
            moved = spare[: some.size]
            for shift, mask in _SWAPS:
                np.right_shift(some, shift, out=moved)
                moved ^= some
                moved &= mask
                some ^= moved
                np.left_shift(moved, shift, out=moved)
                some ^= moved


def _words(planes: int, size: int) -> int | None:
    """Words of the symbols of so many bytes; None where they are not whole."""
    if planes not in (2, 3, 4) or size % (planes * (8 // planes)):
        return None
    return size // (planes * (8 // planes))


def _places(data: Bytes, planes: int) -> Iterator[tuple[int, Bytes]]:
    """Of every word, a byte's number, and the bytes of a plane that go there."""
    group = 8 // planes
    for k, plane in enumerate(data.reshape(planes, -1)):
        for j in range(group):
            yield j * planes + k, plane[j::group]
