"""Which of a checkpoint's segments can be coded against which of the base's."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tallstore.documents import CODE, OWN, Contents, Part
from tallstore.dtypes import is_codable, itemsize
from tallstore.errors import MismatchError
from tallstore.layout import Layout
from tallstore.specs import SegmentSpec, TensorSpec, contiguous_stride

__all__ = ["OwnSlice", "Plan", "common_prefix", "match", "renamed"]

#: Below this share of matching weights a checkpoint is taken for another architecture's.
_LEAST_MATCH: Final = 0.5
#: A tensor with more or fewer rows shares the common ones under masks if they are this many, and
#: this share of all: an embedding gains a few tokens, but rows of another classifier head are
#: other classes, which no mask can hold.
_LEAST_ROWS: Final = 256
_LEAST_SHARE: Final = 0.9


#: Why tensors do not match.
_ABSENT: Final = "names are absent from the base"
_SHAPES: Final = "shapes clash"
_KINDS: Final = "dtypes or layouts clash"


@dataclass(frozen=True, slots=True)
class OwnSlice:
    """Elements of a task's segment that are stored as they are."""

    segment: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a checkpoint is put together from the base's segments and its own."""

    parts: tuple[tuple[Part, ...], ...]
    own: tuple[OwnSlice, ...]
    dtypes: Mapping[int, str]
    """The checkpoint's dtype over each arena of the base that it is coded against."""
    notes: tuple[str, ...]

    @property
    def coded(self) -> int:
        """Weights in parts that are coded."""
        return sum(p.count for parts in self.parts for p in parts if p.kind == CODE)


def _is_whole(tensor: TensorSpec, segment: SegmentSpec) -> bool:
    """Whether a tensor is all of its segment, row by row."""
    return (
        tensor.dtype == segment.dtype
        and tensor.offset == 0
        and tensor.stride == contiguous_stride(tensor.shape)
        and tensor.numel == segment.numel
    )


def common_prefix(names: Sequence[str], base: Collection[str]) -> tuple[str, str]:
    """(prefix to take off, prefix to put on) that makes most of `names` names of the base."""
    plain = sum(name in base for name in names)
    found: Counter[tuple[str, str]] = Counter()
    tails: dict[str, list[str]] = defaultdict(list)
    for name in base:
        tails[name.rpartition(".")[2]].append(name)
    for name in names:
        for other in tails.get(name.rpartition(".")[2], ()):
            if name.endswith("." + other):
                found[name[: -len(other)], ""] += 1
            elif other.endswith("." + name):
                found["", other[: -len(name)]] += 1
    best, count = max(found.items(), key=lambda item: item[1], default=(("", ""), 0))
    return best if count > plain else ("", "")


def renamed(name: str, prefix: tuple[str, str]) -> str:
    """`name` as the base has it, by what `common_prefix` gave."""
    off, on = prefix
    return on + name[len(off) :] if name.startswith(off) else name


def _pair(
    views: Sequence[TensorSpec],
    segment: SegmentSpec,
    base: Contents,
    named: Mapping[str, TensorSpec],
    prefix: tuple[str, str],
    floats_only: bool,
) -> tuple[int, int] | None:
    """(base segment, elements in common from its start), or None."""
    for tensor in views:
        other = named.get(renamed(tensor.name, prefix))
        if other is None:
            continue
        whole = base.segments[other.segment]
        floats = is_codable(tensor.dtype) and is_codable(other.dtype)
        if tensor.dtype != other.dtype and not floats:
            continue
        if segment.numel == whole.numel and tensor.geometry[1:] == other.geometry[1:]:
            return other.segment, segment.numel
        rows = tensor.shape[1:] == other.shape[1:] and len(tensor.shape) > 1
        if rows and floats_only:
            fewer, more = sorted((tensor.shape[0], other.shape[0]))
            rows = fewer >= _LEAST_ROWS and fewer >= _LEAST_SHARE * more
        if rows and floats and _is_whole(tensor, segment) and _is_whole(other, whole):
            return other.segment, min(segment.numel, whole.numel)
    return None


