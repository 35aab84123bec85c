"""JSON that is read strictly: no duplicate keys, no NaN, bounded size, checked types."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar, cast

from tallstore.errors import CorruptStoreError, NewerFormatError
from tallstore.version import __version__

__all__ = [
    "dumps",
    "field",
    "fields",
    "list_field",
    "loads",
    "newer",
    "only",
    "optional",
    "str_keys",
]

_T = TypeVar("_T")


def dumps(value: object) -> bytes:
    """`value` as compact ASCII JSON; the order of keys is kept."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def loads(data: bytes, *, what: str, max_bytes: int) -> Any:
    """Parse strict JSON.

    Parameters
    ----------
    data
        UTF-8 text.
    what
        What it is, for messages.
    max_bytes
        Refused above this size.

    Raises
    ------
    CorruptStoreError
        It is too large, not JSON, nests too deeply, or repeats a key.
    """
    if len(data) > max_bytes:
        raise CorruptStoreError(f"{what} has {len(data)} bytes, over the cap of {max_bytes}")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as exc:
        raise CorruptStoreError(f"{what} is not strict JSON: {exc}") from exc


def fields(record: object, *, what: str) -> dict[str, Any]:
    """`record`, checked to be a JSON object."""
    if not isinstance(record, dict):
        raise CorruptStoreError(f"{what} is not an object but {type(record).__name__}")
    return cast("dict[str, Any]", record)


def newer(what: str, found: str, known: Iterable[object]) -> NewerFormatError:
    """The refusal of what a later tallstore wrote.

    Parameters
    ----------
    what
        Where it stands.
    found
        What is there: ``"codec 7"``.
    known
        What could be there.
    """
    names = ", ".join(map(str, known))
    return NewerFormatError(
        f"{what}: {found}, of which tallstore {__version__} knows nothing (it knows {names}); "
        "update tallstore"
    )


def only(record: Mapping[str, Any], known: Iterable[str], *, what: str) -> None:
    """Refuse fields that this version does not know.

    They may change what the others mean; and a writer that left them out would lose them.

    Raises
    ------
    NewerFormatError
    """
    names = list(known)
    unknown = [name for name in record if name not in names]
    if unknown:
        raise newer(what, f"a field {unknown[0][:80]!r}", names)


def field(record: Mapping[str, Any], name: str, kind: type[_T], *, what: str) -> _T:
    """The field `name`, checked to be exactly of type `kind` (and not negative, if an int)."""
    try:
        value = record[name]
    except KeyError:
        raise CorruptStoreError(f"{what} lacks the field {name!r}") from None
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) is not kind:
        raise CorruptStoreError(
            f"{what}: field {name!r} is {type(value).__name__}, not {kind.__name__}"
        )
    if isinstance(value, int) and value < 0:
        raise CorruptStoreError(f"{what}: field {name!r} is negative")
    return value


def optional(record: Mapping[str, Any], name: str, kind: type[_T], *, what: str) -> _T | None:
    """Like `field`, but None where the field is absent or null."""
    if record.get(name) is None:
        return None
    return field(record, name, kind, what=what)


def list_field(record: Mapping[str, Any], name: str, kind: type[_T], *, what: str) -> list[_T]:
    """A field that is a list whose items are all exactly of type `kind`."""
    items: list[Any] = field(record, name, list, what=what)
    for item in items:
        if type(item) is not kind or (isinstance(item, int) and item < 0):
            raise CorruptStoreError(f"{what}: field {name!r} holds {item!r}, no {kind.__name__}")
    return items


def str_keys(record: Mapping[str, Any], name: str, *, what: str) -> dict[str, Any]:
    """A field that is an object."""
    return fields(record.get(name), what=f"{what}: field {name!r}")
