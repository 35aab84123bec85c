"""Float32 results in the dtypes that weights are kept in."""

from __future__ import annotations

from typing import Final

import numpy as np

from tallstore.codecs import Bytes
from tallstore.coding import from_float32, to_float32
from tallstore.merging import Floats

__all__ = ["converted", "finite"]

#: The largest finite element of each codable dtype.
_LARGEST: Final = {
    "float32": np.finfo(np.float32).max,
    "float16": np.float32(65504.0),
    "bfloat16": np.float32(3.3895314e38),
}


def finite(values: Floats, dtype: str) -> Floats:
    """Values cut to what is finite in a dtype: a sum can overflow, the more so in float16."""
    limit = _LARGEST[dtype]
    return np.clip(values, -limit, limit)


def converted(raw: Bytes, dtype: str, wanted: str) -> Bytes:
    """Elements of one codable dtype in another; the same bytes where the two are one."""
    return raw if dtype == wanted else from_float32(to_float32(raw, dtype), wanted)
