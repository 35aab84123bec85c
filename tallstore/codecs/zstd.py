"""One zstd frame."""

from __future__ import annotations

import threading
from typing import Final

import zstandard

from tallstore.codecs.codec import Bytes
from tallstore.errors import CorruptStoreError

__all__ = ["ZstdCodec", "compress", "decompress", "literals"]

_LEVEL: Final = 1


def compress(data: Bytes, *, min_gain: float, level: int = _LEVEL) -> bytes | None:
    """One frame that carries its content size, or None where it saves less than `min_gain`."""
    frame = zstandard.ZstdCompressor(level=level, write_checksum=False).compress(data.data)
    return frame if len(frame) <= (1 - min_gain) * data.size else None


# No repetitions looked for, but those that are plain to see. The window is what blocks are cut by.
_LITERALS: Final = zstandard.ZstdCompressionParameters(
    compression_level=1,
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    window_log=20,
    write_content_size=1,
    write_checksum=0,
)


def literals(data: Bytes) -> bytes:
    """One frame of bytes that are independent of one another: their Huffman code, in effect.

    Matches among them would be chance, make the frame longer, and slow its reader down.
    """
    return zstandard.ZstdCompressor(compression_params=_LITERALS).compress(data.data)


def _frame_size(payload: memoryview) -> int:
    """Bytes of the frame that a payload starts with: zstd itself ignores what comes after it.

    RFC 8878, section 3.1.1: after the header blocks, each with three bytes of its own header (last
    block, type, size; a block of type 1 is one byte, repeated), and perhaps a checksum.
    """
    place = zstandard.frame_header_size(payload)
    last = 0
    while not last:
        header = int.from_bytes(payload[place : place + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        place += 3 + (1 if kind == 1 else size)
        if place > len(payload):
            raise CorruptStoreError("a frame ends within a block")
    return place + 4 * zstandard.get_frame_parameters(payload).has_checksum


class _Decompressors(threading.local):
    """A decompressor that each thread keeps: a new one takes as long as a short frame."""

    def __init__(self) -> None:
        self.own = zstandard.ZstdDecompressor()


_DECOMPRESSORS: Final = _Decompressors()


def decompress(payload: memoryview, out: Bytes) -> None:
    """Fill `out` from one frame; its declared size is checked before a byte is written.

    Raises
    ------
    CorruptStoreError
        Not one frame of exactly ``out.size`` bytes.
    """
    try:
        size = zstandard.frame_content_size(payload)
        if size != out.size:
            raise CorruptStoreError(f"a frame of {size} bytes where {out.size} are expected")
        with _DECOMPRESSORS.own.stream_reader(payload) as reader:
            filled = 0
            view = out.data
            while filled < out.size:
                got = reader.readinto(view[filled:])
                if not got:
                    raise CorruptStoreError(f"a frame ends after {filled} of {out.size} bytes")
                filled += got
            if reader.read(1):
                raise CorruptStoreError(f"a frame holds more than its {out.size} bytes")
        if _frame_size(payload) != len(payload):
            raise CorruptStoreError("bytes follow the frame")
    except zstandard.ZstdError as exc:
        raise CorruptStoreError(f"zstd: {exc}") from exc


class ZstdCodec:
    """A whole chunk as one zstd frame; `parameter` is unused.

    Parameters
    ----------
    level
        Of zstd: 1 keeps up with the disk. Readers need not know.
    """

    number: Final[int] = 1

    def __init__(self, *, level: int = _LEVEL) -> None:
        self._level = level

    def encode(
        self, data: Bytes, *, parameter: int, min_gain: float, side: Bytes | None = None
    ) -> bytes | None:
        """Compress."""
        return compress(data, min_gain=min_gain, level=self._level)

    def decode(
        self, payload: memoryview, out: Bytes, *, parameter: int, side: Bytes | None = None
    ) -> None:
        """Decompress."""
        decompress(payload, out)
