"""Choosing lambda for a task."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from tallstore.catalog import VectorRecord
from tallstore.codecs import Bytes
from tallstore.codes import TALL_LEVELS
from tallstore.coding import CodeStats
from tallstore.decoding import Decoder
from tallstore.documents import CODE, BaseDocument
from tallstore.dtypes import is_codable, itemsize, torch_dtype
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import OptionError, TallstoreError
from tallstore.objects import assemble, build_tensor
from tallstore.packing.gathering import Candidate
from tallstore.packing.masks import SpanMasks
from tallstore.predicting import predict
from tallstore.scratch import Scratch
from tallstore.sources.source import Source
from tallstore.wording import error_words
from tallstore.workers import Workers

__all__ = [
    "DEFAULT_TALL_LAMBDA",
    "Evaluate",
    "check_lambdas",
    "choose_lambda",
    "read_memory",
    "score_of",
    "state_of",
]

#: Where nobody chooses: the best of 0.2 .. 0.6 on validation data over real fine-tunes, and the
#: middle of the paper's grid. `bench/tall_lambda.py` measures it.
DEFAULT_TALL_LAMBDA: Final = 0.4

#: ``evaluate(task, state_dict) -> score``, higher is better.
Evaluate = Callable[[str, Any], float]


def check_lambdas(value: float | Sequence[float] | None, *, evaluate: bool) -> tuple[float, ...]:
    """The lambdas to try, ascending.

    Raises
    ------
    OptionError
        One is no positive finite number, or there are several and nothing to choose by.
    """
    if value is None:
        return (DEFAULT_TALL_LAMBDA,)
    one = (int, float, np.floating, np.integer)
    given = (value,) if isinstance(value, one) else tuple(value)
    numbers = all(isinstance(g, one) and math.isfinite(g) and g > 0 for g in given)
    if not given or not numbers:
        raise OptionError(f"tall_lambda={value!r}: positive numbers, 0.2 .. 0.6 in the paper")
    if len(given) > 1 and not evaluate:
        raise OptionError(
            f"tall_lambda={value!r}: choosing one of several takes evaluate(task, state_dict)"
        )
    return tuple(sorted({float(g) for g in given}))


def choose_lambda(
    snapshot: Snapshot,
    base: BaseDocument,
    vector: VectorRecord,
    candidate: Candidate,
    lambdas: Sequence[float],
    evaluate: Evaluate,
    *,
    masks: SpanMasks,
    workers: Workers,
) -> tuple[float, float]:
    """The lambda whose reconstruction scores best, ties to the smallest; and its score.

    The paper's way (arXiv 2405.07813, section 4): each lambda's masks are built, the task's
    weights reconstructed just as loading will, and `evaluate` called with the state dict.

    Raises
    ------
    OptionError
        `evaluate` raised, or gave something that is no number.
    """
    best: tuple[float, float] | None = None
    for value in lambdas:
        state = _reconstruct(snapshot, base, vector, candidate, value, masks, workers)
        score = score_of(evaluate, candidate.name, state, f"lambda {value}")
        if best is None or score > best[1]:
            best = (value, score)
    if best is None:
        raise OptionError("no lambda to choose from")
    return best


def score_of(evaluate: Evaluate, task: str, state: Any, what: str) -> float:
    """What `evaluate` gives.

    Parameters
    ----------
    what
        What the weights are, for messages: ``"lambda 0.4"``.

    Raises
    ------
    OptionError
        It raised, or gave something that is no number.
    """
    try:
        score = float(evaluate(task, state))
    except TallstoreError:
        raise
    except Exception as exc:
        raise OptionError(f"evaluate({task!r}, ...) failed at {what}: {error_words(exc)}") from exc
    if math.isnan(score):
        raise OptionError(f"evaluate({task!r}, ...) gave NaN at {what}; give a number")
    return score


def read_memory(source: Source) -> list[Bytes]:
    """The bytes of all segments of a checkpoint."""
    memory = [np.empty(segment.nbytes, np.uint8) for segment in source.segments]
    for segment, flat in enumerate(memory):
        if flat.size:
            source.read(segment, 0, flat)
    return memory


def state_of(source: Source, memory: Sequence[Bytes]) -> Any:
    """The object that a checkpoint holds, over the bytes of its segments."""
    tensors = [
        build_tensor(spec, torch.from_numpy(memory[spec.segment])) for spec in source.tensors
    ]
    return assemble(source.tree, tensors)


def _reconstruct(
    snapshot: Snapshot,
    base: BaseDocument,
    vector: VectorRecord,
    candidate: Candidate,
    tall_lambda: float,
    masks: SpanMasks,
    workers: Workers,
) -> Any:
    """The task as masks of one lambda would give it back, in memory."""
    decoder = Decoder(snapshot, base, vector=vector)
    source = candidate.source
    memory = read_memory(source)
    spans = [
        (arena, span)
        for arena in candidate.arenas()
        if is_codable(base.layout.arenas[arena].dtype)
        for span in range(base.layout.arenas[arena].spans)
    ]

    levels = torch.tensor([TALL_LEVELS], dtype=torch.float32, device="cpu")
    scratch = Scratch()
    stats: dict[int, CodeStats] = defaultdict(CodeStats)
    lock = threading.Lock()

    def rebuild(item: tuple[int, int]) -> None:
        arena, span = item
        place = span * base.layout.arenas[arena].span
        base_bytes, vector_bytes = decoder.base_and_vector(arena, span)
        if vector_bytes is None:
            return
        planes, found, _ = masks(
            candidate, arena, place, base_bytes, vector_bytes, vector.decoded_dtype, tall_lambda
        )
        with lock:
            for segment, sums in found:
                stats[segment].add(sums)
        dtype = candidate.plan.dtypes[arena]
        base_dtype = base.layout.arenas[arena].dtype
        count = base_bytes.size // itemsize(base_dtype)
        predicted = np.empty(count * itemsize(dtype), np.uint8)
        step = torch.from_numpy(vector_bytes).view(torch_dtype(vector.decoded_dtype))
        rows = planes[None]
        predict(base_bytes, base_dtype, rows, step, levels, None, predicted, dtype, scratch)
        _scatter(candidate, arena, place, count, predicted, memory)

    for _ in workers.each(rebuild, spans):
        pass
    for segment, parts in enumerate(candidate.plan.parts):
        for part in parts:
            sums = stats.get(part.segment) if part.kind == CODE else None
            if sums is not None and (sums.same or not sums.finite):
                source.read(segment, 0, memory[segment])  # loads as it is: equal, or not finite
    return state_of(source, memory)


def _scatter(
    candidate: Candidate,
    arena: int,
    place: int,
    count: int,
    predicted: Bytes,
    memory: Sequence[Bytes],
) -> None:
    size = itemsize(candidate.plan.dtypes[arena])
    for held in candidate.held(arena, place, count):
        values = predicted[held.start * size : held.stop * size]
        first = held.first * size
        memory[held.segment][first : first + values.size] = values
