"""Objects taken apart and put together again."""

from __future__ import annotations

import json
import math
import struct
import threading
import warnings
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same
from object_helpers import check, filled, read_all, round_trip

from tallstore.dtypes import dtype_name, itemsize
from tallstore.errors import (
    CheckpointError,
)
from tallstore.objects import ObjectSource, assemble, build_tensor, flat_tree

DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and "q" not in str(value)
    },
    key=str,
)
# torch says so at the first complex32 tensor of a process
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

SPARSE_LAYOUTS = ["sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"]
NUMPY_DTYPES = [
    *("?", "i1", "<i2", ">i4", "<i8", "u1", "<u2", ">u4", "<u8", "<f2", ">f4", "<f8", "g"),
    *("F", ">c16", "G", "S5", "U3", ">U3", "V7"),
    *("<M8[ns]", "<M8[25s]", ">m8[D]", "<m8", "<M8[us]"),
]
Point = namedtuple("Point", "x y")


# -- the comparison itself


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.0, -0.0),
        (1, True),
        (struct.unpack("<d", b"\x01" * 6 + b"\xf8\x7f")[0], math.nan),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([1], (1,)),
        ({1, 2.0}, {1, 2}),
        (np.zeros(2, "f4"), np.zeros(2, "f8")),
        (np.zeros((2, 2)), np.zeros((2, 2), order="F")),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(2, 2), torch.zeros(2, 2).t()),
        (torch.zeros(2), torch.zeros(2, requires_grad=True)),
        (torch.nn.Parameter(torch.zeros(2)), torch.zeros(2, requires_grad=True)),
        (torch.zeros(1, dtype=torch.cfloat), torch.zeros(1, dtype=torch.cfloat).conj()),
        ([torch.zeros(2)] * 2, [torch.zeros(2), torch.zeros(2)]),
        ([torch.zeros(2), torch.zeros(2)], [torch.zeros(2)] * 2),
        (list(torch.zeros(2, 2)), [torch.zeros(2), torch.zeros(2)]),
        (list(torch.zeros(2, 2)), [row[0] for row in torch.zeros(2, 1, 2).expand(2, 2, 2)][::-1]),
    ],
)
def test_assert_same_sees_every_difference(a: Any, b: Any) -> None:
    assert_same(a, a)
    with pytest.raises(AssertionError):
        assert_same(a, b)


# -- scalars and containers


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        2**63 - 1,
        -(2**63),
        2**63,
        -(2**63) - 1,
        10**5000,
        0.0,
        -0.0,
        1e300,
        5e-324,
        0.1,
        math.inf,
        -math.inf,
        math.nan,
        struct.unpack("<d", b"\x01\x02\x03\x04\x05\x06\xf9\xff")[0],
        complex(-0.0, math.nan),
        complex(math.inf, -0.0),
        1 + 2j,
        "",
        "naïve \0 😀",
        "$tensor",
        "lone \ud83d",
        "\ud83d\ude00",
        "a" * 5000,
        "😀\ud83d\ude00" * 3000,
        b"",
        bytes(range(256)),
        bytes(range(256)) * 17,
        torch.Size([]),
        torch.Size([2, 0, 2**40]),
        torch.float8_e4m3fn,
        torch.qint8,
        torch.device("cpu"),
        torch.device("cuda"),
        torch.device("cuda:3"),
        torch.device("meta"),
    ],
    ids=lambda value: repr(value)[:30] if type(value) is not int else hex(value)[:20],
)
def test_scalars(value: Any) -> None:
    check(value)
    check({"a": [value, (value,)]})


def test_strings_stay_distinct_when_their_surrogates_would_pair_up() -> None:
    tree = {"\ud83d\ude00": 1, "😀": torch.zeros(1), "x\ud83d\ude00": torch.zeros(2)}
    check(tree)
    names = [item.name for item in ObjectSource(tree).tensors]
    assert names == ["😀", "x\\ud83d\\ude00"]


@pytest.mark.parametrize(
    "value",
    [
        [],
        (),
        {},
        set(),
        frozenset(),
        OrderedDict(),
        [[], [()], {"a": {}}],
        {"b": 1, "a": 2, "": 3},
        {"$tensor": 0},
        {"$dict": 1, "$": 2, "a": 3},
        {"\ud800": 1},
        {1: "a", "1": "b", b"1": "c", 2.5: "d", None: "e", False: "f", 1j: "g"},
        {(1, ("a", None)): 1, (): 2, torch.Size([1]): 3, torch.int8: 4, torch.device("cpu"): 5},
        {np.float32(1.5): 1, np.int64(3): 2, np.str_("a"): 3, frozenset({1, 2}): 4},
        {"a" * 5000: 1, b"b" * 5000: 2},
        {math.nan: 1, -0.0: 2},
        OrderedDict([("b", 1), ("a", OrderedDict([(1, 2)]))]),
        {1, 2.5, "a", b"a", None, (1, 2), frozenset({3}), 1j, torch.int8, np.float32(7)},
        {frozenset({frozenset({1, 2}), 3})},
        {"a" * 5000, b"b" * 5000},
    ],
    ids=lambda value: repr(value)[:30],
)
def test_containers(value: Any) -> None:
    check(value)


