"""Whether another code would have been both smaller and closer than the masks just made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Final

import numpy as np

from tallstore.catalog import TaskRecord
from tallstore.codecs import Bytes
from tallstore.dtypes import is_codable
from tallstore.fitting import DEFAULT_GAIN, Magnitudes
from tallstore.layout import Layout
from tallstore.packing.choices import Choice, dense_choice, sparse_choice
from tallstore.packing.drafting import dense_draft, moving, sparse_draft
from tallstore.packing.gathering import Candidate
from tallstore.packing.surveying import span_moves

__all__ = ["suggest"]

#: What is looked at of each task: so many spans, evenly.
_SPANS: Final = 4
#: By how much a code has to be better, in bits and in error.
_LESS: Final = 0.95
_CODES: Final = (
    ("levels", 3), ("levels", 2), ("levels", 1),
    ("signs", 0.3), ("signs", 0.2), ("signs", 0.1), ("signs", 0.05),
)  # fmt: skip


def suggest(
    candidates: Sequence[Candidate],
    records: Mapping[str, TaskRecord],
    read: Callable[[int, int], Bytes],
    *,
    mask_bits: float,
) -> str | None:
    """A remark that names the closest code which is smaller than masks, and closer; or None.

    Parameters
    ----------
    records
        Of the tasks, as masks.
    read
        Gives the base's bytes of a span of an arena.
    mask_bits
        What masks and shared vector take, bits a coded weight and task.
    """
    errors = [r.relative_error for r in records.values() if r.relative_error is not None]
    if not errors:
        return None
    mask_error = fmean(errors)
    surveys = [_sample(candidate, read) for candidate in candidates]
    best: tuple[float, float, str] | None = None
    for code, number in _CODES:
        found = [_figures(seen, code, number) for seen in surveys]
        there = [figures for figures in found if figures is not None]
        if not there:
            continue
        bits, error = fmean(b for b, _ in there), fmean(e for _, e in there)
        better = bits < _LESS * mask_bits and error < _LESS * mask_error
        if better and (best is None or error < best[0]):
            flag = f"--bits {number}" if code == "levels" else f"--density {number:.0%}"
            best = error, bits, f"--code {code} {flag}"
    if best is None:
        return None
    error, bits, flags = best
    return (
        f"{flags} would be smaller and closer here: about {bits:.2f} bits a weight and task with a "
        f"relative error of {error:.2f}; masks take {mask_bits:.2f}, the shared vector included, "
        f"and err by {mask_error:.2f}"
    )


def _spans(layout: Layout, candidate: Candidate) -> Iterator[tuple[int, int]]:
    every = [
        (arena, span)
        for arena in candidate.arenas()
        if is_codable(layout.arenas[arena].dtype)
        for span in range(layout.arenas[arena].spans)
    ]
    yield from every[:: max(1, len(every) // _SPANS)][:_SPANS]


def _sample(candidate: Candidate, read: Callable[[int, int], Bytes]) -> dict[int, Magnitudes]:
    found: dict[int, Magnitudes] = {}
    for arena, span in _spans(candidate.layout, candidate):
        seen = span_moves(candidate, arena, span, lambda *at: (read(*at), None))
        for held, same in zip(seen.held, seen.same, strict=True):
            part = found.setdefault(held.base_segment, Magnitudes(0))
            part.weights += held.stop - held.start
            part.same &= same
            part.add(np.ascontiguousarray(seen.moves[held.start : held.stop]))
    return moving(found)


def _figures(
    found: Mapping[int, Magnitudes], code: str, number: float
) -> tuple[float, float] | None:
    """Bits a weight and relative error that a code would come to."""
    chosen: list[Choice] = []
    for segment, seen in found.items():
        if code == "levels":
            draft = dense_draft(segment, seen, int(number))
            choice = None if draft is None else dense_choice(draft, seen, DEFAULT_GAIN)
        else:
            choice = sparse_choice(sparse_draft(segment, seen, number), seen, DEFAULT_GAIN)
        if choice is not None:
            chosen.append(choice)
    weights = sum(seen.weights for seen in found.values())
    moved = sum(found[choice.draft.segment].moved for choice in chosen)
    if not weights or not moved:
        return None
    error = sum(choice.error for choice in chosen)
    return sum(choice.bits for choice in chosen) / weights, float(np.sqrt(error / moved))
