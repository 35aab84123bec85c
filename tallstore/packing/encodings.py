"""Which codec a chunk is tried with."""

from __future__ import annotations

from typing import Final

import numpy as np

from tallstore.codecs import PLANES, RAW, ROTATED, ZSTD, Bytes
from tallstore.codecs.zstd import compress
from tallstore.dtypes import itemsize
from tallstore.engine.chunk import Encoding

__all__ = ["AS_IS", "BITS", "elements", "plain", "residuals"]

AS_IS: Final = Encoding(RAW)
#: Packed planes, files, documents.
BITS: Final = Encoding(ZSTD)

#: What `plain` looks at: pieces of this many bytes, from the start, the middle and the end.
_PROBE: Final = 8 << 10
#: Compression on the way to disk pays only where it gains a lot; trained weights do not.
_WORTHWHILE: Final = 0.6


def elements(dtype: str) -> Encoding:
    """For elements that are written once and kept: split off what compresses in a float."""
    size = itemsize(dtype)
    if dtype in ("float32", "bfloat16"):
        return Encoding(PLANES, size | ROTATED)
    if dtype in ("float16", "float64"):
        return Encoding(PLANES, size)
    return BITS


def residuals(dtype: str) -> Encoding:
    """For zigzag differences: the high bytes are mostly zero."""
    return Encoding(PLANES, itemsize(dtype))


def plain(data: Bytes) -> Encoding:
    """For a plain save, which is to be as fast as the disk: compress only what nearly vanishes."""
    if data.size < _PROBE:
        return BITS
    middle = (data.size - _PROBE) // 2
    starts = (0, middle, data.size - _PROBE)
    probe = np.concatenate([data[start : start + _PROBE] for start in starts])
    frame = compress(probe)
    return BITS if frame is not None and len(frame) < _WORTHWHILE * probe.size else AS_IS
