"""JSON is read strictly: one meaning for every text, and one error for all others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore import strictjson
from tallstore.errors import CorruptStoreError

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def loads(data: bytes, max_bytes: int = 1 << 20) -> Any:
    return strictjson.loads(data, what="zoo.tall: manifest", max_bytes=max_bytes)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        # the order of keys is kept
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@given(values)
def test_round_trip(value: Any) -> None:
    data = strictjson.dumps(value)
    assert data.isascii()
    assert same(loads(data), value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_what_is_no_json_is_not_written(value: object) -> None:
    with pytest.raises(ValueError):
        strictjson.dumps(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"NaN", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b'{"a": 1, "a": 2}', "a key is given twice"),
        (b'{"b": {"a": 1, "a": 1}}', "a key is given twice"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "Expecting property name"),
        (b'"\xff"', "utf-8"),
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
        (b"1" * 5000, "4300 digits"),
        (b"-" + b"1" * 5000, "4300 digits"),
    ],
)
def test_refusals(text: bytes, reason: str) -> None:
    with pytest.raises(CorruptStoreError, match="(?i)" + reason) as caught:
        loads(text)
    assert str(caught.value).startswith("zoo.tall: manifest is not strict JSON: ")
    assert caught.value.__cause__ is not None


def test_the_cap() -> None:
    assert loads(b"[1, 2]", max_bytes=6) == [1, 2]
    with pytest.raises(CorruptStoreError, match="has 6 bytes, over the cap of 5"):
        loads(b"[1, 2]", max_bytes=5)


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_that_error(data: bytes) -> None:
    try:
        value = loads(data)
    except CorruptStoreError:
        return
    assert same(loads(strictjson.dumps(value)), value)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, "field 'n' is bool, not int"),
        (1.0, int, "field 'n' is float, not int"),
        ("1", int, "field 'n' is str, not int"),
        (-1, int, "field 'n' is negative"),
        (None, str, "field 'n' is NoneType, not str"),
        (1, bool, "field 'n' is int, not bool"),
        ([], dict, "field 'n' is list, not dict"),
    ],
)
def test_field_is_exact_about_types(value: Any, kind: type[Any], message: str) -> None:
    with pytest.raises(CorruptStoreError, match=message):
        strictjson.field({"n": value}, "n", kind, what="w")


def test_fields() -> None:
    record = {"n": 3, "none": None, "list": [1, 2], "object": {"a": 1}, "mixed": [1, "2"]}
    assert strictjson.field(record, "n", int, what="w") == 3
    assert repr(strictjson.field(record, "n", float, what="w")) == "3.0"
    with pytest.raises(CorruptStoreError, match="field 'n' is int, not float"):
        strictjson.field({"n": 10**400}, "n", float, what="w")
    assert strictjson.optional(record, "none", int, what="w") is None
    assert strictjson.optional(record, "absent", int, what="w") is None
    assert strictjson.optional(record, "n", int, what="w") == 3
    assert strictjson.list_field(record, "list", int, what="w") == [1, 2]
    assert strictjson.str_keys(record, "object", what="w") == {"a": 1}
    with pytest.raises(CorruptStoreError, match="w lacks the field 'absent'"):
        strictjson.field(record, "absent", int, what="w")
    with pytest.raises(CorruptStoreError, match="field 'mixed' holds '2', no int"):
        strictjson.list_field(record, "mixed", int, what="w")
    with pytest.raises(CorruptStoreError, match="field 'list' is not an object but list"):
        strictjson.str_keys(record, "list", what="w")
    with pytest.raises(CorruptStoreError, match="w is not an object but int"):
        strictjson.fields(1, what="w")
    with pytest.raises(CorruptStoreError, match="holds -1, no int"):
        strictjson.list_field({"n": [-1]}, "n", int, what="w")
