"""What a base and a task are made of, as strict JSON in a stream of their own.

The manifest stays small, so that listing a store is instant; the names, shapes and parts of every
tensor are in these documents, read when something is loaded. FORMAT.md gives every field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tallstore import strictjson
from tallstore.codes import (
    PLANES,
    SEEDED,
    SPARSE,
    ArenaCode,
    SegmentCode,
    SegmentStats,
    code_from_json,
    code_to_json,
    levels_to_json,
    segment_code_from_json,
    stats_from_json,
    stats_to_json,
)
from tallstore.dtypes import itemsize
from tallstore.errors import CorruptStoreError, UnsupportedObjectError
from tallstore.layout import Layout, lay_out
from tallstore.specs import JSON, SegmentSpec, TensorSpec, contiguous_stride

__all__ = [
    "BASE",
    "CODE",
    "MAX_DOCUMENT",
    "OWN",
    "ArenaCode",
    "BaseDocument",
    "Contents",
    "ExternalReference",
    "Part",
    "SegmentCode",
    "SegmentStats",
    "StoredFile",
    "TaskDocument",
]

#: A document above this size is refused.
MAX_DOCUMENT: Final = 1 << 28

#: The kinds of `Part`: the base's elements as they are; coded against them; the task's own.
BASE: Final = "b"
CODE: Final = "c"
OWN: Final = "o"

_MAX_COUNT: Final = 1 << 60
_CONJ, _NEG, _PARAMETER, _REQUIRES_GRAD = 1, 2, 4, 8
_FLAGS: Final = _CONJ | _NEG | _PARAMETER | _REQUIRES_GRAD
#: The fields of documents.
_CONTENTS: Final = ("kind", "tree", "tensors", "segments", "files")
_BASE: Final = (*_CONTENTS, "streams")
_TASK: Final = (*_CONTENTS, "parts", "own", "own_streams", "codes", "stats")
#: Those of a task whose codes need more than format version 1.
_CODED: Final = (*_TASK, "codings", "seed")
_MAX_SEED: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint: `nbytes` bytes at `offset` of a stream."""

    path: str
    nbytes: int
    stream: int
    offset: int


def _ints(record: object, count: int | None, what: str) -> list[int]:
    if (
        not isinstance(record, list)
        or (count is not None and len(record) != count)
        or not all(type(item) is int and 0 <= item < _MAX_COUNT for item in record)
    ):
        raise CorruptStoreError(f"{what}: {str(record)[:80]} where numbers are expected")
    return record


def _size(dtype: object, what: str) -> str:
    if type(dtype) is not str:
        raise CorruptStoreError(f"{what}: {str(dtype)[:80]} where a dtype is expected")
    try:
        itemsize(dtype)
    except UnsupportedObjectError as exc:
        known = ["those of torch"]
        raise strictjson.newer(what, f"a dtype {dtype[:80]!r}", known) from exc
    return dtype


def _items(record: object, count: int, what: str) -> list[Any]:
    if not isinstance(record, list) or len(record) < count:
        raise CorruptStoreError(f"{what}: {str(record)[:80]} where {count} items are expected")
    if len(record) > count:
        found = f"{str(record)[:80]}, a record of {len(record)} items"
        raise strictjson.newer(what, found, [f"records of {count} there"])
    return record


def _tensor_to_json(tensor: TensorSpec) -> list[Any]:
    flags = (
        _CONJ * tensor.conj
        | _NEG * tensor.neg
        | _PARAMETER * tensor.parameter
        | _REQUIRES_GRAD * tensor.requires_grad
    )
    plain = tensor.stride == contiguous_stride(tensor.shape)
    stride = 0 if plain else list(tensor.stride)
    shape = list(tensor.shape)
    return [tensor.name, tensor.segment, tensor.dtype, shape, stride, tensor.offset, flags]


def _countable(sizes: Sequence[int]) -> bool:
    """Whether a tensor of these sizes has fewer than 2**63 elements, counted as torch does."""
    count = 1
    for size in sizes:
        count *= max(size, 1)
        if count >= 1 << 63:
            return False
    return True


