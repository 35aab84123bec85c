"""The TALL masks of several tasks of a store, span by span, packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from tallstore.catalog import Catalog
from tallstore.codecs import Bytes
from tallstore.decoding import Decoder
from tallstore.describing import describe
from tallstore.documents import CODE, BaseDocument, TaskDocument
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import OptionError
from tallstore.layout import Piece
from tallstore.scratch import Scratch

__all__ = ["MaskReader", "masked_tasks"]

_Ranges = Mapping[int, list[tuple[int, int]]]


def _kind(code: str) -> str:
    """What a task without masks is."""
    return "exact differences from the base" if code == "none" else f"coded by {code!r}"


def masked_tasks(path: object, catalog: Catalog, wanted: Sequence[str] | None) -> list[str]:
    """The tasks to take masks of: those `wanted`, or all that have masks.

    Raises
    ------
    OptionError
        One of those wanted has no masks, or is named twice; or no task has masks.
    """
    having = [name for name, record in catalog.tasks.items() if record.code == "tall"]
    if not having:
        kinds = sorted({_kind(record.code) for record in catalog.tasks.values()})
        what = f"its tasks are {' and '.join(kinds)}" if kinds else "no tasks"
        raise OptionError(
            f"{path}: there are no masks here ({what}); masks come from packing a base and its "
            "fine-tunes together: tallstore pack, or tallstore.pack"
        )
    if wanted is None:
        return having
    if isinstance(wanted, str) or not all(isinstance(name, str) for name in wanted):
        raise OptionError(f"tasks={wanted!r}: a list of names of tasks is needed")
    if not wanted or len(set(wanted)) != len(wanted):
        raise OptionError(f"tasks={list(wanted)!r}: name at least one task, and none twice")
    for name in wanted:
        if name in catalog.tasks and name not in having:
            raise OptionError(
                f"{path}: task {name!r} has no masks ({_kind(catalog.tasks[name].code)}); leave it "
                f"out, or pack it together with the others. With masks: "
                f"{', '.join(map(repr, having))}"
            )
    return list(wanted)


class MaskReader:
    """Reads the masks of several tasks. Thread-safe.

    Parameters
    ----------
    snapshot
        Stays the caller's.
    catalog
        Of the snapshot.
    tasks
        Names of tasks that have masks; see `masked_tasks`.

    Raises
    ------
    UnknownTaskError, WrongBaseError, CorruptStoreError
    """

    def __init__(self, snapshot: Snapshot, catalog: Catalog, tasks: Sequence[str]) -> None:
        described = [describe(snapshot, catalog, task=name) for name in tasks]
        self.base: BaseDocument = described[0].base
        self.documents: Sequence[TaskDocument] = [d.task for d in described if d.task is not None]
        self._scratch: Final = Scratch()
        self._decoders = [
            Decoder(snapshot, self.base, task=task, vector=catalog.vector)
            for task in self.documents
        ]
        self._coded: list[_Ranges] = [_coded(task, self.base) for task in self.documents]

    def coded(self, task: int) -> dict[int, int]:
        """How many weights task number `task` codes in which of the base's segments."""
        return {n: sum(stop - start for start, stop in r) for n, r in self._coded[task].items()}

    def spans(self) -> list[tuple[int, int]]:
        """(arena, span) of all spans of the arenas in which any task has a mask."""
        codes = (code for task in self.documents for code in task.codes)
        arenas = sorted({code.arena for code in codes if code.planes is not None})
        return [(a, span) for a in arenas for span in range(self.base.layout.arenas[a].spans)]

    def nbytes(self, arena: int, span: int) -> int:
        """Bytes of one mask over a span."""
        record = self.base.layout.arenas[arena]
        return min(record.span, record.weights - span * record.span) // 8

    def pieces(self, arena: int, span: int) -> list[Piece]:
        """The parts of the base's segments in a span, in order."""
        return list(self.base.layout.pieces(arena, span))

    def read(self, arena: int, span: int, pieces: Sequence[Piece]) -> Bytes:
        """The masks of all tasks over a span.

        Parameters
        ----------
        pieces
            Of that span.

        Returns
        -------
        numpy.ndarray
            uint8, shape (T, bytes), LSB-first. Weights that a task does not code, and padding,
            are 0. Valid until the same thread reads the next span.
        """
        size = self.nbytes(arena, span)
        out = self._scratch.take("masks", size * len(self._decoders))
        rows = out.reshape(len(self._decoders), size)
        for row, decoder, coded in zip(rows, self._decoders, self._coded, strict=True):
            if decoder.planes(arena, span, row):
                _clear_others(row, _kept(pieces, coded))
            else:
                row.fill(0)
        return rows


def _coded(task: TaskDocument, base: BaseDocument) -> _Ranges:
    """The runs of the base's segments that a task has bits for."""
    # Integers may be coded too, but by an exact difference alone.
    masked = {code.arena for code in task.codes if code.planes is not None}
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for parts in task.parts:
        for part in parts:
            if part.kind == CODE and base.layout.places[part.segment].arena in masked:
                found[part.segment].append((part.start, part.start + part.count))
    return {number: sorted(ranges) for number, ranges in found.items()}


def _kept(pieces: Sequence[Piece], coded: _Ranges) -> Iterator[tuple[int, int]]:
    """First and last but one weight of every coded run of a span, in order."""
    for piece in pieces:
        for first, last in coded.get(piece.segment, ()):
            start = max(first, piece.start)
            stop = min(last, piece.start + piece.count)
            if start < stop:
                yield piece.within + start - piece.start, piece.within + stop - piece.start


def _clear_others(plane: Bytes, kept: Iterator[tuple[int, int]]) -> None:
    """Zero all bits but those of the runs `kept`, which start at whole bytes."""
    end = 0
    for start, stop in kept:
        _clear(plane, end, start)
        end = max(end, stop)
    _clear(plane, end, 8 * plane.size)


def _clear(plane: Bytes, low: int, high: int) -> None:
    if low < high:
        if low % 8:
            plane[low // 8] &= (1 << low % 8) - 1
        plane[(low + 7) // 8 : high // 8] = 0
