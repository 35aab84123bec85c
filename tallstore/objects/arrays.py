"""Numpy arrays and scalars as raw bytes, and their dtypes as JSON."""

from __future__ import annotations

import math
import re
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tallstore.errors import UnsupportedObjectError
from tallstore.objects.limits import MAX_DEPTH
from tallstore.objects.scalars import malformed
from tallstore.sources.source import Bytes
from tallstore.specs import JSON

__all__ = [
    "array_bytes",
    "array_from_bytes",
    "array_order",
    "dtype_from_json",
    "dtype_to_json",
    "scalar_from_bytes",
    "segment_dtype",
]

# Numpy dtypes that torch has too, under the same name; a segment of such compresses well.
_SHARED: Final = frozenset(
    {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)
_SIMPLE: Final = re.compile(r"[<>|][biufcSUV]\d{1,18}|[<>|][mM]8(\[\d{0,9}[a-zA-Zμ]{1,2}\])?")
_BAD_DTYPE: Final = (TypeError, ValueError, OverflowError, MemoryError, RuntimeError)


def dtype_to_json(dtype: np.dtype[Any]) -> JSON:
    """Write a numpy dtype as JSON.

    Raises
    ------
    UnsupportedObjectError
        It holds objects, or belongs to another package, or is a record class. The message
        is a fragment that a caller puts behind the path.
    """
    if dtype.hasobject:
        raise UnsupportedObjectError("holds Python objects; convert it to a list")
    tree = _dtype_tree(dtype)
    again = _dtype_built(tree, 0)
    same = again == dtype and again.type is dtype.type
    if not same or again.isalignedstruct != dtype.isalignedstruct:
        raise UnsupportedObjectError("has a dtype that numpy alone cannot rebuild; convert it")
    return tree


def _dtype_tree(dtype: np.dtype[Any]) -> JSON:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _dtype_tree(base), "shape": list(shape)}
    if dtype.fields is None or dtype.names is None:
        return dtype.str
    rows = []
    for name in dtype.names:
        # (dtype, offset), with the title as a third item where there is one
        inner, *rest = dtype.fields[name]
        if not all(isinstance(title, str) for title in rest[1:]):
            raise UnsupportedObjectError("has a dtype with a title that is no str; drop it")
        rows.append([name, _dtype_tree(inner), *rest])
    tree: dict[str, JSON] = {"fields": rows, "itemsize": dtype.itemsize}
    if dtype.isalignedstruct:
        tree["aligned"] = True
    return tree


def dtype_from_json(tree: JSON) -> np.dtype[Any]:
    """Undo `dtype_to_json`; anything else raises CorruptStoreError."""
    try:
        dtype = _dtype_built(tree, 0)
    except _BAD_DTYPE as exc:
        raise malformed(f"a numpy dtype cannot be rebuilt ({exc})") from exc
    if dtype.hasobject:
        raise malformed("a numpy dtype would hold Python objects")
    return dtype


def _dtype_built(tree: Any, depth: int) -> np.dtype[Any]:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if type(tree) is str:
        # numpy's own parser takes far more, such as "O" and "i4,i4"
        if not _SIMPLE.fullmatch(tree):
            raise ValueError(f"unknown name {tree!r:.80}")
        return np.dtype(tree)
    if type(tree) is not dict:
        raise TypeError("neither a name nor an object")
    if set(tree) == {"base", "shape"}:
        shape = _naturals(tree["shape"])
        return np.dtype((_dtype_built(tree["base"], depth + 1), shape))
    if not {"fields", "itemsize"} <= set(tree) <= {"fields", "itemsize", "aligned"}:
        raise ValueError("unknown keys")
    (itemsize,) = _naturals([tree["itemsize"]])
    return _structure(tree["fields"], itemsize, tree.get("aligned") is True, depth)


def _structure(rows: Any, itemsize: int, aligned: bool, depth: int) -> np.dtype[Any]:
    record: dict[str, list[Any]] = {"names": [], "formats": [], "offsets": [], "titles": []}
    for name, inner, offset, *titles in rows:
        if type(name) is not str or len(titles) > 1 or any(type(t) is not str for t in titles):
            raise TypeError("a field's name or title is not a string")
        record["names"].append(name)
        record["formats"].append(_dtype_built(inner, depth + 1))
        record["offsets"].extend(_naturals([offset]))
        record["titles"].extend(titles or [None])
    return np.dtype({**record, "itemsize": itemsize}, align=aligned)  # type: ignore[call-overload,no-any-return]


def _naturals(items: Any) -> tuple[int, ...]:
    if type(items) is not list:
        raise TypeError("a list of integers is expected")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in items):
        raise ValueError("a number is not a natural one below 2**63")
    return tuple(items)


def array_order(array: npt.NDArray[Any]) -> str:
    """``"F"`` for an array in Fortran order alone, otherwise ``"C"``."""
    return "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"


def array_bytes(array: npt.NDArray[Any]) -> Bytes:
    """Return the bytes in `array_order`: a view where they lie so in memory, else a copy."""
    if array_order(array) == "F":
        array = array.T
    elif not array.flags.c_contiguous:
        # not ascontiguousarray: the gaps of a structure would hold what the memory held before
        array, strided = np.zeros(array.shape, array.dtype), array
        array[...] = strided
    flat = array.reshape(-1)
    # numpy cannot view items of no size
    return flat.view(np.uint8) if flat.dtype.itemsize else np.empty(0, np.uint8)


def segment_dtype(dtype: np.dtype[Any]) -> str:
    """Name of the torch dtype that a segment of such items has; uint8 where none fits."""
    return dtype.name if dtype.name in _SHARED and dtype.str[0] != ">" else "uint8"


def array_from_bytes(data: Bytes, dtype: np.dtype[Any], shape: JSON, order: JSON) -> Any:
    """Undo `array_bytes` into an array that owns its memory."""
    try:
        dims = _naturals(shape)
        if order not in ("C", "F"):
            raise ValueError("the order is neither C nor F")
        if math.prod(dims) * dtype.itemsize != data.size:
            raise ValueError("its size is not that of its bytes")
        if not dtype.itemsize:
            # numpy.empty would make items of no size one character wide, and allocate them
            return np.ndarray(dims, dtype, buffer=b"\0", order=order)
        array = np.empty(dims, dtype, order=order)
        flat = (array.T if order == "F" else array).reshape(-1)
        flat.view(np.uint8)[:] = data
    except _BAD_DTYPE as exc:
        raise malformed(f"a numpy array cannot be rebuilt ({exc})") from exc
    return array


def scalar_from_bytes(data: bytes, dtype: np.dtype[Any]) -> Any:
    """Build a numpy scalar from its bytes."""
    if len(data) != dtype.itemsize or dtype.subdtype is not None:
        raise malformed("a numpy scalar's size is not that of its bytes")
    try:
        return np.ndarray((), dtype, buffer=bytearray(data or b"\0"))[()]
    except (*_BAD_DTYPE, SystemError) as exc:
        raise malformed(f"a numpy scalar cannot be rebuilt ({exc})") from exc