def _tensor_from_json(record: object, segments: int, what: str) -> TensorSpec:
    name, segment, dtype, shape, stride, offset, flags = _items(record, 7, what)
    if type(name) is not str:
        raise CorruptStoreError(f"{what}: a tensor's name is no text")
    numbers = _ints([segment, offset, flags], 3, what)
    sizes = tuple(_ints(shape, None, what))
    if numbers[2] > _FLAGS:
        raise strictjson.newer(f"{what}: tensor {name[:80]!r}", f"flags {flags}", ["1, 2, 4, 8"])
    # Also before strides are made of the sizes: thousands of them would multiply to numbers that
    # take gigabytes to write down.
    if numbers[0] >= segments or not _countable(sizes):
        raise CorruptStoreError(f"{what}: tensor {name!r} is malformed")
    return TensorSpec(
        name=name,
        segment=segment,
        dtype=_size(dtype, what),
        shape=sizes,
        stride=contiguous_stride(sizes) if stride == 0 else tuple(_ints(stride, None, what)),
        offset=offset,
        conj=bool(flags & _CONJ),
        neg=bool(flags & _NEG),
        parameter=bool(flags & _PARAMETER),
        requires_grad=bool(flags & _REQUIRES_GRAD),
    )


def _segments_from_json(record: object, what: str) -> tuple[SegmentSpec, ...]:
    if not isinstance(record, list):
        raise CorruptStoreError(f"{what}: no list of segments")
    found = []
    for item in record:
        dtype, numel = _items(item, 2, what)
        found.append(SegmentSpec(_size(dtype, what), _ints([numel], 1, what)[0]))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The structure of a checkpoint: a nest, its tensors, the segments they view, its files."""

    kind: str
    tree: JSON
    tensors: tuple[TensorSpec, ...]
    segments: tuple[SegmentSpec, ...]
    files: tuple[StoredFile, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all segments and files: what the original holds."""
        return sum(s.nbytes for s in self.segments) + sum(f.nbytes for f in self.files)

    def flat(self) -> dict[str, int] | None:
        """Tensor numbers by key, where the object is one dict of tensors; None where it is not."""
        tree = self.tree.get("$odict", self.tree) if isinstance(self.tree, dict) else None
        if not isinstance(tree, dict):
            return None
        found: dict[str, int] = {}
        for key, leaf in tree.items():
            number = leaf.get("$tensor") if isinstance(leaf, dict) and len(leaf) == 1 else None
            if type(number) is not int or not 0 <= number < len(self.tensors):
                return None
            found[key] = number
        return found

    def names(self) -> dict[str, int]:
        """Tensor numbers by name; in a dict of tensors, one tensor under two keys has both."""
        own = {tensor.name: number for number, tensor in enumerate(self.tensors)}
        return own | (self.flat() or {})

    def to_json(self) -> dict[str, Any]:
        """As it stands in a document."""
        return {
            "kind": self.kind,
            "tree": self.tree,
            "tensors": [_tensor_to_json(tensor) for tensor in self.tensors],
            "segments": [[segment.dtype, segment.numel] for segment in self.segments],
            "files": [[f.path, f.nbytes, f.stream, f.offset] for f in self.files],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, what: str) -> Contents:
        """Read what `to_json` wrote; refuses anything else."""
        segments = _segments_from_json(record.get("segments"), what)
        tensors = tuple(
            _tensor_from_json(item, len(segments), what)
            for item in strictjson.list_field(record, "tensors", list, what=what)
        )
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise CorruptStoreError(f"{what}: a tensor's name is given twice")
        files = []
        for item in strictjson.list_field(record, "files", list, what=what):
            path, *numbers = _items(item, 4, what)
            if type(path) is not str:
                raise CorruptStoreError(f"{what}: a file's path is no text")
            files.append(StoredFile(path, *_ints(numbers, 3, what)))
        return cls(
            kind=strictjson.field(record, "kind", str, what=what),
            tree=record.get("tree"),
            tensors=tensors,
            segments=segments,
            files=tuple(files),
        )


def _parse(data: bytes, known: Sequence[str], what: str) -> dict[str, Any]:
    record = strictjson.loads(data, what=what, max_bytes=MAX_DOCUMENT)
    found = strictjson.fields(record, what=what)
    strictjson.only(found, known, what=what)
    return found


