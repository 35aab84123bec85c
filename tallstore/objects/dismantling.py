"""Taking an object apart into its tree and its tensors."""

from __future__ import annotations

import json
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tallstore.dtypes import dtype_name
from tallstore.errors import UnsupportedObjectError
from tallstore.objects import arrays, scalars
from tallstore.objects.limits import INLINE_LIMIT, MAX_DEPTH, MAX_REPEATS
from tallstore.objects.storages import Gathered, Gatherer
from tallstore.objects.tensors import PART_NAMES, build_sparse, sparse_parts, why_not
from tallstore.sources.source import Bytes
from tallstore.specs import JSON

__all__ = ["Dismantler", "flat_tree"]


def _is_plain(key: object) -> bool:
    return type(key) is str and not key.startswith("$") and scalars.is_unicode(key)


def _pair_up(keys: Sequence[JSON], values: Sequence[JSON], *, plain: bool) -> JSON:
    if plain:
        return dict(zip(keys, values, strict=True))
    return [item for pair in zip(keys, values, strict=True) for item in pair]


def flat_tree(names: Sequence[str]) -> JSON:
    """Build the tree of the flat dict that maps ``names[i]`` to tensor ``i``."""
    plain = all(map(_is_plain, names))
    keys = names if plain else [_text(name) for name in names]
    body = _pair_up(keys, [{"$tensor": i} for i in range(len(names))], plain=plain)
    return body if plain else {"$dict": body}


def _text(text: str) -> JSON:
    if scalars.is_unicode(text):
        return text
    return {"$str": scalars.base64_encode(scalars.utf8_encode(text))}


