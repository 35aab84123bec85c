"""One zstd frame."""

from __future__ import annotations

from typing import Final

import zstandard

from tallstore.codecs.codec import Bytes
from tallstore.errors import CorruptStoreError

__all__ = ["ZstdCodec", "compress", "decompress"]

_LEVEL: Final = 1


def compress(data: Bytes, *, min_gain: float, level: int = _LEVEL) -> bytes | None:
    """One frame that carries its content size, or None where it saves less than `min_gain`."""
    frame = zstandard.ZstdCompressor(level=level, write_checksum=False).compress(data.data)
    return frame if len(frame) <= (1 - min_gain) * data.size else None


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
        with zstandard.ZstdDecompressor().stream_reader(payload) as reader:
            filled = 0
            view = out.data
            while filled < out.size:
                got = reader.readinto(view[filled:])
                if not got:
                    raise CorruptStoreError(f"a frame ends after {filled} of {out.size} bytes")
                filled += got
            if reader.read(1):
                raise CorruptStoreError(f"a frame holds more than its {out.size} bytes")
    except zstandard.ZstdError as exc:
        raise CorruptStoreError(f"zstd: {exc}") from exc


class ZstdCodec:
    """A whole chunk as one zstd frame; `parameter` is unused."""

    number: Final[int] = 1

    def encode(self, data: Bytes, *, parameter: int, min_gain: float) -> bytes | None:
        """Compress at level 1, the level that keeps up with the disk."""
        return compress(data, min_gain=min_gain)

    def decode(self, payload: memoryview, out: Bytes, *, parameter: int) -> None:
        """Decompress."""
        decompress(payload, out)