def _streams(record: object, layout: Layout, what: str) -> tuple[int, ...]:
    return tuple(_ints(record, len(layout.arenas), what))


@dataclass(frozen=True, slots=True)
class ExternalReference:
    """Where the elements of a base are that is in another store."""

    path: str
    """As recorded: absolute, or from the directory of the store that refers to it."""
    identity: str
    """Of the base that is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDocument:
    """The base: its contents, and a stream for each arena of their layout."""

    contents: Contents
    streams: tuple[int, ...]
    """All 0 where `external` says where the elements are."""
    external: ExternalReference | None = None
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", lay_out(self.contents.segments))

    def to_bytes(self) -> bytes:
        """The document."""
        return strictjson.dumps({**self.contents.to_json(), "streams": list(self.streams)})

    @classmethod
    def from_bytes(
        cls, data: bytes, *, external: ExternalReference | None = None, what: str
    ) -> BaseDocument:
        """Read a document.

        Parameters
        ----------
        external
            Where its elements are, if not in the same store.

        Raises
        ------
        CorruptStoreError, NewerFormatError
            It is malformed, or holds what this version does not know.
        """
        record = _parse(data, _BASE, what)
        contents = Contents.from_json(record, what=what)
        streams = _streams(record.get("streams"), lay_out(contents.segments), what)
        if external is not None and any(streams):
            raise CorruptStoreError(f"{what}: streams of elements that are in another store")
        return cls(contents=contents, streams=streams, external=external)


@dataclass(frozen=True, slots=True)
class Part:
    """`count` elements of a task's segment.

    For `BASE` and `CODE` they stand at `start` of the base's segment number `segment`; for `OWN`
    they are the whole of the task's own segment number `segment`.
    """

    kind: str
    segment: int
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDocument:
    """A task: its contents, and for each segment the parts it is put together from."""

    contents: Contents
    parts: tuple[tuple[Part, ...], ...]
    own: tuple[SegmentSpec, ...] = ()
    """The task's own segments: what cannot be coded."""
    own_streams: tuple[int, ...] = ()
    codes: tuple[ArenaCode, ...] = ()
    stats: tuple[SegmentStats, ...] = ()
    codings: Mapping[int, SegmentCode] | None = None
    """By segment of the base, how what is coded is coded; None: TALL masks, or nothing, in the
    words of format version 1."""
    seed: int = 0
    """Of the hash that places seeded values."""
    own_layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "own_layout", lay_out(self.own))

    def to_bytes(self) -> bytes:
        """The document."""
        plain = self.codings is None
        codings = {
            "codings": [
                [c.segment, c.form, levels_to_json(c.levels), c.stride]
                for c in (self.codings or {}).values()
            ],
            "seed": self.seed,
        }
        return strictjson.dumps(
            {
                **self.contents.to_json(),
                "parts": [
                    [[p.kind, p.segment, p.start, p.count] for p in parts] for parts in self.parts
                ],
                "own": [[segment.dtype, segment.numel] for segment in self.own],
                "own_streams": list(self.own_streams),
                "codes": [code_to_json(code, plain=plain) for code in self.codes],
                "stats": stats_to_json(self.stats, plain=plain),
                **({} if plain else codings),
            }
        )

    @classmethod
    def from_bytes(
        cls, data: bytes, *, base: BaseDocument, plain: bool = True, what: str
    ) -> TaskDocument:
        """Read a document and check it against its base's.

        Parameters
        ----------
        plain
            Whether it is in the words of format version 1; the task's record tells.

        Raises
        ------
        CorruptStoreError
            It is malformed, or does not fit the base.
        NewerFormatError
            It holds what this version does not know.
        """
        record = _parse(data, _TASK if plain else _CODED, what)
        contents = Contents.from_json(record, what=what)
        own = _segments_from_json(record.get("own"), what)
        codes = tuple(
            _code_from_json(item, base.layout, plain, what)
            for item in strictjson.list_field(record, "codes", list, what=what)
        )
        parts = tuple(
            tuple(_part_from_json(part, what) for part in item)
            for item in strictjson.list_field(record, "parts", list, what=what)
        )
        document = cls(
            contents=contents,
            parts=parts,
            own=own,
            own_streams=_streams(record.get("own_streams"), lay_out(own), what),
            codes=codes,
            stats=tuple(
                stats_from_json(_items(item, 4 if plain else 5, what), what)
                for item in strictjson.list_field(record, "stats", list, what=what)
            ),
            codings=None if plain else _codings(record, base, what),
            seed=0 if plain else _ints([record.get("seed")], 1, what)[0],
        )
        if document.seed >= _MAX_SEED:
            raise CorruptStoreError(f"{what}: a seed of over 32 bits")
        _check_parts(document, base, what)
        return document


