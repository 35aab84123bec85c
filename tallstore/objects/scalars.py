"""Scalars as JSON, every bit kept: integers of any size, NaN payloads, lone surrogates."""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from typing import Any

import torch

from tallstore.errors import CorruptStoreError
from tallstore.specs import JSON

__all__ = [
    "base64_decode",
    "base64_encode",
    "complex_decode",
    "complex_encode",
    "device_decode",
    "dtype_decode",
    "float_decode",
    "float_encode",
    "int_decode",
    "int_encode",
    "is_unicode",
    "malformed",
    "size_decode",
    "utf8_decode",
    "utf8_encode",
]

_INT64 = range(-(1 << 63), 1 << 63)


def malformed(reason: str) -> CorruptStoreError:
    """Build the error that says why a tree cannot be assembled."""
    return CorruptStoreError(f"the stored object's tree is malformed: {reason}; restore a backup")


def is_unicode(text: str) -> bool:
    """Whether `text` has no surrogates, which JSON's escapes would pair up and so change."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def utf8_encode(text: str) -> bytes:
    """UTF-8 in which surrogates are encoded like any other code point."""
    return text.encode("utf-8", "surrogatepass")


def utf8_decode(data: bytes) -> str:
    """Undo `utf8_encode`."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as exc:
        raise malformed(f"a string is not UTF-8 ({exc})") from exc


def base64_encode(data: bytes) -> str:
    """Write `data` in base64."""
    return base64.b64encode(data).decode("ascii")


def base64_decode(text: object) -> bytes:
    """Undo `base64_encode`."""
    if type(text) is not str:
        raise malformed(f"base64 text is expected, not {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise malformed(f"base64 text is damaged ({exc})") from exc


def int_encode(value: int) -> JSON:
    """Write an int as a JSON number, or in base 16, which Python reads at any length."""
    return value if value in _INT64 else {"$int": hex(value)}


def int_decode(body: object) -> int:
    """Undo `int_encode`'s tagged form."""
    if type(body) is not str or not re.fullmatch(r"-?0x[0-9a-f]+", body):
        raise malformed("$int is not a hexadecimal number")
    return int(body, 16)


def float_encode(value: float) -> JSON:
    """Write a float as a JSON number, or by its bits where JSON has no number for it."""
    if math.isfinite(value):
        return value
    return {"$float": struct.pack(">d", value).hex()}


def float_decode(body: object) -> float:
    """Undo `float_encode`'s tagged form."""
    if type(body) is not str or not re.fullmatch(r"[0-9a-f]{16}", body):
        raise malformed("$float is not 16 hexadecimal digits")
    value: float = struct.unpack(">d", bytes.fromhex(body))[0]
    return value


def complex_encode(value: complex) -> JSON:
    """Write a complex number by its two floats."""
    return {"$complex": [float_encode(value.real), float_encode(value.imag)]}


def complex_decode(body: object) -> complex:
    """Undo `complex_encode`."""
    if type(body) is not list or len(body) != 2:
        raise malformed("$complex is not a pair")
    return complex(_component(body[0]), _component(body[1]))


def _component(tree: Any) -> float:
    if type(tree) is float and math.isfinite(tree):
        return tree
    if type(tree) is dict and set(tree) == {"$float"}:
        return float_decode(tree["$float"])
    raise malformed("$complex holds something else than floats")


def size_decode(body: object) -> torch.Size:
    """Read a list of integers as torch.Size."""
    if type(body) is not list or any(type(n) is not int or n not in _INT64 for n in body):
        raise malformed("a size is not a list of 64-bit integers")
    return torch.Size(body)


def dtype_decode(body: object) -> torch.dtype:
    """Find a torch dtype by its name."""
    dtype = getattr(torch, body, None) if type(body) is str else None
    if not isinstance(dtype, torch.dtype):
        raise malformed(f"$dtype {body!r:.80} is unknown to torch {torch.__version__}")
    return dtype


def device_decode(body: object) -> torch.device:
    """Read a torch device by its name; no device is started."""
    try:
        device = torch.device(body) if type(body) is str else None
    except RuntimeError as exc:
        raise malformed(f"$device {body!r:.80} is unknown to torch {torch.__version__}") from exc
    if device is None or str(device) != body:
        raise malformed(f"$device {body!r:.80} is not a device")
    return device