def test_key_order_and_metadata_are_kept() -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    assert state._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]
    check(state)
    assert round_trip(state)._metadata == state._metadata  # type: ignore[attr-defined]


def test_modules_come_back_as_their_state_dict() -> None:
    module = torch.nn.Linear(3, 2)
    again = round_trip({"model": module, "deep": [module]})
    assert_same(again["model"], module.state_dict())
    assert type(again["model"]) is OrderedDict
    assert again["deep"][0]["weight"].data_ptr() == again["model"]["weight"].data_ptr()


def test_sets_are_written_the_same_whatever_their_order() -> None:
    items = [0, 8, 16, "a", "b", b"c", (1, "x"), frozenset({8, 0, 16})]
    forward, backward = set(items), set(reversed(items))
    assert ObjectSource(forward).tree == ObjectSource(backward).tree


def test_sets_of_tensors() -> None:
    tensor = torch.randn(3)
    again = round_trip({"s": {tensor, "a"}, "t": tensor})
    assert again["t"] in again["s"] and len(again["s"]) == 2
    assert_same(again["t"], tensor)


# -- numpy


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_numpy_arrays_and_scalars_of_every_dtype(name: str) -> None:
    dtype = np.dtype(name)
    data = np.random.default_rng(0).integers(0, 100, 24 * dtype.itemsize, np.uint8)
    array = (data % 2 if name == "?" else data).view(np.uint8)
    array = np.zeros(24, dtype) if "U" in name else np.frombuffer(array.tobytes(), dtype)
    cube = array.reshape(2, 3, 4)
    check([array, cube, cube.T, cube[:, ::-1, ::2], array[:0], array[:1].reshape(())])
    check([array[3], array[0], dtype.type(0) if dtype.kind not in "mMV" else array[2]])


def test_numpy_order_is_kept() -> None:
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    again = round_trip([array, array[:, :1], array[:0]])
    assert again[0].flags.f_contiguous and not again[0].flags.c_contiguous
    assert again[0].flags.writeable and again[0].flags.owndata
    assert_same(again[0], array)


def test_numpy_objects_met_twice_come_back_as_one() -> None:
    array = np.arange(3)
    again = round_trip([array, {"x": array}, array.copy()])
    assert again[0] is again[1]["x"] and again[0] is not again[2]


def test_numpy_segments_have_the_dtype_of_the_array() -> None:
    source = ObjectSource({"a": np.zeros(4, np.float32), "b": np.zeros(4, ">f4")})
    assert [s.dtype for s in source.segments] == ["float32", "uint8"]
    assert [t.dtype for t in source.tensors] == ["uint8", "uint8"]


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype([("a", "<i4"), ("b", ">f8", (2, 3)), ("c", [("d", "S3"), ("é", "<M8[s]")])]),
        np.dtype([("a", "i1"), ("b", "<f8")], align=True),
        np.dtype({"names": ["x", "y"], "formats": ["<i2", "u1"], "offsets": [4, 4], "itemsize": 9}),
        np.dtype([(("title", "a"), "<i4"), ("b", "?")]),
        np.dtype([]),
        np.dtype("V0"),
    ],
    ids=repr,
)
def test_numpy_structures(dtype: np.dtype[Any]) -> None:
    array = np.zeros(5, dtype)
    if dtype.itemsize:
        array = np.frombuffer(bytes(i % 100 for i in range(5 * dtype.itemsize)), dtype)
    check([array, array[2], array[:0], np.asfortranarray(array[:4].reshape(2, 2))])


def test_numpy_empty_and_long_scalars() -> None:
    check([np.str_("a\0"), np.bytes_(b"a\0\0"), np.str_("\ud800"), np.str_(""), np.bytes_(b"")])
    check([np.str_("ab"), np.str_("x" * 2000), np.bytes_(b"y" * 5000)])
    assert len(ObjectSource(np.bytes_(b"y" * 5000)).tensors) == 1
    check([np.float64(math.nan), np.bool_(True), np.datetime64("NaT"), np.longdouble(1) / 3])


# -- tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_torch_dtype(dtype: torch.dtype) -> None:
    base = filled((4, 6), dtype)
    check([base, base.t(), base[1:, ::2], base[2, 3], base[:, :0], filled((), dtype)])
    check([filled((0, 3), dtype), filled((1,), dtype).expand(5, 7), base[3:, 5:]])
    check(torch.nn.Parameter(filled((3,), dtype), requires_grad=False))
    if dtype.is_floating_point or dtype.is_complex:
        check([torch.nn.Parameter(base), filled((2,), dtype).requires_grad_()])
    if dtype.is_complex:
        check([base.conj(), base[1:].conj().t(), torch._neg_view(base.conj())])
        check(torch.nn.Parameter(base.conj()))