def _code_from_json(record: object, layout: Layout, plain: bool, what: str) -> ArenaCode:
    items = _items(record, 4 if plain else 9, what)
    if _ints(items[:1], 1, what)[0] >= len(layout.arenas):
        raise CorruptStoreError(f"{what}: a code for arena {items[0]}, which the base lacks")
    _size(items[1], what)
    return code_from_json(items, plain=plain, what=what)


def _codings(record: Mapping[str, Any], base: BaseDocument, what: str) -> dict[int, SegmentCode]:
    segments = len(base.contents.segments)
    found: dict[int, SegmentCode] = {}
    for item in strictjson.list_field(record, "codings", list, what=what):
        code = segment_code_from_json(_items(item, 4, what), segments, what)
        if code.segment in found:
            raise CorruptStoreError(f"{what}: segment {code.segment} is coded twice")
        found[code.segment] = code
    return found


def _part_from_json(record: object, what: str) -> Part:
    kind, *numbers = _items(record, 4, what)
    if type(kind) is not str:
        raise CorruptStoreError(f"{what}: a part whose kind is no text")
    if kind not in (BASE, CODE, OWN):
        raise strictjson.newer(what, f"a part of kind {kind[:80]!r}", (BASE, CODE, OWN))
    return Part(kind, *_ints(numbers, 3, what))


def _check_parts(document: TaskDocument, base: BaseDocument, what: str) -> None:
    segments, codes = document.contents.segments, {code.arena: code for code in document.codes}
    if len(document.parts) != len(segments):
        raise CorruptStoreError(f"{what}: {len(document.parts)} parts, {len(segments)} segments")
    for segment, parts in zip(segments, document.parts, strict=True):
        if sum(part.count for part in parts) != segment.numel:
            raise CorruptStoreError(f"{what}: parts that do not make up their segment")
        for part in parts:
            if not _part_fits(part, segment, document.own, base, codes):
                raise CorruptStoreError(f"{what}: a part leads outside what it refers to")
            if part.kind == CODE and not _form_fits(part, document, base, codes):
                raise CorruptStoreError(f"{what}: a part without the stream that its code takes")


def _part_fits(
    part: Part,
    segment: SegmentSpec,
    own: Sequence[SegmentSpec],
    base: BaseDocument,
    codes: Mapping[int, ArenaCode],
) -> bool:
    whole = own if part.kind == OWN else base.contents.segments
    if part.segment >= len(whole) or part.start + part.count > whole[part.segment].numel:
        return False
    if part.kind == CODE:
        if part.start % 8:
            return False  # planes are cut at whole bytes
        code = codes.get(base.layout.places[part.segment].arena)
        return code is not None and code.dtype == segment.dtype
    return whole[part.segment].dtype == segment.dtype


def _form_fits(
    part: Part, document: TaskDocument, base: BaseDocument, codes: Mapping[int, ArenaCode]
) -> bool:
    """Whether what codes a part is there: its stream, in planes as many as it has bits."""
    if document.codings is None:
        return True
    code = codes[base.layout.places[part.segment].arena]
    coding = document.codings.get(part.segment)
    if coding is None:
        # Predicted by the base, and made good by the exact tier.
        return code.exact is not None and code.over_base
    if coding.form != PLANES and code.shared:
        return False  # the arena's vector would be multiplied into it
    if coding.form == SPARSE:
        return code.sparse is not None
    if coding.form == SEEDED:
        return code.seeded is not None and coding.bits <= code.value_bits
    return code.planes is not None and coding.bits <= code.bits
