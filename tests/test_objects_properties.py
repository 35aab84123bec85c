"""Properties of objects taken apart and put together, over random nests and hostile trees."""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_objects import DTYPES, NUMPY_DTYPES, filled, round_trip

from tallstore.errors import CorruptStoreError, NewerFormatError
from tallstore.objects import ObjectSource, assemble, build_tensor
from tallstore.specs import TensorSpec

# torch says so at the first complex32 tensor of a process
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

quick = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

text = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    ["$tensor", "$", "\ud83d\ude00", "a" * 4097]
)
floats = st.binary(min_size=8, max_size=8).map(lambda raw: struct.unpack("<d", raw)[0])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    floats,
    st.builds(complex, floats, floats),
    text,
    st.binary(max_size=40),
    st.binary(min_size=4097, max_size=4100),
    st.lists(st.integers(0, 2**62), max_size=3).map(torch.Size),
    st.sampled_from(DTYPES),
    st.sampled_from(["cpu", "cuda:1", "meta"]).map(torch.device),
    st.sampled_from([np.float32(0.1), np.int8(-3), np.str_("é"), np.datetime64("2020-01-01")]),
)
keys = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner),
    max_leaves=4,
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, 0..65 elements a dimension, odd strides and offsets, shared storage."""
    dtype = draw(st.sampled_from(DTYPES))
    tensor = filled((draw(st.integers(0, 65)), draw(st.integers(0, 9))), dtype)
    for dim in (0, 1):
        start, step = draw(st.integers(0, 5)), draw(st.integers(1, 4))
        index = [slice(None), slice(None)]
        index[dim] = slice(start, None, step)
        tensor = tensor[tuple(index)]
    action = draw(st.sampled_from(["", "t", "expand", "0-dim", "flag", "conj", "neg", "tight"]))
    if action == "t":
        tensor = tensor.t()
    elif action == "expand":
        tensor = tensor.unsqueeze(1).expand(-1, draw(st.integers(0, 65)), -1)
    elif action == "0-dim" and tensor.numel():
        tensor = tensor[0, -1]
    elif action == "conj":
        tensor = tensor.conj()
    elif action == "neg":
        tensor = torch._neg_view(tensor)
    elif action == "tight":
        tensor = torch.as_strided(tensor, tensor.shape, [1] * tensor.dim())
    differentiable = dtype.is_floating_point or dtype.is_complex
    if action == "flag":
        tensor = torch.nn.Parameter(tensor, requires_grad=differentiable and draw(st.booleans()))
    return tensor.detach().requires_grad_() if action == "t" and differentiable else tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype = np.dtype(draw(st.sampled_from([name for name in NUMPY_DTYPES if "U" not in name])))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    data = draw(st.binary(min_size=dtype.itemsize, max_size=64))
    count = int(np.prod(shape))
    raw = (data * (count * dtype.itemsize // len(data) + 1))[: count * dtype.itemsize]
    array = np.frombuffer(raw if dtype.kind != "b" else bytes(b & 1 for b in raw), dtype)
    return array.reshape(shape, order=draw(st.sampled_from("CF")))


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Every container of `inner`."""
    pairs = st.lists(st.tuples(keys, inner), max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(text, inner, max_size=4),
        pairs.map(dict),
        pairs.map(OrderedDict),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
    )


objects = st.recursive(scalars | tensors() | arrays(), containers, max_leaves=12)


@quick
@given(objects, st.integers(1, 9))
def test_round_trip(obj: Any, piece: int) -> None:
    assert_same(obj, round_trip(obj, piece=piece * 37))


@quick
@given(st.data())
def test_views_of_one_storage_stay_views_of_one_storage(data: st.DataObject) -> None:
    raw = torch.arange(1, 200, dtype=torch.uint8)
    views = []
    for _ in range(data.draw(st.integers(1, 5))):
        dtype = data.draw(st.sampled_from(DTYPES))
        limit = raw.numel() // dtype.itemsize
        offset = data.draw(st.integers(0, limit))
        size = data.draw(st.integers(0, limit - offset))
        step = data.draw(st.integers(0, 3))
        count = size if step == 0 else (size + step - 1) // step
        empty = torch.empty(0, dtype=dtype)
        if count and offset < limit:
            views.append(empty.set_(raw.untyped_storage(), offset, (count,), (step,)))
    source = ObjectSource(views)
    assert len(source.segments) == min(len(views), 1)
    assert all(segment.nbytes <= 208 for segment in source.segments)
    assert_same(views, round_trip(views))


