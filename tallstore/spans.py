"""What a decoder hands about: the chunks of a span, and what they hold of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tallstore.advice import release_pages
from tallstore.codecs import Bytes
from tallstore.codes import ArenaCode

__all__ = ["Run", "Span", "SpanKey", "Take", "Touches"]

#: A span's name: (of the task's own arenas, arena, number).
SpanKey = tuple[bool, int, int]
#: Gives a buffer of so many bytes by its name.
Take = Callable[[str, int], Bytes]


@dataclass(frozen=True, slots=True)
class Touches:
    """The weights of a span that codes touch."""

    at: npt.NDArray[np.int64]
    """Ascending."""
    codes: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Run:
    """Elements `start` .. `start` + `count` of a segment of the loaded checkpoint.

    They come from the span being decoded, `within` weights into it.
    """

    segment: int
    start: int
    count: int
    within: int
    coded: bool
    origin: int
    """Segment of the base, or of the task's own, that they come from."""


@dataclass(frozen=True, slots=True)
class Span:
    """The decoded chunks of one span."""

    base: Bytes
    base_dtype: str
    code: ArenaCode | None = None
    planes: Bytes | None = None
    """Packed codes over the weights, plane after plane, `code_bits` of them."""
    vector: Bytes | None = None
    vector_dtype: str = "float32"
    residual: Bytes | None = None
    code_bits: int = 1
    touched: Mapping[str, Touches] | None = None
    """By form, the weights that sparse and seeded codes touch; None: they are among `planes`."""
    in_map: bool = False
    """Whether `base` is LMDB's own memory."""

    def chunks(self) -> Iterator[tuple[str, Bytes]]:
        """What there is, by the names that it was taken under."""
        for name in ("base", "planes", "vector", "residual"):
            data = getattr(self, name)
            if data is not None:
                yield name, data

    def release(self) -> None:
        """Let go of what is LMDB's; nothing of the span may be used afterwards."""
        if self.in_map:
            release_pages(self.base)
