"""What an object may measure."""

from __future__ import annotations

from typing import Final

__all__ = ["INLINE_LIMIT", "MAX_DEPTH", "MAX_REPEATS"]

#: Strings, bytes and numpy scalars longer than this become segments rather than JSON.
INLINE_LIMIT: Final = 4096

#: Containers may nest this deep; Python's own recursion limit is not far above.
MAX_DEPTH: Final = 200

#: Items of containers met again. Each meeting is written out anew, so thirty lists of the
#: form ``a = [a, a]`` would make a billion.
MAX_REPEATS: Final = 1 << 20