def test_lazy_bits() -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    again = round_trip([z, z.conj(), z.conj().imag, z.imag, z.real, z.conj().t()])
    assert again[1].is_conj() and again[2].is_neg() and not again[2].is_conj()
    assert_same(again, [z, z.conj(), z.conj().imag, z.imag, z.real, z.conj().t()])


def test_expanded_tensors_store_their_storage_only() -> None:
    source = ObjectSource(torch.randn(3, 1).expand(3, 10**9))
    assert source.segments[0].nbytes == 12
    assert source.tensors[0].stride == (1, 0)
    check(torch.arange(2).expand(0, 2))
    check(torch.zeros(1).expand(2, 3, 4))


def test_only_the_used_range_is_stored() -> None:
    storage = torch.randn(1000)
    source = ObjectSource([storage[100:110], storage[105:120:3]])
    assert len(source.segments) == 1 and source.segments[0].numel == 18
    check([storage[100:110], storage[105:120:3], storage[:0], storage[500:500]])


def test_tensors_of_one_storage_share_one_segment() -> None:
    base = torch.randn(4, 4)
    obj = {"w": base, "tied": base.view(16), "row": base[1], "own": base.clone()}
    source = ObjectSource(obj)
    assert [t.segment for t in source.tensors] == [0, 0, 0, 1]
    again = round_trip(obj)
    again["row"].fill_(7)
    assert (again["w"][1] == 7).all() and (again["tied"][4:8] == 7).all()
    assert not (again["own"] == 7).any()


def test_one_tensor_met_twice_comes_back_as_one() -> None:
    w = torch.nn.Parameter(torch.randn(2))
    view = w.detach()
    again = round_trip({"a": w, "b": [w], "c": view})
    assert again["a"] is again["b"][0] and again["c"] is not again["a"]
    assert_same(again, {"a": w, "b": [w], "c": view})


@pytest.mark.parametrize("wide", [torch.float32, torch.complex128, torch.int64])
def test_storages_of_mixed_dtypes(wide: torch.dtype) -> None:
    raw = torch.randint(0, 256, (71,), dtype=torch.uint8)
    obj = [raw[17:70], raw[:64].view(wide)[1:3], raw[33:35], raw[2:70].view(torch.int16)[9:]]
    source = ObjectSource(obj)
    assert len(source.segments) == 1 and source.segments[0].dtype == "uint8"
    assert source.segments[0].numel % itemsize(dtype_name(wide)) == 0
    for item in source.tensors:
        assert item.offset >= 0
    assert_same(obj, round_trip(obj, piece=7))


def test_padding_beyond_the_storage_is_zeros() -> None:
    raw = torch.arange(1, 12, dtype=torch.uint8)
    source = ObjectSource([raw, raw[:8].view(torch.int64)])
    assert source.segments[0].numel == 16
    (segment,) = read_all(source, piece=3)
    assert segment.tolist() == [*range(1, 12), 0, 0, 0, 0, 0]


def test_empty_tensors() -> None:
    base = torch.randn(4)
    check([torch.empty(0), torch.empty(2, 0, 3), base[2:2], base, torch.empty(0, 5).t()])
    check([torch.empty(0, dtype=torch.int8), torch.empty((0,), requires_grad=True)])


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
def test_sparse_tensors(layout: str) -> None:
    dense = torch.randn(4, 6) * (torch.rand(4, 6) > 0.5)
    block = (2, 3) if "bs" in layout else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = dense.to_sparse(layout=getattr(torch, layout), blocksize=block)
        empty = torch.zeros(4, 6).to_sparse(layout=getattr(torch, layout), blocksize=block)
        double = dense.double().to_sparse(layout=getattr(torch, layout), blocksize=block)
    obj = [sparse, empty, double.requires_grad_(), {"again": sparse}, torch.nn.Parameter(empty)]
    again = round_trip(obj)
    assert_same(obj, again)
    assert again[0] is again[3]["again"]
    assert [t.name for t in ObjectSource({"s": sparse}).tensors][-1] == "s.values"


def test_sparse_coo_that_is_hybrid_or_not_coalesced() -> None:
    indices = torch.tensor([[2, 0, 2]])
    values = torch.randn(2, 3).t()
    loose = torch.sparse_coo_tensor(indices, values, (4, 2), check_invariants=True)
    again = round_trip({"loose": loose, "values": values})
    assert not again["loose"].is_coalesced() and again["loose"].shape == (4, 2)
    assert_same({"loose": loose, "values": values}, again)
    check(loose.coalesce())


