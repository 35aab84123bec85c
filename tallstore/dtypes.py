"""Names and sizes of tensor dtypes, without importing torch.

A dtype is named as torch names it (``"float32"``, ``"float8_e4m3fn"``). Sizes are in bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tallstore.errors import UnsupportedObjectError

if TYPE_CHECKING:
    import torch

__all__ = ["CODABLE", "dtype_name", "is_codable", "itemsize", "torch_dtype"]

#: Floating dtypes whose weights can be coded as base + levels * vector (design: fp32 arithmetic).
CODABLE: Final = frozenset({"float32", "bfloat16", "float16"})

_ITEMSIZE: Final = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
    "bits8": 1,
    "bits16": 2,
    **{f"{sign}int{width}": 1 for sign in ("", "u") for width in range(1, 8)},
}


def itemsize(name: str) -> int:
    """Bytes of one element of the dtype called `name`.

    Raises
    ------
    UnsupportedObjectError
        The name is not a dtype that tallstore stores.
    """
    try:
        return _ITEMSIZE[name]
    except KeyError:
        raise UnsupportedObjectError(
            f"dtype {name!r} is not one that tallstore stores; convert the tensor first"
        ) from None


def is_codable(name: str) -> bool:
    """Whether weights of the dtype called `name` can be coded against a base."""
    return name in CODABLE


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    import torch

    itemsize(name)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedObjectError(
            f"dtype {name!r} is unknown to torch {torch.__version__}; update torch to load it"
        )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype, checked to be one that tallstore stores."""
    name = str(dtype).removeprefix("torch.")
    itemsize(name)
    return name
