"""A store as a source: its base, or one of its tasks, read like any checkpoint."""

from __future__ import annotations

import numpy as np

from tallstore.codecs import Bytes
from tallstore.dtypes import itemsize
from tallstore.engine.snapshot import Snapshot
from tallstore.loading import Loader
from tallstore.specs import JSON, FileSpec, SegmentSpec, TensorSpec

__all__ = ["StoreSource"]


class StoreSource:
    """Implements `tallstore.sources.source.Source` over a `Loader`.

    Parameters
    ----------
    loader
        What is read.
    label
        For messages: ``"zoo.tall::math"``.
    owned
        A snapshot to close with the source.
    """

    kind = "store"

    def __init__(self, loader: Loader, *, label: str, owned: Snapshot | None = None) -> None:
        self._loader = loader
        self._owned = owned
        self.label = label
        self.store = loader.snapshot.path
        self.notes: tuple[str, ...] = ()

    @property
    def tree(self) -> JSON:
        """The nest around the tensors."""
        return self._loader.contents.tree

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor."""
        return self._loader.contents.tensors

    @property
    def segments(self) -> tuple[SegmentSpec, ...]:
        """The segments they view."""
        return self._loader.contents.segments

    @property
    def files(self) -> tuple[FileSpec, ...]:
        """Files that belong to it."""
        return tuple(FileSpec(f.path, f.nbytes) for f in self._loader.contents.files)

    def read(self, segment: int, start: int, out: Bytes) -> None:
        """Fill `out` with the segment's bytes from `start` on. Thread-safe.

        Only the spans that hold them are decoded; elements are read whole.
        """
        size = itemsize(self.segments[segment].dtype)
        first, last = start // size, -(-(start + out.size) // size)
        decoder = self._loader.decoder
        for key in decoder.spans([segment]):
            runs = [
                run
                for run in decoder.runs(key)
                if run.segment == segment and run.start < last and run.start + run.count > first
            ]
            if not runs:
                continue
            data = decoder.load(key, coded=any(run.coded for run in runs))
            for run in runs:
                whole = np.empty(run.count * size, np.uint8)
                decoder.decode(data, key, [(run, whole)])
                low = max(start, run.start * size)
                high = min(start + out.size, (run.start + run.count) * size)
                piece = whole[low - run.start * size : high - run.start * size]
                out[low - start : high - start] = piece
            data.release()

    def read_file(self, path: str) -> bytes:
        """The content of one of `files`."""
        return self._loader.read_file(path)

    def close(self) -> None:
        """Close the snapshot, if it is the source's."""
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    def __enter__(self) -> StoreSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
