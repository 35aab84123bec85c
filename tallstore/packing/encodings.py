"""Which codec a chunk is tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from tallstore.codecs import GUIDED, PLANES, RAW, SYMBOLS, TEXT, ZSTD, Bytes
from tallstore.codecs.guided import DTYPES
from tallstore.codecs.zstd import compress
from tallstore.dtypes import itemsize
from tallstore.engine.chunk import Encoding

__all__ = ["AS_IS", "BITS", "DOCUMENT", "Policy", "codes", "elements", "policy", "residuals"]

#: The encoding of a chunk of elements, from its dtype and its bytes.
Policy = Callable[[str, Bytes], Encoding]

AS_IS: Final = Encoding(RAW)
#: Packed planes, files.
BITS: Final = Encoding(ZSTD)
#: Of small models documents take as much as sparse codes.
DOCUMENT: Final = Encoding(TEXT)

#: What `_plain` looks at: pieces of this many bytes, from the start, the middle and the end.
_PROBE: Final = 8 << 10
#: Compression on the way to disk pays only where it gains a lot; trained weights do not.
_WORTHWHILE: Final = 0.4


def elements(dtype: str) -> Encoding:
    """For elements that are written once and kept: split off what compresses in a float."""
    if dtype in ("float32", "bfloat16", "float16", "float64"):
        # A mantissa that saves a tenth would cost more to decode than all the exponents.
        return Encoding(PLANES, itemsize(dtype), min_gain=0.25)
    return BITS


def codes(planes: int) -> Encoding:
    """For packed codes of so many planes.

    Codes that are much alike from one weight to the next, as in rows that hardly moved, are shorter
    plane by plane; all others side by side.
    """
    return BITS if planes == 1 else Encoding(SYMBOLS, planes, otherwise=BITS)


def residuals(dtype: str, start: Bytes, *, plain: bool) -> Encoding:
    """For zigzag differences from the words of `start`: the high bytes are mostly zero.

    Parameters
    ----------
    plain
        Whether readers of format version 1 have to know the codec.
    """
    if dtype in DTYPES and not plain:
        return Encoding(GUIDED, DTYPES[dtype], side=start)
    return Encoding(PLANES, itemsize(dtype))


def _plain(data: Bytes) -> Encoding:
    """For a plain save, which is to be as fast as the disk: compress only what nearly vanishes."""
    if data.size < _PROBE:
        return BITS
    middle = (data.size - _PROBE) // 2
    starts = (0, middle, data.size - _PROBE)
    probe = np.concatenate([data[start : start + _PROBE] for start in starts])
    return AS_IS if compress(probe, min_gain=_WORTHWHILE) is None else BITS


def policy(compress: bool) -> Policy:
    """How elements are written: compressed, or as fast as the disk takes them."""
    if compress:
        return lambda dtype, _: elements(dtype)
    return lambda _, data: _plain(data)
