"""Objects that cannot be stored, and trees that are none: refused by their path."""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict, namedtuple
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from object_helpers import check, spec

from tallstore.errors import (
    CorruptStoreError,
    NewerFormatError,
    UnsupportedObjectError,
)
from tallstore.objects import ObjectSource, assemble, build_tensor

Point = namedtuple("Point", "x y")


# -- refusals


class Text(str):
    """A str that is more."""


class Wrapped(torch.Tensor):
    """A tensor that is more."""


def _cycle() -> list[Any]:
    cycle: list[Any] = []
    cycle.append({"back": cycle})
    return cycle


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _shared() -> Any:
    value: Any = [1]
    for _ in range(60):
        value = [value, value]
    return value


def _freed() -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def _attributed() -> OrderedDict[str, int]:
    result = OrderedDict(a=1)
    result.extra = 1  # type: ignore[attr-defined]
    return result


def _invalid() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[5]]), torch.ones(1), (3,), check_invariants=False)


class Broken(torch.nn.Module):
    """A module whose state cannot be had."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("no shard")


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2)])


@pytest.mark.parametrize(
    ("make", "kind", "advice"),
    [
        (lambda: print, "builtin_function_or_method", "is code; store what it needs"),
        (lambda: dict, "type", "is code"),
        (object, "object", "none of the plain containers"),
        (lambda: Fraction(1, 2), "fractions.Fraction", "none of the plain containers"),
        (lambda: range(3), "range", "convert it to one"),
        (lambda: bytearray(3), "bytearray", "convert it to one"),
        (
            lambda: Point(1, 2),
            "test_objects_refused.Point",
            "subclass of tuple; convert it with tuple()",
        ),
        (lambda: torch.zeros(3).max(0), "torch.return_types.max", "subclass of tuple"),
        (lambda: defaultdict(int), "collections.defaultdict", "convert it with dict()"),
        (lambda: Text("a"), "test_objects_refused.Text", "convert it with str()"),
        (lambda: {Text("a"): 1}, "test_objects_refused.Text", "convert it with str()"),
        (lambda: np.array([None]), "numpy.ndarray", "holds Python objects; convert it to a list"),
        (lambda: np.zeros(1, [("a", "O")]), "numpy.ndarray", "holds Python objects"),
        (lambda: np.ma.masked_array([1]), "numpy.ma", "subclass of numpy.ndarray"),
        (
            lambda: np.rec.array(np.zeros(1, [("a", "i4")]))[0],
            "numpy.rec",
            "numpy alone cannot rebuild",
        ),
        (lambda: np.zeros(1, (np.record, [("a", "i4")])), "numpy.ndarray", "cannot rebuild"),
        (quantized, "torch.Tensor", "is quantized; store int_repr()"),
        (lambda: torch.zeros(2, device="meta"), "torch.Tensor", "meta device"),
        (nested, "torch.Tensor", "is a nested tensor; store the list that unbind() gives"),
        (lambda: torch.zeros(2, 2).to_mkldnn(), "torch.Tensor", "mkldnn layout; store to_dense()"),
        (
            lambda: torch.zeros(1).as_subclass(Wrapped),
            "test_objects_refused.Wrapped",
            "plain tensor",
        ),
        (lambda: torch.nn.LazyLinear(2), "UninitializedParameter", "plain tensor"),
        (lambda: torch._efficientzerotensor((2,)), "torch.Tensor", "store clone()"),
        (_freed, "torch.Tensor", "has no storage of its size in memory"),
        (_invalid, "torch.Tensor", "breaks the rules of its layout"),
        (lambda: {torch.zeros(1): 1}, "torch.Tensor", "is a key; use a name"),
        (lambda: {(1, torch.zeros(1)): 1}, "torch.Tensor", "is a key; use a name"),
        (lambda: torch.zeros(1).untyped_storage(), "UntypedStorage", "none of the plain"),
        (_attributed, "int", "is an attribute of a dict"),
        (_cycle, "list", "contains itself; break the cycle"),
        (lambda: _deep(199), "list", "lies over 200 containers deep; flatten it"),
        (_shared, "list", "shares its containers so often"),
        (Broken, "test_objects_refused.Broken", "fails to give its state_dict(): 'no shard'"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_path(make: Any, kind: str, advice: str) -> None:
    obj = {"optimizer": {"state": [{"hook": make()}], 3: 4}}
    with pytest.raises(UnsupportedObjectError) as caught:
        ObjectSource(obj, label="run 7")
    message = str(caught.value)
    assert message.startswith("run 7: obj['optimizer']['state'][0]")
    if "deep" not in advice:
        assert "obj['optimizer']['state'][0]['hook']" in message
    assert kind in message and advice in message and "\n" not in message.split("layout:")[0]


@pytest.mark.parametrize(
    ("obj", "path"),
    [
        ({3: {b"k": object()}}, "obj[3][b'k'],"),
        ({(1, "a"): [0, object()]}, "obj[(1, 'a')][1],"),
        ({"s": {object()}}, "obj['s']{...},"),
        ({"d": {object(): 1}}, "obj['d'] (one of its keys),"),
        (object(), "obj,"),
        ({"x" * 1000: object()}, "..."),
    ],
)
def test_paths(obj: Any, path: str) -> None:
    with pytest.raises(UnsupportedObjectError) as caught:
        ObjectSource(obj)
    assert path in str(caught.value) and len(str(caught.value)) < 700


def test_200_containers_are_not_too_deep() -> None:
    check(_deep(200))
    value: Any = torch.zeros(1)
    for i in range(199):
        value = {i: value} if i % 2 else OrderedDict([((i,), value)])
    check(value)


# -- hostile input


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": 2},
        {"$tensor": -1},
        {"$tensor": True},
        {"$tensor": "0"},
        {"$tensor": 0, "x": 1},
        {"a": 1, "$tensor": 0},
        {"$tuple": 3},
        {"$set": [1, 1]},
        {"$set": [[1]]},
        {"$dict": [1]},
        {"$dict": {}},
        {"$dict": [1, 2, 1.0, 3]},
        {"$dict": [[], 2]},
        {"$odict": 1},
        {"$metadata": {}},
        {"$odict": {"$x": 1}, "$metadata": {}, "y": 1},
        {"$odict": {}, "$metadata": {"$int": 1}},
        {"$int": "12"},
        {"$int": "0x"},
        {"$int": 3},
        {"$float": "7ff"},
        {"$complex": [1.0]},
        {"$complex": [1, 2]},
        {"$complex": [1.0, {"$float": None}]},
        {"$size": [2**64]},
        {"$size": [True]},
        {"$size": 3},
        {"$dtype": "load"},
        {"$dtype": "os.system"},
        {"$dtype": ["float32"]},
        {"$device": "cpu; rm"},
        {"$device": "cuda:999"},
        {"$device": 0},
        {"$bytes": "a"},
        {"$bytes": "é"},
        {"$bytes": None},
        {"$bytes": 0},
        {"$bytes": 99},
        {"$str": "/w=="},
        {"$scalar": ["<f4", "AAA="]},
        {"$scalar": ["O", "AAAAAAAAAAA="]},
        {"$scalar": ["<U1", "/////w=="]},
        {"$scalar": ["<f4"]},
        {"$scalar": ["U", "/w=="]},
        {"$scalar": [{}, "AAAA"]},
        {"$ndarray": [1, "<f4", [3], "C"]},
        {"$ndarray": [1, "<f4", [2**62, 2**62], "C"]},
        {"$ndarray": [1, "<f4", [-1, -2], "C"]},
        {"$ndarray": [1, "<f4", [2], "K"]},
        {"$ndarray": [1, "<f4", [2], []]},
        {"$ndarray": [1, "O", [1], "C"]},
        {"$ndarray": [1, "i4,i4", [1], "C"]},
        {"$ndarray": [1, "<f8", [1] * 100, "C"]},
        {"$ndarray": [0, "<f4", [2], "C"]},
        {"$ndarray": [1, {"fields": [["a", "O", 0]], "itemsize": 8}, [1], "C"]},
        {"$ndarray": [1, {"fields": [["a", "<f8", 9]], "itemsize": 8}, [1], "C"]},
        {"$ndarray": [1, {"fields": [["a"]], "itemsize": 8}, [1], "C"]},
        {"$ndarray": [1, {"base": "<f8", "shape": [2**60, 2**60]}, [1], "C"]},
        {"$ndarray": [1, {"base": "V0", "shape": [2**60]}, [8], "C"]},
        {"$ndarray": [1, "<V999999999999999999", [1], "C"]},
        {"$sparse": {}},
        {"$sparse": {"layout": "sparse_coo", "size": [3], "parts": [0]}},
        {"$sparse": {"layout": "load", "size": [3], "parts": []}},
        {"$sparse": {"layout": [], "size": [3], "parts": [0, 1]}},
        {"$sparse": {"layout": "sparse_coo", "size": [3], "parts": [0, 1]}},
        {"$sparse": {"layout": "sparse_csr", "size": [3, 3], "parts": [0, 0, 0]}},
        {"$sparse": {"layout": "sparse_coo", "size": [3], "parts": [0, 9]}},
        {"$sparse": {"layout": "sparse_coo", "size": [3], "parts": [0, 1], "coalesced": 0}},
        float("nan"),
        b"bytes",
        {1: 2},
        {"a": {1: 2}},
        object(),
    ],
    ids=lambda tree: repr(tree)[:60],
)
def test_malformed_trees_are_refused(tree: Any) -> None:
    tensors = [torch.zeros(2), torch.zeros(8, dtype=torch.uint8)]
    for wrapped in (tree, [tree], {"a": {"$tuple": [tree]}}):
        with pytest.raises(CorruptStoreError, match="malformed"):
            assemble(wrapped, tensors)


def test_a_tag_of_a_later_version_is_refused() -> None:
    with pytest.raises(NewerFormatError, match=r"a tag '\$code'.*knows \$odict, .*; update"):
        assemble([{"$code": "print()"}], [])


def test_sparse_indices_out_of_bounds_are_refused() -> None:
    tensors = [torch.tensor([[7]]), torch.ones(1), torch.tensor([0, 1]), torch.tensor([7])]
    for layout, size, parts in (("sparse_coo", [3], [0, 1]), ("sparse_csr", [1, 3], [2, 3, 1])):
        with pytest.raises(CorruptStoreError, match="sparse tensor cannot be rebuilt"):
            assemble({"$sparse": {"layout": layout, "size": size, "parts": parts}}, tensors)


def test_too_deep_trees_are_refused() -> None:
    for wrap in ("list", "$tuple", "$dict", "$odict", "$metadata", "plain", "$frozenset"):
        tree: Any = 1
        for _ in range(230):
            tree = {
                "list": [tree],
                "plain": {"a": tree},
                "$dict": {"$dict": ["k", tree]},
                "$odict": {"$odict": {"k": tree}},
                "$metadata": {"$odict": {}, "$metadata": tree},
            }.get(wrap, {wrap: [tree]})
        with pytest.raises(CorruptStoreError, match="nest over 200 deep"):
            assemble(tree, [])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "object"}, "is not one that tallstore stores"),
        ({"shape": (2, 4)}, "it reaches 28 bytes into a segment of 24"),
        ({"offset": 1}, "it reaches 28 bytes"),
        ({"offset": -1}, "not a natural number"),
        ({"shape": (2, -3)}, "not a natural number"),
        ({"stride": (-3, 1)}, "not a natural number"),
        ({"stride": (1,)}, "2 sizes but 1 strides"),
        ({"stride": (2**62, 1)}, "bytes into a segment of 24"),
        ({"stride": (2**63, 1)}, "not a natural number"),
        ({"shape": (2**40, 2**40), "stride": (0, 0)}, "2\\*\\*63 elements"),
        ({"shape": (0, 2**62, 2**62), "stride": (0, 0, 0)}, "2\\*\\*63 elements"),
        ({"shape": (0,), "stride": (1,), "offset": 7}, "it reaches 28 bytes"),
        ({"shape": (2.0, 3)}, "not a natural number"),
        ({"shape": (True, 3)}, "not a natural number"),
        ({"conj": True}, "conjugate bit"),
        ({"dtype": "int32", "requires_grad": True}, "floating point"),
        ({"dtype": "int32", "parameter": True, "requires_grad": True}, "floating point"),
    ],
)
def test_wrong_descriptions_are_refused(changes: dict[str, Any], reason: str) -> None:
    segment = torch.zeros(24, dtype=torch.uint8)
    with pytest.raises(CorruptStoreError, match=f"tensor 'w' is described wrongly.*{reason}"):
        build_tensor(spec(**changes), segment)
    assert segment.untyped_storage().nbytes() == 24


def test_segments_may_be_typed_and_lie_inside_an_arena() -> None:
    arena = torch.arange(32, dtype=torch.float32)
    tensor = build_tensor(spec(), arena[4:10])
    assert tensor.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert tensor.data_ptr() == arena[4:].data_ptr()
    with pytest.raises(CorruptStoreError, match="starts at byte 2, not a multiple of 4"):
        build_tensor(spec(), arena.view(torch.uint8)[2:26])
    with pytest.raises(CorruptStoreError, match="segment of 24"):
        build_tensor(spec(offset=1), arena[4:10])
