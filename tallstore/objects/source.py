"""An object in memory as a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tallstore.errors import CheckpointError, UnsupportedObjectError
from tallstore.objects.dismantling import Dismantler
from tallstore.objects.storages import Piece
from tallstore.sources.source import Bytes
from tallstore.specs import JSON, FileSpec, SegmentSpec, TensorSpec

__all__ = ["ObjectSource"]


class ObjectSource:
    """An object in memory, as a `tallstore.sources.source.Source`.

    Its tensors are referenced, not copied: what is read is what they hold at that moment.

    Parameters
    ----------
    obj
        Any nesting of plain containers, scalars, numpy arrays and tensors; modules count as
        their ``state_dict()``.
    label
        What error messages call it.

    Raises
    ------
    UnsupportedObjectError
        Something inside cannot be stored; the message gives its path.
    """

    def __init__(self, obj: Any, *, label: str = "object") -> None:
        walk = Dismantler(label)
        self.label: str = label
        self.kind: str = "object"
        try:
            self.tree: JSON = walk.encode(obj)
        except RecursionError as exc:
            raise UnsupportedObjectError(
                f"{label}: it nests too deeply for Python's recursion limit here; flatten it"
            ) from exc
        gathered = walk.finish()
        self.tensors: Sequence[TensorSpec] = gathered.tensors
        self.segments: Sequence[SegmentSpec] = gathered.segments
        self.files: Sequence[FileSpec] = ()
        self.notes: Sequence[str] = tuple(walk.notes)
        self._pieces: tuple[Piece, ...] | None = gathered.pieces

    def read(self, segment: int, start: int, out: Bytes) -> None:
        """Fill `out` with the segment's bytes from byte `start` on. Thread-safe.

        Raises
        ------
        CheckpointError
            There are no such bytes, or the source was closed.
        """
        pieces = self._pieces
        if pieces is None:
            raise CheckpointError(f"{self.label}: it was closed and cannot be read any more")
        if not 0 <= segment < len(pieces):
            raise CheckpointError(f"{self.label}: there is no segment {segment}")
        held = self.segments[segment].nbytes
        if start < 0 or start + out.size > held:
            raise CheckpointError(
                f"{self.label}: segment {segment} has {held} bytes, but bytes {start} to "
                f"{start + out.size} were asked for"
            )
        try:
            pieces[segment].read(start, out)
        except (RuntimeError, ValueError, BufferError) as exc:
            raise CheckpointError(f"{self.label}: segment {segment} cannot be read: {exc}") from exc

    def read_file(self, path: str) -> bytes:
        """Refuse: an object has no files."""
        raise CheckpointError(f"{self.label}: an object has no file {path!r}")

    def close(self) -> None:
        """Let go of the tensors."""
        self._pieces = None

    def __enter__(self) -> ObjectSource:
        """Return the source itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()
