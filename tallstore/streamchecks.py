"""Every stream over an arena must be as long as the arena: decoding counts on it."""

from __future__ import annotations

from collections.abc import Sequence

from tallstore.catalog import QUANTIZED, VectorRecord
from tallstore.codecs.quantized import FORMS, Form, quantized_size
from tallstore.codes import seeded_capacity
from tallstore.documents import BaseDocument, TaskDocument
from tallstore.dtypes import itemsize
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError
from tallstore.layout import Arena

__all__ = ["check_streams"]


def check_streams(
    snapshot: Snapshot,
    base: BaseDocument,
    task: TaskDocument | None,
    vector: VectorRecord | None,
    *,
    home: Snapshot,
    elements: Sequence[int],
) -> None:
    """Refuse streams of other lengths than what is read of them.

    Parameters
    ----------
    home, elements
        Where the elements of the base are.

    Raises
    ------
    CorruptStoreError
    """
    for arena, stream in zip(base.layout.arenas, elements, strict=True):
        _check(home, stream, arena, 8 * itemsize(arena.dtype))
    if vector is not None:
        for arena, stream in zip(base.layout.arenas, vector.streams, strict=False):
            if vector.dtype in QUANTIZED:
                _check_quantized(snapshot, stream, arena, FORMS[vector.dtype])
            else:
                _check(snapshot, stream, arena, 8 * itemsize(vector.dtype))
    if task is None:
        return
    for arena, stream in zip(task.own_layout.arenas, task.own_streams, strict=True):
        _check(snapshot, stream, arena, 8 * itemsize(arena.dtype))
    for code in task.codes:
        arena = base.layout.arenas[code.arena]
        _check(snapshot, code.planes, arena, code.bits)
        _check(snapshot, code.sparse, arena, 2)
        _check(snapshot, code.exact, arena, 8 * itemsize(code.dtype))
        if code.seeded is not None:
            capacity = seeded_capacity(base.layout, task.codings or {}, code.arena)
            size = code.value_bits * capacity // 8
            _length(snapshot, code.seeded, size, size * arena.spans)


def _check(snapshot: Snapshot, number: int | None, arena: Arena, bits: int) -> None:
    if number:
        _length(snapshot, number, arena.span * bits // 8, arena.weights * bits // 8)


def _check_quantized(snapshot: Snapshot, number: int, arena: Arena, form: Form) -> None:
    if number:
        size = quantized_size(arena.span, form)
        rest = arena.weights % arena.span
        whole = arena.weights // arena.span * size
        _length(snapshot, number, size, whole + (quantized_size(rest, form) if rest else 0))


def _length(snapshot: Snapshot, number: int, size: int, length: int) -> None:
    stream = snapshot.stream(number)
    if (stream.chunk_size, stream.raw) != (size, length):
        raise CorruptStoreError(
            f"{snapshot.path}: stream {number} has {stream.raw} bytes in chunks of "
            f"{stream.chunk_size}, its arena takes {length} in chunks of {size}"
        )
