"""One pass over the masks of a store: what `TallStore.statistics` gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from tallstore import ops
from tallstore.catalog import Catalog
from tallstore.codecs import Bytes
from tallstore.counting import Tally, overlaps, tally
from tallstore.devices import on_device, wanted_device
from tallstore.documents import BaseDocument
from tallstore.dtypes import is_codable
from tallstore.engine.snapshot import Snapshot
from tallstore.mask_statistics.cosines import cosines
from tallstore.mask_statistics.layers import layer_names
from tallstore.mask_statistics.results import MaskStatistics, PartStatistics, TaskUse, Use
from tallstore.masks import MaskReader, masked_tasks
from tallstore.progress import Meter, Report
from tallstore.scratch import Scratch
from tallstore.workers import Workers, workers

__all__ = ["study"]

Counts = npt.NDArray[np.int64]
_FLOAT32: Final = 4


@dataclass(slots=True)
class _Sums:
    """Counts over a part of the model, for T tasks."""

    tasks: int
    weights: int = 0
    coded: Counts = field(init=False)
    ones: Counts = field(init=False)
    exclusive: Counts = field(init=False)
    used_by: Counts = field(init=False)

    def __post_init__(self) -> None:
        self.coded, self.ones, self.exclusive, self.used_by = np.zeros((4, self.tasks), np.int64)

    def add(self, other: _Sums) -> None:
        self.weights += other.weights
        self.coded += other.coded
        self.ones += other.ones
        self.exclusive += other.exclusive
        self.used_by += other.used_by

    def use(self) -> Use:
        used = self.used_by.tolist()
        return Use(histogram=(self.weights - sum(used), *used))

    def by_task(self, names: Sequence[str]) -> dict[str, TaskUse]:
        rows = zip(names, self.coded, self.ones, self.exclusive, strict=True)
        return {
            name: TaskUse(coded=int(coded), ones=int(ones), exclusive=int(exclusive))
            for name, coded, ones, exclusive in rows
        }


def study(
    snapshot: Snapshot,
    catalog: Catalog,
    *,
    tasks: Sequence[str] | None = None,
    cosine: bool = False,
    device: torch.device | str | None = None,
    report: Report | None = None,
) -> MaskStatistics:
    """Count the masks of a store, by popcount on packed words; see `TallStore.statistics`.

    Memory is bounded by one span of the masks, a thread; with `cosine` also by one span of the
    task vectors in float32.
    """
    place = wanted_device(device)
    ops.choose_backend(place, None)
    names = masked_tasks(snapshot.path, catalog, tasks)
    reader = MaskReader(snapshot, catalog, names)
    meter = Meter(report)
    spans = reader.spans()
    with workers() as pool:
        total = sum(reader.nbytes(*item) for item in spans)
        segments, overlap = _count(
            reader, spans, place, pool, meter.stage("masks", total * len(names))
        )
        found = None
        exact = all(catalog.tasks[name].exact for name in names)
        if cosine:
            found = cosines(
                snapshot,
                reader.base,
                catalog.vector,
                reader.documents,
                spans,
                exact=exact,
                workers=pool,
                progress=meter.stage("cosines", 8 * _FLOAT32 * total * len(names)),
            )
    whole = _Sums(len(names))
    for sums in segments.values():
        whole.add(sums)
    base = reader.base.contents
    floating = sum(s.numel for s in base.segments if is_codable(s.dtype))
    tensors, layers = _parts(reader.base, segments, names)
    return MaskStatistics(
        tasks=whole.by_task(names),
        without_masks=tuple(n for n, task in catalog.tasks.items() if task.code != "tall"),
        use=whole.use(),
        uncoded=floating - whole.weights,
        layers=layers,
        tensors=tensors,
        overlap=tuple(map(tuple, overlap.tolist())),
        cosine=found,
        cosine_from=None if found is None else "exact" if exact else "codes",
    )


def _count(
    reader: MaskReader,
    spans: Iterable[tuple[int, int]],
    device: torch.device,
    pool: Workers,
    progress: Callable[[int], None],
) -> tuple[dict[int, _Sums], Counts]:
    """Sums for each of the base's segments that any task codes, and the overlaps."""
    count = len(reader.documents)
    segments: dict[int, _Sums] = defaultdict(lambda: _Sums(count))
    for task in range(count):
        for number, coded in reader.coded(task).items():
            segments[number].coded[task] = coded
            segments[number].weights = reader.base.contents.segments[number].numel
    scratch = Scratch()

    def work(item: tuple[int, int]) -> tuple[list[int], Any, Counts]:
        pieces = reader.pieces(*item)
        rows = reader.read(*item, pieces)
        starts = [piece.within for piece in pieces]
        if device.type == "cpu":
            found = tally(list(rows), starts, 8 * rows.shape[1], scratch=scratch)
            both = overlaps(list(rows), scratch=scratch)
        else:
            found, both = _count_on(device, rows, starts)
        progress(rows.nbytes)
        return [piece.segment for piece in pieces], found, both

    total = np.zeros((count, count), np.int64)
    for numbers, found, both in pool.each(work, spans):
        total += both
        for run, number in enumerate(numbers):
            if number in segments:  # else no task codes it, and all its bits are 0
                sums = segments[number]
                sums.ones += found.ones[:, run]
                sums.exclusive += found.exclusive[:, run]
                sums.used_by += found.used_by[:, run]
    return segments, total


def _count_on(device: torch.device, rows: Bytes, starts: Sequence[int]) -> tuple[Tally, Counts]:
    with on_device(device, "counting masks"):
        masks = torch.from_numpy(rows).to(device)
        found = ops.tally(masks, starts, 8 * rows.shape[1])
        return found, np.asarray(ops.mask_overlaps(masks).cpu())


def _parts(
    base: BaseDocument, segments: Mapping[int, _Sums], names: Sequence[str]
) -> tuple[tuple[PartStatistics, ...], tuple[PartStatistics, ...]]:
    """(tensors, layers), in the base's order."""
    first: dict[int, str] = {}
    for tensor in base.contents.tensors:
        first.setdefault(tensor.segment, tensor.name)
    named = {number: first.get(number, f"segment {number}") for number in sorted(segments)}
    # Of all the base's tensors: a layer's name must not depend on which tasks are counted.
    known = dict(zip(first.values(), layer_names(list(first.values())), strict=True))
    tensors = []
    layers: dict[str, _Sums] = defaultdict(lambda: _Sums(len(names)))
    for number, name in named.items():
        sums, layer = segments[number], known.get(name, name)
        layers[layer].add(sums)
        tensors.append(_part(name, layer, sums, names))
    return tuple(tensors), tuple(_part(name, name, sums, names) for name, sums in layers.items())


def _part(name: str, layer: str, sums: _Sums, names: Sequence[str]) -> PartStatistics:
    return PartStatistics(name=name, layer=layer, use=sums.use(), tasks=sums.by_task(names))
