"""The safetensors format: its header, parsed strictly and built.

A file is 8 bytes of little-endian header length, that many bytes of JSON (padded with spaces to
a multiple of 8), then the tensors' bytes, C-contiguous, without holes. The JSON maps each
tensor's name to its dtype, shape and ``data_offsets``, which count from the end of the header;
the key ``__metadata__`` maps strings to strings.

The layout written is the safetensors library's own, so a file that the library wrote comes back
byte for byte. Neither torch nor that library is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from tallstore.dtypes import itemsize
from tallstore.errors import (
    CheckpointError,
    CorruptStoreError,
    OptionError,
    UnsupportedObjectError,
)
from tallstore.sources.reading import ReadOnlyFile, foreign_cause
from tallstore.strictjson import loads

__all__ = [
    "MAX_HEADER_BYTES",
    "METADATA_KEY",
    "SafetensorsHeader",
    "SafetensorsTensor",
    "TensorLayout",
    "build_header",
    "is_plausible_header",
    "parse_header",
    "parse_open_file",
    "plan_file",
    "quoted",
]

#: The library's cap on the JSON header.
MAX_HEADER_BYTES: Final = 100_000_000
#: The key of the header under which a file's own remarks are, such as ``{"format": "pt"}``.
METADATA_KEY: Final = "__metadata__"

#: Name, dtype and shape of a tensor to be written.
TensorLayout: TypeAlias = tuple[str, str, tuple[int, ...]]

_LENGTH_BYTES: Final = 8
_MAX_SIZE: Final = 2**63 - 1
_ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})

_TO_TORCH: Final = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F4": "float4_e2m1fn_x2",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "bfloat16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "I64": "int64",
        "U64": "uint64",
        "F64": "float64",
        "C64": "complex64",
    }
)
_FROM_TORCH: Final = MappingProxyType({torch: name for name, torch in _TO_TORCH.items()})


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """Where one tensor lies in its file."""

    dtype: str
    """As torch names it."""
    shape: tuple[int, ...]
    """As torch counts it: two 4-bit floats make one element of ``float4_e2m1fn_x2``."""
    begin: int
    """Offset of its first byte in the file."""
    end: int
    """Offset behind its last byte."""


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A header, checked against the size of its file."""

    tensors: Mapping[str, SafetensorsTensor]
    """By name, in the order of their bytes."""
    metadata: Mapping[str, str]
    """What ``__metadata__`` held; empty without one."""


def is_plausible_header(head: bytes) -> bool:
    """Whether a file that starts with `head` (9 bytes or more) may be a safetensors file."""
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return len(head) > _LENGTH_BYTES and 2 <= length <= MAX_HEADER_BYTES and head[8:9] == b"{"


def parse_header(path: str | Path) -> SafetensorsHeader:
    """Read and check the header of the safetensors file at `path`.

    Raises
    ------
    CheckpointError
        It cannot be read, is truncated, or is not a well-formed safetensors file.
    """
    with ReadOnlyFile(path) as file:
        return parse_open_file(file)


def parse_open_file(file: ReadOnlyFile) -> SafetensorsHeader:
    """Read and check the header of a safetensors file that is open.

    Raises
    ------
    CheckpointError
        It is truncated, or is not a well-formed safetensors file.
    """
    head = file.read(0, min(file.size, 32))
    if (cause := foreign_cause(head)) is not None:
        raise CheckpointError(f"{file.path} {cause}")
    if len(head) < _LENGTH_BYTES:
        raise _truncated(file, "its 8-byte header length")
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise _malformed(
            file.path, f"its header would have {length} bytes, over the cap of {MAX_HEADER_BYTES}"
        )
    if _LENGTH_BYTES + length > file.size:
        raise _truncated(file, f"its header of {length} bytes")
    text = file.read(_LENGTH_BYTES, length)
    return _parse_json(text, file, data_start=_LENGTH_BYTES + length)


def _malformed(path: Path, cause: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a well-formed safetensors file: {cause}; download or save it again"
    )


def _truncated(file: ReadOnlyFile, part: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path} has {file.size} bytes and ends within {part}: "
        "it is truncated, or not a safetensors file; copy or download it again"
    )


