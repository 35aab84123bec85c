"""Byte planes of equal-sized words, each its own zstd frame or as it is.

Byte k of every word goes to plane k (little endian), so that the bytes that carry structure,
a float's exponent or the high bytes of small integers, meet their like. For floats each word is
rotated left by one bit first: the exponent of a float32 or bfloat16 then fills the top byte and
the sign joins the mantissa, which does not compress (this is the split that ZipNN describes,
arXiv 2411.05239).

Payload: for each plane a little-endian u32, the body's length with bit 31 set where the body is
the plane as it is; then the bodies in plane order. `parameter` is the word size in bytes (1, 2,
4 or 8), plus 0x80 where words are rotated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tallstore.codecs import zstd
from tallstore.codecs.codec import Bytes
from tallstore.errors import CorruptStoreError

__all__ = ["ROTATED", "PlanesCodec"]

ROTATED: Final = 0x80

_RAW: Final = 1 << 31
_WORDS: Final[dict[int, type[np.unsignedinteger[Any]]]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
}
#: Words a step; what a step touches stays in the second-level cache.
_STEP: Final = 1 << 16


def _word(parameter: int) -> tuple[type[np.unsignedinteger[Any]], int, bool]:
    size = parameter & ~ROTATED
    try:
        return _WORDS[size], size, bool(parameter & ROTATED)
    except KeyError:
        raise CorruptStoreError(f"planes of words of {size} bytes do not exist") from None


def _split(words: npt.NDArray[Any], size: int, rotated: bool) -> list[Bytes]:
    kind = words.dtype.type
    planes = [np.empty(words.size, np.uint8) for _ in range(size)]
    for start in range(0, words.size, _STEP):
        step = words[start : start + _STEP]
        if rotated:
            step = (step << kind(1)) | (step >> kind(8 * size - 1))
        for k, plane in enumerate(planes):
            plane[start : start + _STEP] = (step >> kind(8 * k)).astype(np.uint8)
    return planes


def _merge(planes: list[Bytes], words: npt.NDArray[Any], size: int, rotated: bool) -> None:
    kind = words.dtype.type
    scratch = np.empty(min(_STEP, words.size), words.dtype)
    for start in range(0, words.size, _STEP):
        step = words[start : start + _STEP]
        held = scratch[: step.size]
        np.copyto(step, planes[-1][start : start + _STEP])
        for plane in reversed(planes[:-1]):
            np.left_shift(step, kind(8), out=step)
            np.bitwise_or(step, plane[start : start + _STEP], out=step)
        if rotated:
            np.left_shift(step, kind(8 * size - 1), out=held)
            np.right_shift(step, kind(1), out=step)
            np.bitwise_or(step, held, out=step)


def _merge_pair(planes: list[Bytes], words: npt.NDArray[np.uint16]) -> None:
    """Two rotated planes to 16-bit words, in fewer passes than `_merge`: half of all decoding."""
    low, high = planes
    scratch = np.empty(min(_STEP, words.size), np.uint16)
    one, seven, fifteen = np.uint16(1), np.uint16(7), np.uint16(15)
    for start in range(0, words.size, _STEP):
        step = words[start : start + _STEP]
        held = scratch[: step.size]
        np.copyto(step, high[start : start + _STEP])
        np.left_shift(step, seven, out=step)
        np.copyto(held, low[start : start + _STEP])
        np.bitwise_or(step, held >> one, out=step)
        np.left_shift(held, fifteen, out=held)
        np.bitwise_or(step, held, out=step)


class PlanesCodec:
    """Byte planes; see the module's text for the payload."""

    number: Final[int] = 2

    def encode(self, data: Bytes, *, parameter: int) -> bytes | None:
        """Split, and compress each plane that gains."""
        kind, size, rotated = _word(parameter)
        if data.size % size:
            raise ValueError(f"{data.size} bytes are no whole number of {size}-byte words")
        planes = _split(data.view(kind), size, rotated)
        lengths, bodies = [], []
        for plane in planes:
            frame = zstd.compress(plane)
            bodies.append(plane.tobytes() if frame is None else frame)
            lengths.append(plane.size | _RAW if frame is None else len(frame))
        payload = struct.pack(f"<{size}I", *lengths) + b"".join(bodies)
        return payload if len(payload) <= (1 - zstd.MIN_GAIN) * data.size else None

    def decode(self, payload: memoryview, out: Bytes, *, parameter: int) -> None:
        """Decompress the planes and merge them."""
        kind, size, rotated = _word(parameter)
        if out.size % size:
            raise CorruptStoreError(f"{out.size} bytes are no whole number of {size}-byte words")
        planes = list(_bodies(payload, size, out.size // size))
        words = out.view(kind)
        if rotated and size == 2:
            _merge_pair(planes, words)
        else:
            _merge(planes, words, size, rotated)


def _bodies(payload: memoryview, size: int, count: int) -> Iterator[Bytes]:
    if len(payload) < 4 * size:
        raise CorruptStoreError("a payload of planes ends within its lengths")
    position = 4 * size
    for length in struct.unpack_from(f"<{size}I", payload):
        nbytes = length & ~_RAW
        body = payload[position : position + nbytes]
        if len(body) != nbytes:
            raise CorruptStoreError("a payload of planes ends within a plane")
        position += nbytes
        if length & _RAW:
            if nbytes != count:
                raise CorruptStoreError(f"a plane of {nbytes} bytes where {count} are expected")
            yield np.frombuffer(body, np.uint8)
        else:
            plane = np.empty(count, np.uint8)
            zstd.decompress(body, plane)
            yield plane
    if position != len(payload):
        raise CorruptStoreError("a payload of planes goes on after its last plane")
