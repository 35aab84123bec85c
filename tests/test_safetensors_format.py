"""The safetensors format: against the library in both directions, and against hostile headers."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from tallstore.dtypes import itemsize, torch_dtype
from tallstore.errors import (
    CheckpointError,
    OptionError,
    StoreFullError,
    StoreIOError,
    StoreReadOnlyError,
    UnknownTensorError,
    UnsupportedObjectError,
)
from tallstore.sources.safetensors_format import (
    MAX_HEADER_BYTES,
    build_header,
    is_plausible_header,
    parse_header,
)
from tallstore.sources.safetensors_writer import SafetensorsWriter

DTYPES = [
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("float4_e2m1fn_x2", "float16", "bfloat16", "float32", "float64", "complex64"),
]


def tensor_of(dtype: str, *shape: int) -> torch.Tensor:
    """A tensor whose bytes are all different where they can be."""
    count = itemsize(dtype) * torch.Size(shape).numel()
    raw = torch.arange(count, dtype=torch.int64).remainder(2 if dtype == "bool" else 251)
    return raw.to(torch.uint8).view(torch_dtype(dtype)).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    layout = [(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]
    with SafetensorsWriter(path, layout, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, raw(tensor))


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def many() -> dict[str, torch.Tensor]:
    tensors = {f"t.{dtype}": tensor_of(dtype, 2, 3) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "": torch.ones(1)}
    tensors |= {'n\0l "q" \\ \n é 🙂': torch.ones(3), "x" * 10_000: torch.ones(1)}
    return tensors


def test_reads_what_the_library_writes(tmp_path: Path, many: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(many, path, metadata={"format": "pt", "é": "ü"})
    header = parse_header(path)
    assert dict(header.metadata) == {"format": "pt", "é": "ü"}
    assert header.tensors.keys() == many.keys()
    data = path.read_bytes()
    for name, place in header.tensors.items():
        assert torch_dtype(place.dtype) == many[name].dtype
        assert place.shape == tuple(many[name].shape)
        assert data[place.begin : place.end] == raw(many[name])


def test_the_library_reads_what_is_written(tmp_path: Path, many: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    save(path, many, {"format": "pt"})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == many.keys()
    for name, tensor in many.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert raw(loaded[name]) == raw(tensor)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_of_the_library_comes_back_byte_for_byte(
    tmp_path: Path, many: dict[str, torch.Tensor]
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    safetensors.torch.save_file(many, theirs, metadata={"format": "pt"})
    header = parse_header(theirs)
    save(ours, {name: many[name] for name in header.tensors}, dict(header.metadata))
    assert ours.read_bytes() == theirs.read_bytes()


def test_tensors_are_aligned_and_order_kept_where_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save(path, {"b": tensor_of("uint8", 3), "a": tensor_of("float64", 2)}, None)
    places = parse_header(path).tensors
    assert list(places) == ["a", "b"]
    assert all(place.begin % itemsize(place.dtype) == 0 for place in places.values())
    save(path, {"b": tensor_of("uint8", 8), "a": tensor_of("float64", 2)}, None)
    assert list(parse_header(path).tensors) == ["b", "a"]


HOSTILE: list[tuple[str, object, bytes, str]] = [
    ("array", b"[]", b"", "not a JSON object"),
    ("space first", b" {}", b"", "not a JSON object"),
    ("empty", b"", b"", "not a JSON object"),
    ("cut json", b'{"a":', b"", "not strict JSON"),
    ("utf16", '{"a":1}'.encode("utf-16-le"), b"", "not a JSON object"),
    ("latin1", '{"é":1}'.encode("latin-1"), b"", "not strict JSON"),
    ("nan", b'{"a":NaN}', b"", "not strict JSON"),
    ("deep", b'{"a":' + b"[" * 200_000, b"", "not strict JSON"),
    ("long number", b'{"a":' + b"9" * 5000 + b"}", b"", "not strict JSON"),
    (
        "dup names",
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        "twice",
    ),
    ("dup fields", b'{"a":{"dtype":"U8","dtype":"U8","shape":[1]}}', b"x", "twice"),
    ("no object", {"a": 1}, b"", "'a' is not described by exactly dtype"),
    ("more fields", {"a": entry("U8", [1], 0, 1) | {"x": 1}}, b"x", "exactly dtype"),
    ("dtype type", {"a": entry(3, [1], 0, 1)}, b"x", "dtype that is not a string"),
    ("dtype", {"a": entry("F6_E2M3", [4], 0, 3)}, b"xxx", "'F6_E2M3', which tallstore does not"),
    ("negative", {"a": entry("U8", [-1], 0, 1)}, b"x", "list of sizes"),
    ("two negatives", {"a": entry("U8", [-1, -1], 0, 1)}, b"x", "list of sizes"),
    ("bool dim", {"a": entry("U8", [True], 0, 1)}, b"x", "list of sizes"),
    ("float dim", {"a": entry("U8", [1.0], 0, 1)}, b"x", "list of sizes"),
    ("str dim", {"a": entry("U8", ["1"], 0, 1)}, b"x", "list of sizes"),
    ("shape type", {"a": entry("U8", 1, 0, 1)}, b"x", "list of sizes"),
    ("2**64", {"a": entry("U8", [0, 2**64], 0, 0)}, b"", "list of sizes"),
    ("2**60", {"a": entry("F64", [2**60], 0, 0)}, b"", "more than 9223372036854775807"),
    ("2**60 small", {"a": entry("U8", [2**60], 0, 8)}, b"x" * 8, "needs 1152921504606846976"),
    ("wraps to 0", {"a": entry("U8", [2**32, 2**32], 0, 0)}, b"", "more than 922"),
    ("empty but huge", {"a": entry("U8", [0, 2**62, 4], 0, 0)}, b"", "more than 922"),
    ("offset type", {"a": entry("U8", [1], 0, True)}, b"x", "not two offsets"),
    ("negative offset", {"a": entry("U8", [1], -1, 0)}, b"x", "not two offsets"),
    ("three", {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"x", "two offsets"),
    ("end first", {"a": entry("U8", [1], 1, 0)}, b"x", "before its begin"),
    (
        "size",
        {"a": entry("F32", [2], 0, 7)},
        b"x" * 7,
        "8 bytes, but its data_offsets hold 7",
    ),
    ("odd F4", {"a": entry("F4", [3], 0, 2)}, b"xx", "4-bit floats"),
    ("scalar F4", {"a": entry("F4", [], 0, 1)}, b"x", "4-bit floats"),
    (
        "overlap",
        {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)},
        b"x" * 6,
        "'b' begins at data byte 2 and overlaps tensor 'a'",
    ),
    (
        "same bytes",
        {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)},
        b"x" * 4,
        "overlaps",
    ),
    (
        "hole",
        {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)},
        b"x" * 9,
        "'b' begins at data byte 5 and leaves a hole behind tensor 'a'",
    ),
    ("hole in front", {"a": entry("U8", [4], 1, 5)}, b"x" * 5, "hole behind the header"),
    ("rest", {"a": entry("U8", [4], 0, 4)}, b"x" * 5, "1 bytes behind tensor 'a' belong to no"),
    ("only rest", {}, b"x", "1 bytes behind the header belong to no tensor"),
    ("short", {"a": entry("U8", [4], 0, 4)}, b"x" * 3, "truncated within tensor 'a'"),
    ("surrogate", {"\ud800": entry("U8", [1], 0, 1)}, b"x", "half a surrogate pair"),
    ("metadata", {"__metadata__": []}, b"", "__metadata__ is not an object"),
    ("metadata value", {"__metadata__": {"a": 1}}, b"", "__metadata__ 'a' is not a Unicode"),
    ("metadata nest", {"__metadata__": {"a": {}}}, b"", "__metadata__ 'a' is not a Unicode"),
    ("long name", {"x" * 10_000: 1}, b"", r"x'\.\.\. \(10000 characters\)"),
]


@pytest.mark.parametrize(
    ("header", "data", "message"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE]
)
def test_hostile_headers_are_refused(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_the_library_takes_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert not parse_header(write_raw(path, {})).tensors
    assert not parse_header(write_raw(path, {"__metadata__": None})).metadata
    assert not parse_header(write_raw(path, b"{}  \n")).tensors
    turned = {
        "b": entry("U8", [4], 4, 8),
        "a": entry("U8", [4], 0, 4),
        "e": entry("F32", [0], 4, 4),
    }
    assert list(parse_header(write_raw(path, turned, b"x" * 8)).tensors) == ["a", "e", "b"]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 40, -9, -8, -1])
def test_truncation_is_found_at_every_boundary(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"first": tensor_of("float32", 4), "last": tensor_of("uint8", 9)}, None)
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=r"truncated.*copy or download it again") as caught:
        parse_header(path)
    assert str(path) in str(caught.value)
    with pytest.raises(SafetensorError):
        safetensors.torch.load_file(path)


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"a": tensor_of("float32", 4), "b": tensor_of("uint8", 3)}, {"k": "v"})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            parse_header(path)


def test_a_huge_header_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")
    with pytest.raises(CheckpointError, match="over the cap of 100000000"):
        parse_header(path)
    path.write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}")
    with pytest.raises(CheckpointError, match="over the cap"):
        parse_header(path)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        parse_header(path)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="GGUF file"):
        parse_header(path)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        parse_header(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is a directory"):
        parse_header(tmp_path)
    with pytest.raises(CheckpointError, match="is not a path"):
        parse_header("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="a pipe or device"):
        parse_header(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("blob")
    with pytest.raises(CheckpointError, match="link to blob, which is not there"):
        parse_header(tmp_path / "link")


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
        max_size=6,
    ),
    metadata=st.dictionaries(
        st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=3
    ),
)
def test_headers_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str],
) -> None:
    path = tmp_path_factory.mktemp("h") / "a.safetensors"
    data = {name: tensor_of(dtype, *shape) for name, (dtype, shape) in tensors.items()}
    save(path, data, metadata)
    header = parse_header(path)
    assert dict(header.metadata) == metadata
    assert {n: (t.dtype, list(t.shape)) for n, t in header.tensors.items()} == tensors
    loaded = safetensors.torch.load_file(path)
    assert {name: raw(t) for name, t in loaded.items()} == {n: raw(t) for n, t in data.items()}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_headers_never_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("d") / "a.safetensors"
    layout = [("a", "float32", (2, 2)), ("b", "uint8", (3,))]
    whole = bytearray(build_header(layout, {"k": "v"}) + bytes(19))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        header = parse_header(path)
    except CheckpointError:
        return
    assert all(0 < t.begin <= t.end <= len(whole) for t in header.tensors.values())


def test_a_plausible_header() -> None:
    assert is_plausible_header(build_header([("a", "uint8", (1,))])[:16])
    assert not is_plausible_header(b"PK\3\4" + bytes(12))
    assert not is_plausible_header(b"")
    assert len(build_header([("a", "uint8", (1,))])) % 8 == 0


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        ([("a", "complex128", (1,))], UnsupportedObjectError, "'a': the safetensors format has no"),
        ([("a", "int4", (1,))], UnsupportedObjectError, "no dtype int4"),
        ([("a", "float4_e2m1fn_x2", ())], UnsupportedObjectError, "4-bit floats without"),
        ([("\ud800", "uint8", ())], UnsupportedObjectError, "is not Unicode"),
        ([("a", "uint8", ()), ("a", "uint8", ())], OptionError, "two tensors are called 'a'"),
        ([("__metadata__", "uint8", ())], OptionError, "cannot be called __metadata__"),
        ([("a", "uint8", (-1,))], OptionError, "impossible shape"),
        ([("a", "float64", (2**60,))], OptionError, "no file holds that"),
    ],
)
def test_what_the_format_cannot_hold(
    layout: list[tuple[str, str, tuple[int, ...]]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_header(layout)


def test_pieces_come_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a"
    content = bytes(range(100))
    with SafetensorsWriter(path, [("a", "uint8", (100,)), ("e", "float32", (0,))]) as writer:
        for start in (60, 0, 80, 30, 20, 95):
            writer.write("a", start, content[start : start + 40])
        writer.write("e", 0, b"")
        assert not path.exists()
    assert path.stat().st_size == writer.nbytes
    assert raw(safetensors.torch.load_file(path)["a"]) == content
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_stays_of_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with (
        pytest.raises(OptionError, match="'a' lacks 1 bytes"),
        SafetensorsWriter(path, [("a", "uint8", (3,))]) as writer,
    ):
        writer.write("a", 0, b"12")
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(path, []):
        raise KeyboardInterrupt
    with (
        pytest.raises(UnknownTensorError, match="'b' was announced"),
        SafetensorsWriter(path, []) as writer,
    ):
        writer.write("b", 0, b"")
    for start, size in ((-1, 1), (0, 4), (3, 1)):
        with (
            pytest.raises(OptionError, match="not within tensor 'a' of 3"),
            SafetensorsWriter(path, [("a", "uint8", (3,))]) as writer,
        ):
            writer.write("a", start, bytes(size))
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


def test_writing_outside_the_with(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a", [("a", "uint8", (1,))])
    with pytest.raises(OptionError, match="not open for writing"):
        writer.write("a", 0, b"x")
    with (
        pytest.raises(StoreIOError, match="there is no directory"),
        SafetensorsWriter(tmp_path / "absent" / "a", []),
    ):
        pass
    with pytest.raises(StoreIOError, match="is a directory"), SafetensorsWriter(tmp_path, []):
        pass


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ENOSPC, StoreFullError, r"it needs \d+ bytes"),
        (errno.EDQUOT, StoreFullError, "device or quota is full"),
        (errno.EROFS, StoreReadOnlyError, "Read-only file system"),
        (errno.EACCES, StoreReadOnlyError, "Permission denied"),
        (errno.EIO, StoreIOError, "Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_errors_of_the_system(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[Exception],
    message: str,
    call: str,
) -> None:
    def fail(*_: Any) -> Callable[..., Any]:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a"
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(error, match=message) as caught, SafetensorsWriter(path, []):
        pass
    assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_torch_is_not_imported() -> None:
    names = ("safetensors_writer", "safetensors_file", "discover", "model_directory", "opening")
    modules = ", ".join(f"tallstore.sources.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