json_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 6), st.floats(), st.text(max_size=3)
)
tags = [
    *("tensor", "dict", "odict", "metadata", "tuple", "set", "frozenset", "str", "bytes", "int"),
    *("float", "complex", "size", "dtype", "device", "scalar", "ndarray", "sparse", "layout"),
    *("parts", "coalesced", "fields", "itemsize", "base", "shape"),
]
words = st.sampled_from(
    [
        *("sparse_coo", "sparse_csr", "<f4", "|u1", "<U1", "V0", "C", "F", "float32", "cpu"),
        *("0x1", "AAAA", "load", "0" * 16, b"", object()),
    ]
)


def hostile_containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists, objects and tagged objects of `inner`."""
    names = st.sampled_from([*(f"${tag}" for tag in tags), *tags, "size"])
    tagged = st.dictionaries(names, inner, min_size=1, max_size=1)
    layouts = st.sampled_from(["sparse_coo", "sparse_csr", "sparse_bsc"])
    sparse = st.fixed_dictionaries(
        {"layout": layouts, "size": inner, "parts": st.lists(st.integers(0, 4), max_size=3)},
        optional={"coalesced": st.just(True), "parameter": st.just(True)},
    ).map(lambda body: {"$sparse": body})
    array = st.tuples(st.integers(0, 4), inner, inner, st.sampled_from("CF")).map(
        lambda body: {"$ndarray": list(body)}
    )
    return st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(names | text, inner, max_size=2),
        tagged,
        tagged,
        sparse,
        array,
    )


@settings(quick, max_examples=600)
@given(st.recursive(json_leaves | words, hostile_containers, max_leaves=10))
def test_hostile_trees_are_refused_as_what_they_are(tree: Any) -> None:
    built = [
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(2),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor(1.0),
    ]
    try:
        assemble(tree, built)
    except NewerFormatError as exc:
        assert "update tallstore" in str(exc)  # a tag that a later version may well know
    except CorruptStoreError as exc:
        assert "malformed" in str(exc)


@settings(quick, max_examples=80)
@given(objects, st.data())
def test_damaged_trees_are_refused_as_what_they_are(obj: Any, data: st.DataObject) -> None:
    source = ObjectSource([obj])
    tree = _damaged(source.tree, data)
    segments = [torch.zeros(spec.nbytes, dtype=torch.uint8) for spec in source.segments]
    built = [build_tensor(spec, segments[spec.segment]) for spec in source.tensors]
    try:
        assemble(tree, built)
    except NewerFormatError as exc:
        assert "update tallstore" in str(exc)  # a tag that a later version may well know
    except CorruptStoreError as exc:
        assert "malformed" in str(exc)


def _damaged(tree: Any, data: st.DataObject) -> Any:
    """`tree` with one of its places changed."""
    if not isinstance(tree, (dict, list)) or not tree or data.draw(st.integers(0, 5)) == 0:
        return data.draw(json_leaves | words)
    if isinstance(tree, list):
        place = data.draw(st.integers(0, len(tree) - 1))
        return [*tree[:place], _damaged(tree[place], data), *tree[place + 1 :]]
    key = data.draw(st.sampled_from(list(tree)))
    return tree | {key: _damaged(tree[key], data)}


numbers = st.integers(-1, 70) | st.sampled_from([2**31, 2**62, 2**63, 2**64, True, 1.0])


@settings(quick, max_examples=300)
@given(
    st.sampled_from([*map(str, DTYPES), "float32", "complex64", "object", ""]),
    st.lists(st.tuples(numbers, numbers), max_size=3),
    numbers,
    st.tuples(*[st.booleans()] * 4),
    st.integers(0, 65),
)
def test_hostile_specs_stay_inside_their_segment(
    dtype: str, dims: list[tuple[Any, Any]], offset: Any, flags: tuple[bool, ...], size: int
) -> None:
    segment = torch.zeros(size, dtype=torch.uint8)
    spec = TensorSpec(
        name="x",
        segment=0,
        dtype=dtype.removeprefix("torch."),
        shape=tuple(n for n, _ in dims),
        stride=tuple(step for _, step in dims),
        offset=offset,
        **dict(zip(["conj", "neg", "parameter", "requires_grad"], flags, strict=True)),
    )
    try:
        tensor = build_tensor(spec, segment)
    except CorruptStoreError as exc:
        assert "tensor 'x' is described wrongly" in str(exc)
    else:
        last = sum((n - 1) * step for n, step in dims)
        end = offset + (last + 1 if tensor.numel() else 0)
        assert end * tensor.element_size() <= size
        assert segment.untyped_storage().nbytes() == size
