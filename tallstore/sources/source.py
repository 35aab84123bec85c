"""What packing and saving read from: anything that gives segments piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tallstore.specs import JSON, FileSpec, SegmentSpec, TensorSpec

__all__ = ["Bytes", "Source"]

#: A flat uint8 array.
Bytes = npt.NDArray[np.uint8]


class Source(Protocol):
    """A checkpoint that is read lazily, segment by segment, in pieces of any size.

    Attributes
    ----------
    label
        What error messages and listings call it: usually its path.
    kind
        ``"object"``, ``"safetensors"``, ``"model-directory"``, ``"torch"`` or ``"store"``.
    tree
        The nest around the tensors, as `tallstore.objects` writes it.
    tensors
        Every tensor, in order; names are unique.
    segments
        The segments they view.
    files
        Files that belong to the checkpoint and come back byte for byte.
    notes
        Human-readable remarks, one line each, on what opening it did (a wrapper taken off, ...).
    """

    @property
    def label(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def tree(self) -> JSON: ...
    @property
    def tensors(self) -> Sequence[TensorSpec]: ...
    @property
    def segments(self) -> Sequence[SegmentSpec]: ...
    @property
    def files(self) -> Sequence[FileSpec]: ...
    @property
    def notes(self) -> Sequence[str]: ...

    def read(self, segment: int, start: int, out: Bytes) -> None:
        """Fill `out` with the segment's bytes from byte `start` on. Thread-safe.

        Raises
        ------
        CheckpointError
            The bytes cannot be read.
        """
        ...

    def read_file(self, path: str) -> bytes:
        """The content of one of `files`."""
        ...

    def close(self) -> None:
        """Release what it holds open."""
        ...

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc: object) -> None: ...
