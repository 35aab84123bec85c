"""The manifest's body: what the store's streams mean, small enough to list at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from tallstore import strictjson
from tallstore.codes import MAX_BITS
from tallstore.dtypes import CODABLE
from tallstore.errors import CorruptStoreError, TaskNameError

__all__ = [
    "CODES",
    "EXTERNAL_BASE",
    "QUANTIZED",
    "QUANTIZED_VECTOR",
    "BaseRecord",
    "Catalog",
    "TaskRecord",
    "VectorRecord",
    "check_task_name",
    "now",
]

#: What a store needs of its readers whose base is in another store.
EXTERNAL_BASE: Final = "external-base"
#: What it needs for tasks coded otherwise than in version 1, and for a vector of 8 or 4 bits.
CODES: Final = "codes"
QUANTIZED_VECTOR: Final = "quantized-vector"
#: Everything that a store can need and that this version knows.
_FEATURES: Final = (EXTERNAL_BASE, CODES, QUANTIZED_VECTOR)
_PLAIN: Final = ("tall", "none")
_CODES: Final = (*_PLAIN, "signs", "seeded", "levels", "auto")
#: How a shared vector can be kept beside the codable dtypes: integers and a scale a block.
QUANTIZED: Final = ("int8", "int4", "uint8", "uint4")
_MAX_NAME: Final = 255


def now() -> str:
    """The time, as records keep it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_task_name(name: object) -> str:
    """`name`, if it can be a task's.

    Raises
    ------
    TaskNameError
        Not text, empty, too long, or a path: a task's name becomes a directory on `unpack`.
    """
    if not isinstance(name, str) or not name:
        raise TaskNameError(f"{name!r}: a task's name is non-empty text")
    if len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME:
        raise TaskNameError(f"{name[:40]!r}...: a task's name has at most {_MAX_NAME} bytes")
    if name in (".", "..") or any(c in name for c in "/\\") or not name.isprintable():
        raise TaskNameError(
            f"{name!r}: a task's name is one plain word, no path and no control characters"
        )
    if name != name.strip() or name.startswith("-") or "=" in name or "::" in name:
        raise TaskNameError(
            f"{name!r}: a task's name has no blanks around it, no '=' and no '::', "
            "and does not begin with '-'"
        )
    return name