def test_parameters_and_requires_grad() -> None:
    leaf = torch.randn(2, requires_grad=True)
    obj = [leaf, leaf * 2, torch.nn.Parameter(leaf.detach(), requires_grad=False)]
    again = round_trip(obj)
    assert_same(obj, again)
    assert all(item.is_leaf for item in again)


def test_python_attributes_of_tensors_are_noted() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.no_decay = True  # type: ignore[attr-defined]
    notes = ObjectSource({"w": weight}).notes
    assert notes == ("obj['w']: Python attributes not stored: no_decay",)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_tensors_and_segments() -> None:
    base = torch.randn(8, 8, device="cuda")
    obj = {"a": base.t(), "b": base[3]}
    source = ObjectSource(obj)
    segments = [segment.cuda() for segment in read_all(source)]
    tensors = [build_tensor(item, segments[item.segment]) for item in source.tensors]
    assert_same(obj, assemble(source.tree, tensors))


# -- names and size of the tree


def test_names() -> None:
    def new() -> torch.Tensor:
        return torch.zeros(1)

    obj = {"a": {"b": new(), 0: [new(), np.zeros(1)]}, "a.b": new(), "a.b~2": new(), "": new()}
    names = [item.name for item in ObjectSource([obj, {(1, "x"): new()}]).tensors]
    assert names == ["0.a.b", "0.a.0.0", "0.a.0.1", "0.a.b~2", "0.a.b~2~2", "0.", "1.(1, 'x')"]
    assert ObjectSource(new()).tensors[0].name == "tensor"
    assert [item.name for item in ObjectSource({"a.b": new(), "w": new()}).tensors] == ["a.b", "w"]


def test_a_state_dict_costs_few_bytes_an_entry() -> None:
    state = {f"layer.{i}.weight": torch.zeros(1) for i in range(300)}
    tree = ObjectSource(state).tree
    spent = len(json.dumps(tree)) - sum(map(len, state))
    assert spent / len(state) < 30
    assert tree == flat_tree(list(state))


def test_flat_tree() -> None:
    tensors = [torch.zeros(1), torch.zeros(2), torch.zeros(3)]
    for names in (["b", "a"], ["$a", "b"], ["\ud83d\ude00", "😀", ""], []):
        expected = dict(zip(names, tensors, strict=False))
        assert_same(assemble(flat_tree(names), tensors), expected)


# -- reading


def test_protocol_attributes() -> None:
    with ObjectSource({"a": torch.zeros(2)}, label="x.pt") as source:
        assert (source.label, source.kind, source.files, source.notes) == ("x.pt", "object", (), ())
        with pytest.raises(CheckpointError, match="an object has no file"):
            source.read_file("config.json")


def test_reads_out_of_range_are_refused() -> None:
    source = ObjectSource(torch.zeros(4), label="weights")
    out = np.empty(8, np.uint8)
    with pytest.raises(CheckpointError, match="weights: segment 0 has 16 bytes, but bytes 12 to"):
        source.read(0, 12, out)
    with pytest.raises(CheckpointError, match="16 bytes"):
        source.read(0, -1, out)
    with pytest.raises(CheckpointError, match="no segment 1"):
        source.read(1, 0, out)
    source.close()
    with pytest.raises(CheckpointError, match="was closed"):
        source.read(0, 0, out)


def test_reading_leaves_the_storage_resizable() -> None:
    tensor = torch.zeros(4)
    check(tensor)
    assert tensor.untyped_storage().resizable()


def test_reading_is_lazy_and_threaded() -> None:
    tensor = torch.zeros(1 << 16, dtype=torch.int32)
    source = ObjectSource(tensor)
    tensor.copy_(torch.arange(1 << 16))
    out = np.zeros(1 << 18, np.uint8)

    def read(part: int) -> None:
        source.read(0, part << 15, out[part << 15 : (part + 1) << 15])

    threads = [threading.Thread(target=read, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (out.view(np.int32) == np.arange(1 << 16)).all()


# -- a whole checkpoint


def test_training_checkpoint() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.ReLU()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    for _ in range(3):
        model(torch.arange(10)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    checkpoint = {
        "model": model,
        "optimizer": optimizer.state_dict(),
        # as every trainer does that wants a portable file
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if not callable(v)},
        "rng": [torch.get_rng_state(), np.random.default_rng(0).bit_generator.state],
        "step": 3,
        "loss": float("nan"),
        "best": np.float32(0.1),
    }
    again = round_trip(checkpoint)
    assert_same(checkpoint, again)
    other = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    other.load_state_dict(again["optimizer"])
    assert_same(other.state_dict(), optimizer.state_dict())
    names = [item.name for item in ObjectSource(checkpoint).tensors]
    assert "model.0.weight" in names and "optimizer.state.0.exp_avg" in names
