"""Bits on disk of each tensor of a task, as near as chunks that several share can tell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

from tallstore.codes import SEEDED, SPARSE, ArenaCode, SegmentCode
from tallstore.describing import Description
from tallstore.documents import CODE, OWN, TaskDocument
from tallstore.specs import TensorSpec

__all__ = ["tensor_bits"]


def tensor_bits(described: Description, stored: Callable[[int], int]) -> dict[str, float]:
    """Bits a weight that each tensor of a task takes, by name; 0 for what is the base's.

    A stream's bytes are given to the tensors in it by the entropy of their codes (by their weights,
    of the exact tier), for a chunk holds several of them.

    Parameters
    ----------
    stored
        Bytes that a stream takes.
    """
    task = described.task
    if task is None:
        return {}
    claims: dict[int, dict[int, float]] = defaultdict(dict)
    for segment, parts in enumerate(task.parts):
        for part in parts:
            if part.kind == OWN:
                arena = task.own_layout.places[part.segment].arena
                stream = task.own_streams[arena]
                claims[stream][segment] = claims[stream].get(segment, 0.0) + part.count
            elif part.kind == CODE:
                arena = described.base.layout.places[part.segment].arena
                code = next(code for code in task.codes if code.arena == arena)
                for stream, share in _claims(task, code, part.segment, part.count):
                    claims[stream][segment] = claims[stream].get(segment, 0.0) + share
    found: dict[int, float] = defaultdict(float)
    for stream, shares in claims.items():
        whole = sum(shares.values())
        for segment, share in shares.items():
            found[segment] += 8 * stored(stream) * (share / whole if whole else 1 / len(shares))
    return {
        tensor.name: found[tensor.segment] / max(_weights(task, tensor), 1)
        for tensor in task.contents.tensors
    }


def _weights(task: TaskDocument, tensor: TensorSpec) -> int:
    return task.contents.segments[tensor.segment].numel


def _claims(
    task: TaskDocument, code: ArenaCode, segment: int, count: int
) -> list[tuple[int, float]]:
    """(stream, entropy of the segment's codes in it)."""
    density = _densities(task).get(segment, 0.5)
    found: list[tuple[int, float]] = []
    coding = None if task.codings is None else task.codings.get(segment)
    if task.codings is None or coding is not None:
        stream, share = _claim(code, coding, density, count)
        if stream is not None:
            found.append((stream, share))
    if code.exact is not None:
        found.append((code.exact, float(count)))
    return found


def _claim(
    code: ArenaCode, coding: SegmentCode | None, density: float, count: int
) -> tuple[int | None, float]:
    if coding is not None and coding.form == SPARSE:
        return code.sparse, count * (_entropy(density) + density)
    if coding is not None and coding.form == SEEDED:
        return code.seeded, count / coding.stride * coding.bits
    if coding is None or coding.bits == 1:
        # One plane: a mask, or signs that do not compress.
        return code.planes, count * (_entropy(density) if 0 < density < 1 else 1.0)
    return code.planes, float(count * coding.bits)


def _densities(task: TaskDocument) -> Mapping[int, float]:
    return {stats.segment: stats.density for stats in task.stats}


def _entropy(share: float) -> float:
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)