class Dismantler:
    """Walks one object once.

    A level of nesting costs two frames, `encode` and the method for its kind of container;
    more would bring `MAX_DEPTH` near Python's recursion limit.
    """

    def __init__(self, label: str) -> None:
        self.notes: list[str] = []
        self._label = label
        self._gatherer = Gatherer()
        self._path: list[tuple[str, Any]] = []
        self._names: set[str] = set()
        self._suffixes: dict[str, int] = {}
        self._leaves: dict[int, JSON] = {}
        self._kept: list[object] = []  # what state_dict() made, or its ids would be reused
        self._active: set[int] = set()
        self._met: set[int] = set()
        self._repeats = 0
        self._inline = 0  # > 0 inside dict keys and sets
        self._in_key = False
        # By exact type: what a subclass adds would be lost without a word.
        self._encoders: dict[type, Callable[[Any], JSON]] = {
            type(None): lambda value: value,
            bool: lambda value: value,
            int: scalars.int_encode,
            float: scalars.float_encode,
            complex: scalars.complex_encode,
            str: self._str,
            bytes: self._bytes,
            torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
            torch.device: lambda value: {"$device": str(value)},
            torch.Size: self._size,
            np.ndarray: self._array,
            list: self._sequence,
            tuple: self._sequence,
            set: self._sequence,
            frozenset: self._sequence,
            dict: self._mapping,
            OrderedDict: self._mapping,
        }

    def finish(self) -> Gathered:
        """Return the tensors and segments met on the walk."""
        return self._gatherer.finish()

    def encode(self, value: Any) -> JSON:
        """Return the tree of `value`, collecting its tensors."""
        encoder = self._encoders.get(type(value))
        if encoder is not None:
            return encoder(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.generic) and type(value) is value.dtype.type:
            return self._scalar(value)
        if isinstance(value, torch.nn.Module):
            return self._module(value)
        raise self._refusal(value, _advice(value))

    # -- where we are

    def _refusal(self, value: object, reason: str) -> UnsupportedObjectError:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        return UnsupportedObjectError(
            f"{self._label}: {self._where()}, of type {kind}, cannot be stored: it {reason}"
        )

    def _where(self) -> str:
        short = reprlib.Repr()
        short.maxstring = short.maxother = 200
        parts = ["obj"]
        for style, key in self._path:
            parts.append(style.replace("*", short.repr(key) if "*" in style else ""))
        where = "".join(parts)
        return where if len(where) <= 500 else f"{where[:250]} ... {where[-250:]}"

    def _name(self, *suffix: str) -> str:
        keys = [str(key) for _, key in self._path]
        path = ".".join([*keys, *suffix]) or "tensor"
        # surrogates would not survive JSON, nor a listing
        path = path.encode("utf-8", "backslashreplace").decode("utf-8")
        name = path
        while name in self._names:
            self._suffixes[path] = self._suffixes.get(path, 1) + 1
            name = f"{path}~{self._suffixes[path]}"
        self._names.add(name)
        return name

    def _enter(self, container: Any) -> None:
        key = id(container)
        if key in self._active:
            raise self._refusal(container, "contains itself; break the cycle")
        if len(self._active) >= MAX_DEPTH:
            raise self._refusal(container, f"lies over {MAX_DEPTH} containers deep; flatten it")
        if key in self._met:
            self._repeats += 1 + len(container)
            if self._repeats > MAX_REPEATS:
                raise self._refusal(
                    container, "shares its containers so often that it explodes; store them once"
                )
        self._met.add(key)
        self._active.add(key)

    # -- containers

    def _sequence(self, value: list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any]) -> JSON:
        self._enter(value)
        ordered = isinstance(value, (list, tuple))
        self._inline += not ordered
        items = []
        for i, item in enumerate(value):
            self._path.append(("[*]" if ordered else "{...}", i))
            items.append(self.encode(item))
            self._path.pop()
        self._inline -= not ordered
        self._active.remove(id(value))
        if type(value) is list:
            return items
        if not ordered:
            items.sort(key=json.dumps)
        return {f"${type(value).__name__}": items}

    def _mapping(self, value: dict[Any, Any]) -> JSON:
        self._enter(value)
        plain = all(map(_is_plain, value))
        keys: list[JSON] = list(value) if plain else self._keys(value)
        items = []
        for key, item in value.items():
            self._path.append(("[*]", key))
            items.append(self.encode(item))
            self._path.pop()
        body = _pair_up(keys, items, plain=plain)
        tree = body if plain else {"$dict": body}
        if type(value) is OrderedDict:
            tree = {"$odict": body}
            for name, extra in vars(value).items():
                self._path.append((f".{name}", name))
                if name != "_metadata":
                    raise self._refusal(extra, "is an attribute of a dict; make it an item")
                tree["$metadata"] = self.encode(extra)
                self._path.pop()
        self._active.remove(id(value))
        return tree

    def _keys(self, value: dict[Any, Any]) -> list[JSON]:
        outer, self._in_key = self._in_key, True
        self._inline += 1
        self._path.append((" (one of its keys)", ""))
        keys = [self.encode(key) for key in value]
        self._path.pop()
        self._inline -= 1
        self._in_key = outer
        return keys

    def _module(self, module: torch.nn.Module) -> JSON:
        try:
            state = module.state_dict()
        except Exception as exc:
            raise self._refusal(module, f"fails to give its state_dict(): {exc}") from exc
        self._kept.append(state)
        return self.encode(state)

    # -- leaves

    def _blob(self, data: bytes) -> JSON:
        if len(data) <= INLINE_LIMIT or self._inline:
            return scalars.base64_encode(data)
        return self._gatherer.add_bytes(self._name(), np.frombuffer(data, np.uint8))

    def _str(self, value: str) -> JSON:
        if len(value) <= INLINE_LIMIT or self._inline:
            return _text(value)
        data: Bytes = np.frombuffer(scalars.utf8_encode(value), np.uint8)
        return {"$str": self._gatherer.add_bytes(self._name(), data)}

    def _bytes(self, value: bytes) -> JSON:
        return {"$bytes": self._blob(value)}

    def _size(self, value: torch.Size) -> JSON:
        if any(type(n) is not int for n in value):
            raise self._refusal(value, "has symbolic sizes; make them integers")
        return {"$size": list(value)}

    def _np_dtype(self, value: np.ndarray[Any, Any] | np.generic) -> JSON:
        try:
            return arrays.dtype_to_json(value.dtype)
        except UnsupportedObjectError as exc:
            raise self._refusal(value, str(exc)) from None

    def _scalar(self, value: np.generic) -> JSON:
        # as arrays, these would lose the zeros at their end
        if isinstance(value, np.str_):
            return {"$scalar": ["U", self._blob(scalars.utf8_encode(value))]}
        if isinstance(value, np.bytes_):
            return {"$scalar": ["S", self._blob(bytes(value))]}
        return {"$scalar": [self._np_dtype(value), self._blob(value.tobytes())]}

    def _array(self, value: np.ndarray[Any, Any]) -> JSON:
        if id(value) not in self._leaves:
            dtype = self._np_dtype(value)
            index = self._gatherer.add_bytes(
                self._name(), arrays.array_bytes(value), dtype=arrays.segment_dtype(value.dtype)
            )
            shape, order = list(value.shape), arrays.array_order(value)
            self._leaves[id(value)] = {"$ndarray": [index, dtype, shape, order]}
        return self._leaves[id(value)]

    def _tensor(self, tensor: torch.Tensor) -> JSON:
        if self._in_key:
            raise self._refusal(tensor, "is a key; use a name or a number")
        if id(tensor) not in self._leaves:
            reason = why_not(tensor)
            if reason is not None:
                raise self._refusal(tensor, reason)
            if vars(tensor):
                names = ", ".join(sorted(vars(tensor)))
                self.notes.append(f"{self._where()}: Python attributes not stored: {names}")
            strided = tensor.layout == torch.strided
            self._leaves[id(tensor)] = self._strided(tensor) if strided else self._sparse(tensor)
            self._kept.append(tensor)
        return self._leaves[id(tensor)]

    def _strided(self, tensor: torch.Tensor, *suffix: str) -> JSON:
        try:
            dtype_name(tensor.dtype)
        except UnsupportedObjectError:
            raise self._refusal(tensor, f"has dtype {tensor.dtype}; convert it") from None
        return {"$tensor": self._gatherer.add_tensor(self._name(*suffix), tensor)}

    def _sparse(self, tensor: torch.Tensor) -> JSON:
        layout = str(tensor.layout).removeprefix("torch.")
        if layout not in PART_NAMES:
            raise self._refusal(tensor, f"has layout {layout}; store to_dense()")
        coalesced = layout == "sparse_coo" and tensor.is_coalesced()
        parts = sparse_parts(tensor)
        try:
            # what loading would refuse must not be stored
            build_sparse(layout, parts, tuple(tensor.shape), coalesced=coalesced)
        except (RuntimeError, ValueError) as exc:
            raise self._refusal(tensor, f"breaks the rules of its layout: {exc}") from exc
        names = PART_NAMES[layout]
        leaves = [self._strided(p, name) for p, name in zip(parts, names, strict=True)]
        body = {"layout": layout, "size": list(tensor.shape)}
        body["parts"] = [leaf["$tensor"] for leaf in leaves]
        flags = {
            "coalesced": coalesced,
            "parameter": isinstance(tensor, torch.nn.Parameter),
            "requires_grad": tensor.requires_grad,
        }
        return {"$sparse": body | {name: True for name, flag in flags.items() if flag}}


def _advice(value: object) -> str:
    for base in (bool, int, float, complex, str, bytes, dict, list, tuple, set, frozenset):
        if isinstance(value, base):
            return f"is a subclass of {base.__name__}; convert it with {base.__name__}()"
    if isinstance(value, np.ndarray):
        return "is a subclass of numpy.ndarray; convert it with numpy.array()"
    if isinstance(value, np.generic):
        return "is of a subclass of a numpy scalar; convert it with item()"
    if callable(value):
        return "is code; store what it needs instead"
    return (
        "is none of the plain containers, scalars, arrays and tensors; "
        "convert it to one, or leave it out"
    )
