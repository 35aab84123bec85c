"""Whether a checkpoint is the one that a stored task was made from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from tallstore.catalog import Catalog
from tallstore.codecs import Bytes
from tallstore.coding import Floats
from tallstore.decoding import Decoder
from tallstore.describing import describe
from tallstore.documents import CODE, Contents
from tallstore.dtypes import itemsize
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError, MismatchError
from tallstore.loading import Loader
from tallstore.matching import match
from tallstore.packing.gathering import Candidate
from tallstore.packing.surveying import span_moves
from tallstore.sources.source import Source
from tallstore.storesource import StoreSource
from tallstore.workers import Workers

__all__ = ["Likeness", "check_original"]

#: By how much of itself a task's error may differ from the recorded one.
_CLOSE: Final = 0.01
#: By how much of itself a tensor's distance from the base may differ from the recorded one, which
#: has six digits, and may come from sums in another order.
_SAME: Final = 1e-4
#: Bytes compared at a time.
_PIECE: Final = 1 << 24
_CURE: Final = "A checkpoint of its own has a name of its own: add it"


def check_original(
    snapshot: Snapshot,
    catalog: Catalog,
    name: str,
    source: Source,
    *,
    workers: Workers,
    progress: Callable[[int], None],
) -> None:
    """Refuse a checkpoint that a task was not made from.

    Parameters
    ----------
    progress
        Called with how many bytes were gone through since the last call.

    Raises
    ------
    MismatchError
    """
    likeness = Likeness(snapshot, catalog, name, source)
    if catalog.tasks[name].exact:  # all of it was compared
        progress(catalog.tasks[name].nbytes)
        return
    decoder = Decoder(snapshot, likeness.base)

    def add(item: tuple[int, int]) -> None:
        arena, span = item
        start = decoder.base_and_vector(arena, span)[0].copy()
        likeness.add(arena, span, start)
        progress(start.size)

    for _ in workers.each(add, likeness.spans):
        pass
    likeness.check()


class Likeness:
    """How far a checkpoint is from what a task's codes give. Thread-safe.

    Parameters
    ----------
    snapshot, catalog
        Of the store.
    name
        The task.
    source
        The checkpoint.

    Raises
    ------
    MismatchError
        It differs in what the store has bit for bit of the task: all of it, with an exact tier.
    """

    def __init__(self, snapshot: Snapshot, catalog: Catalog, name: str, source: Source) -> None:
        described = describe(snapshot, catalog, task=name)
        if described.task is None:
            raise CorruptStoreError(f"{snapshot.path}: task {name!r} has no document")
        self.base, self.task = described.base, described.task
        plan = match(
            source.label,
            source.tensors,
            source.segments,
            base=self.base.contents,
            layout=self.base.layout,
            floats_only=True,
            strict=True,
        )
        self.candidate = Candidate(name, source, plan, self.base.layout)
        self._record = catalog.tasks[name]
        self._check_same(snapshot, catalog)
        self._decoder = Decoder(
            snapshot, self.base, task=self.task, vector=catalog.vector, exact=False
        )
        self._coded = {p.segment for ps in self.task.parts for p in ps if p.kind == CODE}
        self._sums: list[tuple[float, dict[int, float]]] = []

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(arena, span) of what `add` takes."""
        arenas = self.base.layout.arenas
        coded = sorted({code.arena for code in self.task.codes})
        return [(arena, span) for arena in coded for span in range(arenas[arena].spans)]

    def _check_same(self, snapshot: Snapshot, catalog: Catalog) -> None:
        """Refuse what differs where the store can tell to the bit."""
        contents, source, name = self.task.contents, self.candidate.source, self.candidate.name
        why = "it is not the checkpoint that the task was made from"
        segments = _segments(contents, source)
        if segments is None:
            difference = _difference(contents, source)
            if difference is None:
                raise MismatchError(
                    f"{source.label}: its tensors are those of task {name!r} of {snapshot.path}, "
                    "but others of them are tied, or laid out otherwise; give it in the form that "
                    "the task was made from"
                )
            raise MismatchError(
                f"{source.label}: {difference}, other than task {name!r} of {snapshot.path}: "
                f"{why}. {_CURE}"
            )
        kept = StoreSource(Loader(snapshot, catalog, task=name), label=name)
        for number, parts in enumerate(self.task.parts):
            start, size = 0, itemsize(contents.segments[number].dtype)
            for part in parts:
                stop = start + part.count
                there = (number, segments[number])
                known = self._record.exact or part.kind != CODE
                if known and not _equal(kept, source, there, start * size, stop * size):
                    names = [tensor.name for tensor in contents.tensors if tensor.segment == number]
                    raise MismatchError(
                        f"{source.label}: {names[0]!r} is not that of task {name!r} of "
                        f"{snapshot.path}: {why}. {_CURE}"
                    )
                start = stop

    def add(self, arena: int, span: int, base: Bytes) -> None:
        """Take in a span."""
        vector = None
        if any(code.arena == arena and code.shared for code in self.task.codes):
            vector = self._decoder.base_and_vector(arena, span)[1]
        codes = self._decoder.codes(arena, span, lambda _, size: np.empty(size, np.uint8))
        # Over nothing: what the codes are, before the weights are rounded to any dtype.
        none = np.zeros_like(base)
        seen = span_moves(self.candidate, arena, span, lambda *_: (base, None))
        given = self._decoder.predict(arena, span, none, vector, codes, "float32").view(np.float32)
        error, moved = 0.0, {}
        for item in seen.held:
            if item.base_segment in self._coded:
                some = slice(item.start, item.stop)
                error += _squares(given[some] - seen.moves[some])
                moved[item.base_segment] = _squares(seen.moves[some])
        self._sums.append((error, moved))

    def check(self) -> None:
        """Refuse a checkpoint that moved otherwise than the task did."""
        moved: dict[int, float] = defaultdict(float)
        for _, some in self._sums:
            for segment, squares in some.items():
                moved[segment] += squares
        error, whole = math.fsum(error for error, _ in self._sums), math.fsum(moved.values())
        found = math.sqrt(error / whole) if whole else 0.0
        wanted = self._record.relative_error or 0.0
        for stats in self.task.stats:
            if stats.segment not in moved:
                continue
            norm = math.sqrt(moved[stats.segment])
            if not abs(norm - stats.moved) <= _SAME * stats.moved:  # nor NaN
                raise MismatchError(
                    f"{self.candidate.source.label}: a tensor of it is {norm:.6g} from the base, "
                    f"that of task {self.candidate.name!r} was {stats.moved:.6g}: it is not the "
                    f"checkpoint that the task was coded from. {_CURE}"
                )
        if not abs(found - wanted) <= _CLOSE * max(wanted, 0.05):
            raise MismatchError(
                f"{self.candidate.source.label}: it errs by {found:.3f} from the codes of task "
                f"{self.candidate.name!r}, the checkpoint that they were made of by {wanted:.3f}: "
                f"it is another one. {_CURE}"
            )