def match(
    label: str,
    tensors: Sequence[TensorSpec],
    segments: Sequence[SegmentSpec],
    *,
    base: Contents,
    layout: Layout,
    floats_only: bool,
    strict: bool,
) -> Plan:
    """Match a checkpoint's segments with the base's, by the names and shapes of their tensors.

    Parameters
    ----------
    label
        The checkpoint, for messages.
    tensors, segments
        Of the checkpoint.
    base, layout
        The base's contents and their layout.
    floats_only
        Code only float32, bfloat16 and float16 (masks); else every dtype of up to 8 bytes
        (exact differences).
    strict
        Refuse a checkpoint of which less than half matches.

    Raises
    ------
    MismatchError
        `strict`, and most of the checkpoint is not in the base under the same names and shapes.
    """
    named = {tensor.name: tensor for tensor in base.tensors}
    prefix = common_prefix([tensor.name for tensor in tensors], named)
    notes = []
    if prefix != ("", ""):
        notes.append(f"{label}: names match the base's with {prefix[0] or prefix[1]!r} set aside")
    views: dict[int, list[TensorSpec]] = defaultdict(list)
    for tensor in tensors:
        views[tensor.segment].append(tensor)
    pairs: dict[int, tuple[int, int]] = {}
    taken: set[int] = set()
    for number, segment in enumerate(segments):
        codable = is_codable(segment.dtype) if floats_only else itemsize(segment.dtype) <= 8
        pair = _pair(views[number], segment, base, named, prefix, floats_only)
        # What is empty is the task's own: an arena of nothing has no streams to refer to.
        # Integers under masks: still compared with the base, since most never change.
        # A task that unties what the base ties has two segments for one: codes hold the first.
        if pair and pair[1] and pair[0] not in taken and (codable or pair[1] == segment.numel):
            pairs[number] = pair
            taken.add(pair[0])
    dtypes = _arena_dtypes(segments, pairs, layout)
    pairs = {
        n: p for n, p in pairs.items() if dtypes[layout.places[p[0]].arena] == segments[n].dtype
    }
    total = sum(s.numel for s in segments)
    matched = sum(count for _, count in pairs.values())
    if strict and matched < _LEAST_MATCH * total:
        raise MismatchError(_mismatch(label, tensors, named, prefix, matched, total))
    return _plan(segments, pairs, dtypes, notes)


def _arena_dtypes(
    segments: Sequence[SegmentSpec], pairs: Mapping[int, tuple[int, int]], layout: Layout
) -> dict[int, str]:
    weights: dict[int, Counter[str]] = defaultdict(Counter)
    for number, (other, count) in pairs.items():
        weights[layout.places[other].arena][segments[number].dtype] += count
    return {arena: counts.most_common(1)[0][0] for arena, counts in weights.items()}


def _plan(
    segments: Sequence[SegmentSpec],
    pairs: Mapping[int, tuple[int, int]],
    dtypes: Mapping[int, str],
    notes: Sequence[str],
) -> Plan:
    parts: list[tuple[Part, ...]] = []
    own: list[OwnSlice] = []
    for number, segment in enumerate(segments):
        pieces = []
        done = 0
        if number in pairs:
            other, done = pairs[number]
            pieces.append(Part(CODE, other, 0, done))
        if done < segment.numel:
            pieces.append(Part(OWN, len(own), 0, segment.numel - done))
            own.append(OwnSlice(number, done, segment.numel - done))
        parts.append(tuple(pieces))
    return Plan(tuple(parts), tuple(own), dict(dtypes), tuple(notes))


def _mismatch(
    label: str,
    tensors: Sequence[TensorSpec],
    named: Mapping[str, TensorSpec],
    prefix: tuple[str, str],
    matched: int,
    total: int,
) -> str:
    found: dict[str, list[str]] = {_ABSENT: [], _SHAPES: [], _KINDS: []}
    weights: Counter[str] = Counter()
    for tensor in tensors:
        other = named.get(renamed(tensor.name, prefix))
        if other is None:
            why, shown = _ABSENT, repr(tensor.name)
        elif other.shape != tensor.shape:
            why, shown = (
                _SHAPES,
                f"{tensor.name!r} {list(tensor.shape)} against {list(other.shape)}",
            )
        elif other.geometry != tensor.geometry:
            why, shown = _KINDS, f"{tensor.name!r} {_kind(tensor)} against {_kind(other)}"
        else:
            continue
        found[why].append(shown)
        weights[why] += tensor.numel
    # What holds off most: of a checkpoint in other words, a head of other classes says little.
    why = max(found, key=lambda each: weights[each])
    cure = (
        "Give both as float32, bfloat16 or float16, laid out alike"
        if why == _KINDS
        else "Is it a fine-tune of this base? Give the base it was trained from"
    )
    return (
        f"{label}: only {matched:,} of {total:,} weights match the base; {why}: "
        f"{', '.join(found[why][:3])}. {cure}"
    )


def _kind(tensor: TensorSpec) -> str:
    return f"{tensor.dtype} of strides {list(tensor.stride)}"
