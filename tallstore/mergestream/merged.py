"""A merged model as something to load, to write to disk, or to store as a task."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch

from tallstore.catalog import Catalog
from tallstore.codecs import Bytes
from tallstore.devices import on_device
from tallstore.dtypes import is_codable, itemsize, torch_dtype
from tallstore.engine.snapshot import Snapshot
from tallstore.loading import Loader, Progress, Put, no_progress
from tallstore.mergestream.blend import Blend, BlendedSpan
from tallstore.mergestream.stored import merged_parts
from tallstore.spans import Run
from tallstore.specs import JSON, FileSpec, SegmentSpec, TensorSpec
from tallstore.workers import workers

__all__ = ["MergedLoader", "MergedSource"]

_Key = tuple[bool, int, int]


class MergedLoader(Loader):
    """Loads a merge, laid out like the base or like one of the tasks.

    Everything that is no merged weight is what that one has: heads and other tensors that the
    base lacks, buffers of integers, files.

    Parameters
    ----------
    like
        A task's name; None for the base.
    device
        Where `load` leaves it; merged it is on the CPU.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        catalog: Catalog,
        *,
        like: str | None,
        blend: Blend,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(snapshot, catalog, task=like, device=device)
        self.what = f"{snapshot.path}: merge of {', '.join(map(repr, blend.feed.tasks))}"
        self._blend = blend
        #: Segments of which a part is merged.
        self._merged = set(range(len(self.contents.segments)))
        if self.task is not None:
            self._merged = {number for number, _ in merged_parts(self.task, self.base)}

    def _load_on(
        self, device: torch.device, kinds: Mapping[int, str], progress: Progress
    ) -> dict[int, torch.Tensor]:
        memory = {n: np.empty(self.contents.segments[n].nbytes, np.uint8) for n in kinds}
        self.stream(list(kinds), targets=memory, progress=progress)
        moved = {}
        with on_device(device, f"loading {self.what}"):
            for number, kind in kinds.items():
                stored = torch_dtype(self.contents.segments[number].dtype)
                typed = torch.from_numpy(memory.pop(number)).view(stored)
                moved[number] = typed.to(device, torch_dtype(kind)).view(torch.uint8)
        return moved

    def merges(self, key: _Key, run: Run) -> bool:
        """Whether a run of a span is of merged weights."""
        own, arena, _ = key
        codable = is_codable(self.base.layout.arenas[arena].dtype)
        return not own and codable and run.segment in self._merged

    def open(self, key: _Key) -> BlendedSpan:
        """Merge a span; valid until the same thread opens the next one."""
        _, arena, span = key
        return self._blend.open(arena, span)

    def piece(self, opened: BlendedSpan, run: Run) -> Bytes:
        """The bytes of a run of an opened span."""
        dtype = self.contents.segments[run.segment].dtype
        return opened.raw(run.within, run.within + run.count, dtype)

    def stream(
        self,
        segments: Sequence[int],
        *,
        targets: Mapping[int, Bytes],
        put: Put | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Merge and decode segments, a span at a time and several at once; see `Loader.stream`."""
        wanted = set(segments)

        def work(key: _Key) -> None:
            for run, raw in self.pieces(key, wanted):
                if run.segment in targets:
                    start = run.start * itemsize(self.contents.segments[run.segment].dtype)
                    np.copyto(targets[run.segment][start : start + raw.size], raw)
                elif put is not None:
                    put(run.segment, run.start, raw)
                progress(raw.size)

        keys = self.decoder.spans(segments)
        with workers(min(self._blend.feed.threads, max(len(keys), 1))) as pool:
            for _ in pool.each(work, keys):
                pass

    def pieces(self, key: _Key, wanted: Collection[int]) -> Iterator[tuple[Run, Bytes]]:
        """The runs of a span that belong to the segments `wanted`, with their bytes."""
        runs = [run for run in self.decoder.runs(key) if run.segment in wanted]
        merged = [run for run in runs if self.merges(key, run)]
        if merged:
            opened = self.open(key)
            yield from ((run, self.piece(opened, run)) for run in merged)
        runs = [run for run in runs if not self.merges(key, run)]
        if not runs:
            return
        data = self.decoder.load(key, coded=any(run.coded for run in runs))
        sizes = [run.count * itemsize(self.contents.segments[run.segment].dtype) for run in runs]
        filled = [(run, np.empty(n, np.uint8)) for run, n in zip(runs, sizes, strict=True)]
        self.decoder.decode(data, key, filled)
        data.release()
        yield from filled


class MergedSource:
    """A merge as a checkpoint; implements `tallstore.sources.source.Source`.

    Each thread keeps the span that it merged last, so that whoever reads in the order of the base
    has each merged once.
    """

    kind = "store"

    def __init__(self, loader: MergedLoader, *, label: str) -> None:
        self._loader = loader
        self._last = threading.local()
        self.label = label
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
        """Fill `out` with the segment's bytes from byte `start` on. Thread-safe."""
        loader = self._loader
        stop = start + out.size
        size = itemsize(self.segments[segment].dtype)
        for key in loader.decoder.spans([segment]):
            for run in loader.decoder.runs(key):
                low = max(start, run.start * size)
                high = min(stop, (run.start + run.count) * size)
                if run.segment != segment or low >= high:
                    continue
                raw = self._raw(key, run)
                first = run.start * size
                out[low - start : high - start] = raw[low - first : high - first]

    def _raw(self, key: _Key, run: Run) -> Bytes:
        if not self._loader.merges(key, run):
            pieces = self._loader.pieces(key, {run.segment})
            return next(raw for other, raw in pieces if other == run)
        if getattr(self._last, "key", None) != key:
            self._last.key = None
            self._last.opened = self._loader.open(key)
            self._last.key = key
        return self._loader.piece(self._last.opened, run)

    def read_file(self, path: str) -> bytes:
        """The content of one of `files`."""
        return self._loader.read_file(path)

    def close(self) -> None:
        """Nothing: the snapshot is the loader's."""

    def __enter__(self) -> MergedSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