def _parse_json(text: bytes, file: ReadOnlyFile, *, data_start: int) -> SafetensorsHeader:
    # json would take UTF-16 for text that starts so; its NULs are never bare in real JSON.
    if not text.startswith(b"{") or b"\0" in text:
        raise _malformed(file.path, "its header is not a JSON object")
    try:
        record = loads(text, what="its header", max_bytes=MAX_HEADER_BYTES)
    except CorruptStoreError as exc:
        raise _malformed(file.path, str(exc)) from exc
    metadata = _metadata(record.pop(METADATA_KEY, None), file.path)
    tensors = {name: _tensor(name, entry, file.path) for name, entry in record.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_cover(ordered, file, data_size=file.size - data_start)
    shifted = {
        name: SafetensorsTensor(t.dtype, t.shape, t.begin + data_start, t.end + data_start)
        for name, t in ordered.items()
    }
    return SafetensorsHeader(MappingProxyType(shifted), MappingProxyType(metadata))


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _malformed(path, f"{METADATA_KEY} is not an object of strings")
    for key, text in value.items():
        if not isinstance(text, str) or not _is_unicode(key) or not _is_unicode(text):
            raise _malformed(path, f"{METADATA_KEY} {quoted(key)} is not a Unicode string")
    return value


def _is_unicode(text: str) -> bool:
    # JSON can spell half a surrogate pair, which no file system, store or library can hold.
    return not any("\ud800" <= char <= "\udfff" for char in text)


def quoted(name: str) -> str:
    """A name for a message: quoted, escaped, and not ten thousand characters long."""
    return ascii(name) if len(name) <= 100 else f"{name[:100]!a}... ({len(name)} characters)"


def _is_size(value: Any) -> bool:
    # JSON's true is an int to Python.
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _tensor(name: str, entry: Any, path: Path) -> SafetensorsTensor:
    def malformed(cause: str) -> CheckpointError:
        return _malformed(path, f"tensor {quoted(name)} {cause}")

    if not _is_unicode(name):
        raise malformed("has half a surrogate pair in its name")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise malformed("is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise malformed("has a dtype that is not a string")
    if dtype not in _TO_TORCH:
        raise CheckpointError(
            f"{path}: tensor {quoted(name)} has dtype {quoted(dtype)}, which tallstore does not "
            f"store; convert it to one of {', '.join(_TO_TORCH)}"
        )
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise malformed(f"has a shape that is not a list of sizes from 0 to {_MAX_SIZE}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise malformed("has data_offsets that are not two offsets")
    begin, end = offsets
    if end < begin:
        raise malformed(f"ends at byte {end}, before its begin at {begin}")
    torch_shape = _halved(shape) if dtype == "F4" else tuple(shape)
    if torch_shape is None:
        raise malformed(f"holds 4-bit floats, but its last dimension of {shape} is odd")
    size = _nbytes(_TO_TORCH[dtype], torch_shape)
    if size is None:
        raise malformed(f"has a shape, {quoted(str(shape))}, of more than {_MAX_SIZE} bytes")
    if size != end - begin:
        raise malformed(
            f"of {dtype} {quoted(str(shape))} needs {size} bytes, "
            f"but its data_offsets hold {end - begin}"
        )
    return SafetensorsTensor(_TO_TORCH[dtype], torch_shape, begin, end)


def _halved(shape: Sequence[int]) -> tuple[int, ...] | None:
    """`shape` with two elements of the last dimension packed into one."""
    if not shape or shape[-1] % 2:
        return None
    return (*shape[:-1], shape[-1] // 2)


def _nbytes(dtype: str, shape: Iterable[int]) -> int | None:
    """Bytes of a tensor; None where it, or a stride of it, is over 2**63 - 1."""
    bound, count = itemsize(dtype), itemsize(dtype)
    for size in shape:
        bound *= max(size, 1)
        count *= size
        if bound > _MAX_SIZE:
            return None
    return count


def _check_cover(
    ordered: Mapping[str, SafetensorsTensor], file: ReadOnlyFile, *, data_size: int
) -> None:
    """Check that the tensors, one behind the other, are exactly the file's data."""
    behind, previous = 0, "the header"
    for name, tensor in ordered.items():
        if tensor.begin != behind:
            fault = "overlaps" if tensor.begin < behind else "leaves a hole behind"
            raise _malformed(
                file.path,
                f"tensor {quoted(name)} begins at data byte {tensor.begin} and {fault} {previous}, "
                f"which ends at {behind}",
            )
        behind, previous = tensor.end, f"tensor {quoted(name)}"
    if behind > data_size:
        first = next(name for name, tensor in ordered.items() if tensor.end > data_size)
        raise CheckpointError(
            f"{file.path} has {file.size} bytes but needs {file.size - data_size + behind}: it is "
            f"truncated within tensor {quoted(first)}; copy or download it again"
        )
    if behind < data_size:
        raise _malformed(
            file.path, f"{data_size - behind} bytes behind {previous} belong to no tensor"
        )


def _arrange(tensors: Sequence[TensorLayout]) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Offsets of `tensors` within the data, in the order of their bytes.

    Readers that map a file want every tensor aligned to its element. The order given is kept
    where it does that; otherwise, like the library, wide elements come first.
    """

    def placed(order: Sequence[TensorLayout]) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        result, end = [], 0
        for name, dtype, shape in order:
            size = _nbytes(dtype, shape)
            if size is None or end + size > _MAX_SIZE:
                raise OptionError(
                    f"tensor {quoted(name)} of {dtype} {quoted(str(shape))} makes more than "
                    f"{_MAX_SIZE} bytes; no file holds that"
                )
            result.append((name, dtype, shape, end, end + size))
            end += size
        return result

    result = placed(tensors)
    if any(begin % itemsize(dtype) for _, dtype, _, begin, _ in result):
        result = placed(sorted(tensors, key=lambda tensor: -itemsize(tensor[1])))
    return result


def build_header(
    tensors: Sequence[TensorLayout], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Build the bytes in front of the data.

    Parameters
    ----------
    tensors
        Name, torch's name of the dtype, and shape of each. Their order is kept, unless a tensor
        would not be aligned to its element; then wide elements come first.
    metadata
        For ``__metadata__``.

    Returns
    -------
    bytes
        Length and JSON, padded with spaces to a multiple of 8.

    Raises
    ------
    UnsupportedObjectError
        The format has no such dtype, or a name is not Unicode.
    OptionError
        Two tensors of one name, a tensor called ``__metadata__``, sizes that make no sense, or
        a header over the format's cap.
    """
    return plan_file(tensors, metadata)[0]


def plan_file(
    tensors: Sequence[TensorLayout], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, SafetensorsTensor]]:
    """The header, and where in the file each tensor belongs, in the order of their bytes."""
    _check_layouts(tensors)
    arranged = _arrange(tensors)
    record: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    for name, dtype, shape, begin, end in arranged:
        # The file counts single 4-bit floats.
        counted = [*shape[:-1], 2 * shape[-1]] if dtype == "float4_e2m1fn_x2" else list(shape)
        record[name] = {
            "dtype": _FROM_TORCH[dtype],
            "shape": counted,
            "data_offsets": [begin, end],
        }
    header = _header_bytes(record)
    return header, {
        name: SafetensorsTensor(dtype, shape, begin + len(header), end + len(header))
        for name, dtype, shape, begin, end in arranged
    }


def _header_bytes(record: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as exc:
        raise UnsupportedObjectError(
            f"the name or metadata {quoted(exc.object[exc.start : exc.start + 40])} is not "
            "Unicode; rename it"
        ) from exc
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise OptionError(
            f"names and metadata of {len(record)} tensors make a header of {len(text)} bytes, "
            f"over the format's cap of {MAX_HEADER_BYTES}; write more and smaller shards"
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _check_layouts(tensors: Sequence[TensorLayout]) -> None:
    seen: set[str] = set()
    for name, dtype, shape in tensors:
        if name == METADATA_KEY:
            raise OptionError(f"a tensor cannot be called {METADATA_KEY} in a safetensors file")
        if name in seen:
            raise OptionError(f"two tensors are called {quoted(name)}; rename one")
        seen.add(name)
        if dtype not in _FROM_TORCH:
            raise UnsupportedObjectError(
                f"tensor {quoted(name)}: the safetensors format has no dtype {dtype}; "
                "convert it, or load it with tallstore.load instead"
            )
        if not all(map(_is_size, shape)):
            raise OptionError(f"tensor {quoted(name)} has the impossible shape {shape}")
        if dtype == "float4_e2m1fn_x2" and not shape:
            raise UnsupportedObjectError(
                f"tensor {quoted(name)}: the safetensors format has no 4-bit floats without a "
                "dimension; reshape it to [1]"
            )
