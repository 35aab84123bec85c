"""Two packed planes with few bits set: the gaps between the set ones, and which plane each is in.

The raw bytes are two planes of equal size, LSB-first, plus and minus; no bit is set in both. What
is written is the distance from each touched weight to the next, as one byte where it fits, entropy
coded: over random positions that comes to within 2 % of the entropy of the positions. Below a
density of about 1/250 two bytes a gap are shorter, the lower one as it is.

Payload: little-endian u32 values weights (of a plane), touched, symbols, low and length; the
symbols, `length` bytes with bit 31 set where they are as they stand, else one zstd frame; touched x
low bytes, `low` being 0 or 1; one packed bit a touched weight, set where it is in the second plane.
A symbol s below 255 is s units of 256**low untouched weights, with low = 1 as many more as the next
low byte says, and a touched one; 255 is 255 units of untouched weights. There are no more symbols
than raw bytes, and the last is a touched weight. `parameter` is unused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.codecs import zstd
from tallstore.codecs.codec import Bytes
from tallstore.errors import CorruptStoreError
from tallstore.scratch import Scratch

__all__ = ["SparseCodec", "Touched", "compact_form", "touched_of_planes"]

_HEAD: Final = struct.Struct("<5I")
_RAW: Final = 1 << 31
_SKIP: Final = 255
#: Weights a group, and where the code goes in an entry: see `kernels/sparse_reference.py`.
_GROUP: Final = 4096
#: From so many weights a touched one, both widths of a gap are tried.
_WIDE_FROM: Final = 100


@dataclass(frozen=True, slots=True)
class Touched:
    """The touched weights of a chunk."""

    positions: npt.NDArray[np.int64]
    """Shape (touched,), ascending: int64 is what numpy indexes with as it is."""
    minus: Bytes
    """Shape (touched,): 1 where the weight is in the second plane, else 0."""


def touched_of_planes(data: Bytes) -> Touched | None:
    """The touched weights of two planes, one after the other; None where they share a bit."""
    plus, minus = data.reshape(2, -1)
    if np.bitwise_and(plus, minus).any():
        return None
    flags = np.unpackbits(np.bitwise_or(plus, minus), bitorder="little")
    positions = np.flatnonzero(flags.view(np.bool_))
    return Touched(positions, minus[positions >> 3] >> (positions & 7).astype(np.uint8) & 1)


def compact_form(
    touched: Touched, weights: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """The entries and group starts of `tallstore.kernels.sparse_reference.SparseCode`.

    Parameters
    ----------
    touched
        Of a chunk; positions past `weights` are left out.
    weights
        Weights of the chunk. Of several chunks, whole groups but for the last, the entries follow
        one another, and the starts are added up.

    Returns
    -------
    entries
        int16, shape (touched,): position in the group of 4096 weights | code << 12; code 1 is
        plus, 2 is minus.
    starts
        int64, shape (groups + 1,): entries of group g are starts[g] .. starts[g + 1] - 1.
    """
    bounds = np.arange(-(-weights // _GROUP) + 1, dtype=np.int64) * _GROUP
    starts = np.searchsorted(touched.positions, np.minimum(bounds, weights))
    count = int(starts[-1])
    entries = (touched.positions[:count] % _GROUP).astype(np.int16)
    entries += (touched.minus[:count].astype(np.int16) + np.int16(1)) << np.int16(12)
    return entries, starts


class SparseCodec:
    """Planes of few set bits; see the module's text for the payload."""

    number: Final[int] = 3

    def __init__(self) -> None:
        self._scratch = Scratch()

    def encode(
        self, data: Bytes, *, parameter: int, min_gain: float, side: Bytes | None = None
    ) -> bytes | None:
        """Gaps and signs; None too where the planes share a bit, or a quarter or more is set."""
        if not data.size or data.size % 2:
            return None
        touched = touched_of_planes(data)
        if touched is None or touched.positions.size > data.size:
            return None
        widths = (0, 1) if touched.positions.size * _WIDE_FROM < 4 * data.size else (0,)
        tried = [_payload(touched, low, 4 * data.size) for low in widths]
        payload = min((p for p in tried if p is not None), key=len, default=None)
        fits = payload is not None and len(payload) <= (1 - min_gain) * data.size
        return payload if fits else None

    def decode(
        self, payload: memoryview, out: Bytes, *, parameter: int, side: Bytes | None = None
    ) -> None:
        """Scatter the bits into planes."""
        if out.size % 2:
            raise CorruptStoreError(f"{out.size} bytes are no two planes of one size")
        planes = out.reshape(2, -1)
        weights = 8 * planes.shape[1]
        touched = self.touched(payload, weights)
        dense = self._scratch.take("dense", weights)
        for number, plane in enumerate(planes):
            dense.fill(0)
            dense[touched.positions] = touched.minus if number else 1
            np.copyto(plane, np.packbits(dense, bitorder="little"))
        np.bitwise_xor(planes[0], planes[1], out=planes[0])

    def touched(self, payload: memoryview, weights: int) -> Touched:
        """The touched weights alone, without making planes.

        Parameters
        ----------
        payload
            What `encode` gave.
        weights
            Weights of a plane, its padding included: four for each byte of the raw chunk.

        Raises
        ------
        CorruptStoreError
            The payload is not what `encode` writes for that many weights.
        """
        if len(payload) < _HEAD.size:
            raise CorruptStoreError("a payload of gaps ends within its lengths")
        announced, count, symbols, low, length = _HEAD.unpack_from(payload)
        if announced != weights:
            raise CorruptStoreError(f"gaps of {announced} weights where {weights} are expected")
        if low > 1:
            raise CorruptStoreError(f"gaps with {low} low bytes do not exist")
        if not count <= symbols <= weights // 4:
            raise CorruptStoreError(f"{symbols} gaps of {count} in {weights} weights")
        stored = length & ~_RAW
        signs = (count + 7) // 8
        if len(payload) != _HEAD.size + stored + count * low + signs:
            raise CorruptStoreError(f"a payload of gaps of {len(payload)} bytes: another length")
        body = payload[_HEAD.size : _HEAD.size + stored]
        if length & _RAW:
            if stored != symbols:
                raise CorruptStoreError(f"{stored} gaps where {symbols} are expected")
            gaps = np.frombuffer(body, np.uint8)
        else:
            gaps = self._scratch.take("gaps", symbols)
            zstd.decompress(body, gaps)
        rest = np.frombuffer(payload, np.uint8, offset=_HEAD.size + stored)
        minus = np.unpackbits(rest[rest.size - signs :], bitorder="little")
        if minus[count:].any():
            raise CorruptStoreError("signs of no weight")
        return Touched(self._positions(gaps, rest[:count] if low else None, count, weights),
                       minus[:count])  # fmt: skip

    def _positions(
        self, gaps: Bytes, low: Bytes | None, count: int, weights: int
    ) -> npt.NDArray[np.int64]:
        at = self._scratch.take("positions", 8 * gaps.size).view(np.int64)
        # 255 alone stays as it is: the others are followed by the touched weight itself.
        ends = gaps != _SKIP
        every = int(np.count_nonzero(ends)) == gaps.size
        if low is None:
            step = self._scratch.take("steps", gaps.size)
            np.minimum(gaps, _SKIP - 1, out=step)
            np.add(step, 1, out=step)
            np.copyto(at, step)
        else:
            np.multiply(gaps, 256, out=at, dtype=np.int64)
            if int(np.count_nonzero(ends)) == low.size:
                at[ends] += low.astype(np.int64) + 1
        np.cumsum(at, out=at)
        positions = (at if every else at[ends]) - 1
        if positions.size != count:
            raise CorruptStoreError(f"{positions.size} touched weights where {count} are expected")
        if gaps.size and (not ends[-1] or positions[-1] >= weights):
            raise CorruptStoreError(f"gaps lead past the {weights} weights")
        return positions


def _payload(touched: Touched, low: int, weights: int) -> bytes | None:
    positions = touched.positions
    gaps = np.diff(positions, prepend=-1) - 1
    units = gaps >> 8 * low
    skips, last = np.divmod(units, _SKIP)
    places = np.cumsum(skips + 1) - 1
    count = int(places[-1]) + 1 if places.size else 0
    if count > weights // 4:
        return None
    symbols = np.full(count, _SKIP, np.uint8)
    symbols[places] = last
    frame = zstd.literals(symbols)
    raw = len(frame) >= symbols.size
    body = symbols.tobytes() if raw else frame
    length = len(body) | (_RAW if raw else 0)
    head = _HEAD.pack(weights, positions.size, symbols.size, low, length)
    lows = (gaps & 255).astype(np.uint8).tobytes() if low else b""
    return head + body + lows + np.packbits(touched.minus, bitorder="little").tobytes()
