"""What several tests share."""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

__all__ = ["assert_same"]


def assert_same(a: Any, b: Any) -> None:
    """Fail unless `a` and `b` are the same object in every bit that torch.save keeps.

    That is: types, order of keys, NaN payloads, signs of zeros; of tensors also dtype, layout,
    stride, lazy bits, device, class and `requires_grad`; and which tensors are the same object
    or share memory, and at which distance. Modules count as their `state_dict()`.
    """
    _Comparison().compare(a, b, "obj")


class _Comparison:
    def __init__(self) -> None:
        self._objects: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._storages: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._shifts: dict[int, int] = {}
        self._kept: list[object] = []

    def compare(self, a: Any, b: Any, path: str) -> None:
        a = a.state_dict() if isinstance(a, torch.nn.Module) else a
        b = b.state_dict() if isinstance(b, torch.nn.Module) else b
        self._kept += [a, b]
        assert type(a) is type(b), f"{path}: {type(a)} and {type(b)}"
        if isinstance(a, torch.Tensor):
            self._tensor(a, b, path)
        elif isinstance(a, np.ndarray):
            self._identity(a, b, path)
            _array(a, b, path)
        elif isinstance(a, np.generic):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), path
        elif isinstance(a, dict):
            self._dict(a, b, path)
        elif isinstance(a, torch.Size):
            assert a == b, path
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), f"{path}: {len(a)} and {len(b)} items"
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                self.compare(x, y, f"{path}[{i}]")
        elif isinstance(a, (set, frozenset)):
            self._set(a, b, path)
        else:
            assert _bits(a) == _bits(b), f"{path}: {a!r} and {b!r}"

    def _dict(self, a: dict[Any, Any], b: dict[Any, Any], path: str) -> None:
        assert len(a) == len(b), f"{path}: keys {list(a)} and {list(b)}"
        for (key, x), (other, y) in zip(a.items(), b.items(), strict=True):
            self.compare(key, other, f"{path} key")
            self.compare(x, y, f"{path}[{key!r}]")
        if isinstance(a, OrderedDict):
            assert vars(a).keys() == vars(b).keys(), f"{path}: {vars(a)} and {vars(b)}"
            for name, x in vars(a).items():
                self.compare(x, vars(b)[name], f"{path}.{name}")

    def _set(self, a: Any, b: Any, path: str) -> None:
        if any(isinstance(item, torch.Tensor) for item in a):
            # equal by identity alone, so there is no order to compare them in
            assert len(a) == len(b), path
        else:
            assert sorted(map(_frozen, a)) == sorted(map(_frozen, b)), f"{path}: {a} and {b}"

    def _identity(self, a: object, b: object, path: str) -> None:
        there, back = self._objects
        assert there.setdefault(id(a), id(b)) == id(b), f"{path}: one object came back as two"
        assert back.setdefault(id(b), id(a)) == id(a), f"{path}: two objects came back as one"

    def _tensor(self, a: torch.Tensor, b: torch.Tensor, path: str) -> None:
        self._identity(a, b, path)
        for name in ("dtype", "layout", "shape", "device", "requires_grad"):
            x, y = getattr(a, name), getattr(b, name)
            assert x == y, f"{path}: {name} {x} and {y}"
        a, b = a.detach(), b.detach()
        if a.layout != torch.strided:
            self._sparse(a, b, path)
            return
        for name in ("stride", "is_conj", "is_neg"):
            x, y = getattr(a, name)(), getattr(b, name)()
            assert x == y, f"{path}: {name} {x} and {y}"
        self._memory(a, b, path)
        assert torch.equal(_raw(a).cpu(), _raw(b).cpu()), f"{path}: {a} and {b}"

    def _sparse(self, a: torch.Tensor, b: torch.Tensor, path: str) -> None:
        if a.layout == torch.sparse_coo:
            assert a.is_coalesced() == b.is_coalesced(), path
            names = ["_indices", "_values"]
        elif a.layout in (torch.sparse_csr, torch.sparse_bsr):
            names = ["crow_indices", "col_indices", "values"]
        else:
            names = ["ccol_indices", "row_indices", "values"]
        for name in names:
            self.compare(getattr(a, name)(), getattr(b, name)(), f"{path}.{name}()")

    def _memory(self, a: torch.Tensor, b: torch.Tensor, path: str) -> None:
        if not a.numel():
            return
        x, y = a.untyped_storage()._cdata, b.untyped_storage()._cdata
        there, back = self._storages
        assert there.setdefault(x, y) == y, f"{path}: shares no memory any more"
        assert back.setdefault(y, x) == x, f"{path}: shares memory now"
        shift = int(a.storage_offset() - b.storage_offset()) * a.element_size()
        assert self._shifts.setdefault(x, shift) == shift, f"{path}: moved within its storage"


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes behind every element, without arithmetic that would change them."""
    size = tensor.element_size()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * size,
        (*tensor.shape, size),
        (*(step * size for step in tensor.stride()), 1),
    )


def _array(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], path: str) -> None:
    assert a.dtype == b.dtype and a.dtype.type is b.dtype.type, f"{path}: {a.dtype}, {b.dtype}"
    assert a.dtype.isalignedstruct == b.dtype.isalignedstruct, path
    assert a.shape == b.shape, f"{path}: {a.shape} and {b.shape}"
    # pickle, too, makes a C-ordered array of one that is in neither order
    order = a.flags.c_contiguous or not a.flags.f_contiguous
    assert b.flags.c_contiguous if order else b.flags.f_contiguous, f"{path}: order"
    _items(a, b, path)


def _items(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], path: str) -> None:
    if a.dtype.names is None:
        assert a.tobytes() == b.tobytes(), f"{path}: {a} and {b}"
    # the gaps between the fields are nobody's
    for name in a.dtype.names or ():
        _items(a[name], b[name], f"{path}[{name!r}]")


def _bits(value: Any) -> object:
    if isinstance(value, complex):
        return struct.pack("<dd", value.real, value.imag)
    return struct.pack("<d", value) if isinstance(value, float) else value


def _frozen(value: Any) -> str:
    """A text that two hashable values share if they are the same in every bit."""
    if isinstance(value, (set, frozenset, tuple)):
        items = [_frozen(item) for item in value]
        return f"{type(value)}{items if isinstance(value, tuple) else sorted(items)}"
    if isinstance(value, np.generic):
        return f"{value.dtype}{value.tobytes()!r}"
    return f"{type(value)}{_bits(value)!r}"