def _segments(contents: Contents, source: Source) -> dict[int, int] | None:
    """The segment of a checkpoint for each of a task's; None where its tensors are others.

    Their order, and which are Parameters, may differ: the same weights come as a state dict and as
    a file.
    """
    others = {tensor.name: tensor for tensor in source.tensors}
    if others.keys() != {tensor.name for tensor in contents.tensors}:
        return None
    found: dict[int, int] = {}
    for tensor in contents.tensors:
        other = others[tensor.name]
        same = replace(
            other,
            segment=tensor.segment,
            parameter=tensor.parameter,
            requires_grad=tensor.requires_grad,
        )
        if same != tensor or found.setdefault(tensor.segment, other.segment) != other.segment:
            return None
    alike = all(contents.segments[n] == source.segments[m] for n, m in found.items())
    # As many segments as there are: what is tied there is tied here, and nothing else.
    whole = len(found) == len(contents.segments) == len(set(found.values()))
    return found if alike and whole else None


def _difference(contents: Contents, source: Source) -> str | None:
    """In what the tensors of a checkpoint are not a task's; None: in their layout alone."""
    there = {tensor.name: tensor for tensor in contents.tensors}
    given = {tensor.name: tensor for tensor in source.tensors}
    for name in sorted(there.keys() - given.keys()):
        return f"it has no tensor {name!r}, or has it tied to another"
    for name in sorted(given.keys() - there.keys()):
        return f"it has a tensor {name!r} of its own"
    for name, tensor in there.items():
        if (tensor.dtype, tensor.shape) != (given[name].dtype, given[name].shape):
            return f"its {name!r} is {given[name].dtype} {list(given[name].shape)}"
    return None


def _equal(one: Source, other: Source, segments: tuple[int, int], start: int, stop: int) -> bool:
    """Whether two checkpoints have the same bytes in a part of a segment of each."""
    for low in range(start, stop, _PIECE):
        first, second = (np.empty(min(_PIECE, stop - low), np.uint8) for _ in range(2))
        one.read(segments[0], low, first)
        other.read(segments[1], low, second)
        if not np.array_equal(first, second):
            return False
    return True


def _squares(values: Floats) -> float:
    return float(np.einsum("i,i->", values, values, dtype=np.float64, casting="same_kind"))