def _read(cls: type[Any], record: Mapping[str, Any], what: str) -> Any:
    """A flat dataclass from its JSON."""
    strictjson.only(record, (entry.name for entry in dataclasses.fields(cls)), what=what)
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(cls):
        kind = {"str": str, "int": int, "float": float, "bool": bool}.get(str(entry.type))
        if kind is not None:
            values[entry.name] = strictjson.field(record, entry.name, kind, what=what)
        elif str(entry.type).startswith("tuple[int"):
            values[entry.name] = tuple(strictjson.list_field(record, entry.name, int, what=what))
        elif str(entry.type).startswith("tuple[str"):
            values[entry.name] = tuple(strictjson.list_field(record, entry.name, str, what=what))
        elif str(entry.type) == "float | None":
            values[entry.name] = strictjson.optional(record, entry.name, float, what=what)
        elif str(entry.type) == "str | None":
            values[entry.name] = strictjson.optional(record, entry.name, str, what=what)
        else:
            values[entry.name] = strictjson.str_keys(record, entry.name, what=what)
    return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """The base in a few words."""

    document: int
    """Stream of its `BaseDocument`."""
    streams: tuple[int, ...]
    """All its streams."""
    identity: str
    """Content hash, hexadecimal."""
    label: str
    kind: str
    tensors: int
    weights: int
    """Elements of all tensors' segments."""
    nbytes: int
    """Bytes of the original's tensors and files."""
    created: str
    """ISO 8601, UTC."""
    external: str | None = None
    """Path of the store that has the base's elements, absolute or from this store's directory;
    None where this one has them."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest; stores with a base of their own know no `external`."""
        record = dataclasses.asdict(self)
        if self.external is None:
            del record["external"]
        return record


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorRecord:
    """The shared vector."""

    streams: tuple[int, ...]
    """A stream for each arena of the base; 0 where the arena is not coded."""
    dtype: str
    rule: str
    parameters: Mapping[str, Any]
    tasks: tuple[str, ...]
    """The tasks it was merged from, in order."""
    created: str

    @property
    def decoded_dtype(self) -> str:
        """The dtype of its weights once they are read."""
        return "float32" if self.dtype in QUANTIZED else self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord:
    """A task in a few words."""

    document: int
    """Stream of its `TaskDocument`."""
    streams: tuple[int, ...]
    """All its streams."""
    base: str
    """Identity of the base it was written against."""
    label: str
    kind: str
    code: str
    """``"tall"``, ``"signs"``, ``"seeded"``, ``"levels"``, ``"auto"``; ``"none"`` where the base
    alone predicts it."""
    bits: int
    """Planes of codes over the weights, at most."""
    tall_lambda: float | None
    exact: bool
    """Whether loading gives back the original bit for bit."""
    tensors: int
    weights: int
    coded: int
    """Weights that are coded."""
    own: int
    """Weights kept as they are: heads, what the base lacks."""
    density: float | None
    """Fraction of ones of a mask, of touched weights of another code, over the coded weights."""
    relative_error: float | None
    """Of the codes alone, without the residual: norm of the error / norm of the task vector, before
    weights are rounded to their dtype."""
    score: float | None
    """What the caller's `evaluate` gave for the chosen lambda."""
    nbytes: int
    """Bytes of the original's tensors and files."""
    created: str
    parameters: Mapping[str, Any] | None = None
    """What it was coded with, for people; None in the words of format version 1."""
    shared: bool = False
    """Whether a code other than a mask is over the shared vector."""

    @property
    def plain(self) -> bool:
        """Whether its document is in the words of format version 1."""
        return self.parameters is None

    @property
    def kept_as(self) -> str:
        """``"masks"``, ``"signs"``, ``"exact"``, or two of them."""
        words = {"none": [], "tall": ["masks"]}.get(self.code, [self.code])
        return " + ".join(words + ["exact"] * self.exact) or self.code

    @property
    def uses_vector(self) -> bool:
        """Whether loading it takes the shared vector, but for its exact tier."""
        return self.code == "tall" or self.shared

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest; version 1 knows neither `parameters` nor `shared`."""
        record = dataclasses.asdict(self)
        if self.plain:
            del record["parameters"], record["shared"]
        return record


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """Everything a store holds."""

    base: BaseRecord | None = None
    vector: VectorRecord | None = None
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)

    def live_streams(self) -> frozenset[int]:
        """The streams that something here refers to."""
        live = [s for record in self.tasks.values() for s in (record.document, *record.streams)]
        if self.base is not None:
            live += [self.base.document, *self.base.streams]
        if self.vector is not None:
            live += [stream for stream in self.vector.streams if stream]
        return frozenset(live)

    @property
    def requires(self) -> tuple[str, ...]:
        """What a reader has to know beyond format version 1."""
        external = self.base is not None and self.base.external is not None
        needed = {
            EXTERNAL_BASE: external,
            CODES: not all(task.plain for task in self.tasks.values()),
            QUANTIZED_VECTOR: self.vector is not None and self.vector.dtype in QUANTIZED,
        }
        return tuple(name for name, there in needed.items() if there)

    def used_vector(self) -> VectorRecord | None:
        """The shared vector, unless no task uses it any more."""
        used = any(task.uses_vector for task in self.tasks.values())
        return self.vector if used else None

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {
            **({"requires": list(self.requires)} if self.requires else {}),
            "base": self.base and self.base.to_json(),
            "vector": self.vector and dataclasses.asdict(self.vector),
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any], *, what: str) -> Catalog:
        """Read what `to_json` wrote.

        Raises
        ------
        NewerFormatError
            Something in it is unknown to this version.
        CorruptStoreError
            It is anything else.
        """
        if "requires" in body:
            for name in strictjson.list_field(body, "requires", str, what=what):
                if name not in _FEATURES:
                    raise strictjson.newer(what, f"it needs {name[:80]!r}", _FEATURES)
        strictjson.only(body, ("requires", "base", "vector", "tasks"), what=what)
        base = strictjson.optional(body, "base", dict, what=what)
        vector = strictjson.optional(body, "vector", dict, what=what)
        tasks: dict[str, TaskRecord] = {}
        for name, record in strictjson.str_keys(body, "tasks", what=what).items():
            try:
                check_task_name(name)
            except TaskNameError as exc:
                raise CorruptStoreError(f"{what}: {exc}") from exc
            place = f"{what}: task {name!r}"
            tasks[name] = _read_task(strictjson.fields(record, what=place), place)
        catalog = cls(
            base=None if base is None else _read(BaseRecord, base, f"{what}: base"),
            vector=None if vector is None else _read_vector(vector, f"{what}: vector"),
            tasks=tasks,
        )
        if list(catalog.requires) != body.get("requires", []):
            raise CorruptStoreError(f"{what}: what it needs contradicts what it holds")
        return catalog


def _read_task(record: Mapping[str, Any], what: str) -> TaskRecord:
    plain = "parameters" not in record and "shared" not in record
    if plain:
        record = {**record, "parameters": {}, "shared": False}
    task: TaskRecord = _read(TaskRecord, record, what)
    codes, planes = (_PLAIN, 1) if plain else (_CODES, MAX_BITS)
    if task.code not in codes:
        raise strictjson.newer(what, f"a code {task.code[:80]!r}", map(repr, codes))
    if task.bits > planes:
        raise strictjson.newer(what, f"a code of {task.bits} planes", [f"at most {planes}"])
    return dataclasses.replace(task, parameters=None) if plain else task


def _read_vector(record: Mapping[str, Any], what: str) -> VectorRecord:
    # The rule is for people: reading takes no more than the vector, by whichever rule it was made.
    vector: VectorRecord = _read(VectorRecord, record, what)
    known = (*sorted(CODABLE), *QUANTIZED)
    if vector.dtype not in known:
        raise strictjson.newer(what, f"a dtype {vector.dtype[:80]!r}", known)
    return vector
