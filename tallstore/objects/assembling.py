"""Putting an object together from its tree and its tensors."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tallstore.objects import arrays, scalars
from tallstore.objects.limits import MAX_DEPTH
from tallstore.objects.scalars import malformed
from tallstore.objects.tensors import PART_NAMES, build_sparse
from tallstore.sources.source import Bytes
from tallstore.specs import JSON
from tallstore.strictjson import newer

__all__ = ["assemble"]

_FLAGS = frozenset({"coalesced", "parameter", "requires_grad"})


def assemble(tree: JSON, tensors: Sequence[Any]) -> Any:
    """Rebuild the object that a tree describes.

    Parameters
    ----------
    tree
        As `ObjectSource.tree` has it; may be hostile.
    tensors
        The built tensors; item ``i`` takes the place of ``{"$tensor": i}`` as it is.

    Raises
    ------
    CorruptStoreError
        The tree is malformed. No code is run, and no more memory is taken than the tree and
        the tensors have.
    NewerFormatError
        It holds a kind of object that this version does not know.
    """
    try:
        return _Assembler(tensors).decode(tree, 0)
    except RecursionError as exc:
        raise malformed("it nests too deeply for Python's recursion limit") from exc


class _Assembler:
    """Walks one tree; like `Dismantler`, in two frames a level."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._tensors = tensors
        self._built: dict[str, Any] = {}
        self._decoders: dict[str, Callable[[Any], Any]] = {
            "$tensor": self._item,
            "$int": scalars.int_decode,
            "$float": scalars.float_decode,
            "$complex": scalars.complex_decode,
            "$size": scalars.size_decode,
            "$dtype": scalars.dtype_decode,
            "$device": scalars.device_decode,
            "$bytes": self._blob,
            "$str": lambda body: scalars.utf8_decode(self._blob(body)),
            "$scalar": self._scalar,
            "$ndarray": lambda body: self._once("a", body, self._array),
            "$sparse": lambda body: self._once("s", body, self._sparse),
        }

    def decode(self, tree: Any, depth: int) -> Any:
        kind = type(tree)
        if kind is str or kind is int or kind is bool or tree is None:
            return tree
        if kind is float and math.isfinite(tree):
            return tree
        if kind is list:
            return self._list(tree, depth)
        if kind is not dict:
            raise malformed(f"it holds a {kind.__name__} that JSON does not have")
        tag = _tag(tree)
        if tag is None:
            return self._mapping({}, tree, depth)
        body = tree[tag]
        if tag == "$odict":
            return self._mapping(OrderedDict(), body, depth, tree)
        if tag == "$dict":
            if type(body) is not list:
                raise malformed(f"a list is expected, not {type(body).__name__}")
            return self._mapping({}, body, depth)
        if tag == "$tuple":
            return tuple(self._list(body, depth))
        if tag == "$set":
            return _unique(set, self._list(body, depth))
        if tag == "$frozenset":
            return _unique(frozenset, self._list(body, depth))
        decoder = self._decoders.get(tag)
        if decoder is None:
            raise newer("the stored object's tree", f"a tag {tag!r:.80}", _tags(self._decoders))
        return decoder(body)

    # -- containers

    def _list(self, body: Any, depth: int) -> list[Any]:
        _deeper(depth)
        if type(body) is not list:
            raise malformed(f"a list is expected, not {type(body).__name__}")
        result = []
        for item in body:
            result.append(self.decode(item, depth + 1))
        return result

    def _mapping(
        self, result: dict[Any, Any], body: Any, depth: int, tagged: dict[str, Any] | None = None
    ) -> dict[Any, Any]:
        _deeper(depth)
        for key, item in self._entries(body, depth):
            try:
                known = key in result
            except TypeError as exc:
                raise malformed(f"a key cannot be hashed ({exc})") from exc
            if known:
                raise malformed("a key is given twice")
            result[key] = self.decode(item, depth + 1)
        if tagged is not None and "$metadata" in tagged:
            result._metadata = self.decode(tagged["$metadata"], depth + 1)  # type: ignore[attr-defined]
        return result

    def _entries(self, body: Any, depth: int) -> Iterator[tuple[Any, Any]]:
        if type(body) is dict:
            if _tag(body) is not None:
                raise malformed("a dict's items have a tag for a key")
            yield from body.items()
        elif type(body) is list and len(body) % 2 == 0:
            for i in range(0, len(body), 2):
                yield self.decode(body[i], depth + 1), body[i + 1]
        else:
            raise malformed("a dict's keys and values do not pair up")

    # -- leaves

    def _item(self, index: Any) -> Any:
        if type(index) is not int or not 0 <= index < len(self._tensors):
            raise malformed(
                f"{index!r:.80} is not the index of one of {len(self._tensors)} tensors"
            )
        return self._tensors[index]

    def _raw(self, index: Any) -> Bytes:
        tensor = self._item(index)
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.dtype != torch.uint8
            or tensor.layout != torch.strided
            or tensor.dim() != 1
        ):
            raise malformed(f"tensor {index} is not a run of bytes")
        array: Bytes = tensor.detach().cpu().contiguous().numpy()
        return array

    def _blob(self, body: Any) -> bytes:
        return scalars.base64_decode(body) if type(body) is str else self._raw(body).tobytes()

    def _scalar(self, body: Any) -> Any:
        if type(body) is not list or len(body) != 2:
            raise malformed("$scalar is not a pair")
        data = self._blob(body[1])
        if body[0] == "S":
            return np.bytes_(data)
        if body[0] == "U":
            return np.str_(scalars.utf8_decode(data))
        return arrays.scalar_from_bytes(data, arrays.dtype_from_json(body[0]))

    def _once(self, kind: str, body: Any, build: Callable[[Any], Any]) -> Any:
        # the same description names the same tensors: it is the same object met again
        try:
            key = kind + json.dumps(body)
        except (TypeError, ValueError, RecursionError) as exc:
            raise malformed(f"an array is described by what is not JSON ({exc})") from exc
        if key not in self._built:
            self._built[key] = build(body)
        return self._built[key]

    def _array(self, body: Any) -> Any:
        if type(body) is not list or len(body) != 4:
            raise malformed("$ndarray has not four items")
        index, dtype, shape, order = body
        built = arrays.dtype_from_json(dtype)
        return arrays.array_from_bytes(self._raw(index), built, shape, order)

    def _sparse(self, body: Any) -> torch.Tensor:
        required = {"layout", "size", "parts"}
        if type(body) is not dict or not required <= set(body) <= required | _FLAGS:
            raise malformed("$sparse lacks a field or has an unknown one")
        if any(body[name] is not True for name in _FLAGS & set(body)):
            raise malformed("a flag of $sparse is not true")
        layout, indices = body["layout"], body["parts"]
        if type(layout) is not str or type(indices) is not list:
            raise malformed("$sparse has a field of a wrong type")
        if len(indices) != len(PART_NAMES.get(layout, ())):
            raise malformed(f"$sparse has {len(indices)} parts for the layout {layout!r:.80}")
        parts = tuple(self._part(index) for index in indices)
        size = scalars.size_decode(body["size"])
        try:
            tensor = build_sparse(layout, parts, size, coalesced="coalesced" in body)
            if "parameter" in body:
                return torch.nn.Parameter(tensor, requires_grad="requires_grad" in body)
            return tensor.requires_grad_() if "requires_grad" in body else tensor
        except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as exc:
            raise malformed(f"a sparse tensor cannot be rebuilt ({exc})") from exc

    def _part(self, index: Any) -> torch.Tensor:
        tensor = self._item(index)
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise malformed(f"tensor {index} is not a part of a sparse tensor")
        return tensor


def _tags(decoders: Iterable[str]) -> list[str]:
    return ["$odict", "$dict", "$tuple", "$set", "$frozenset", *decoders]


def _tag(tree: dict[Any, Any]) -> str | None:
    """Return the key that begins with ``$``, which must be the only one."""
    tag = None
    for key in tree:
        if type(key) is not str:
            raise malformed("a key is not a string")
        if key.startswith("$") and key != "$metadata":
            tag = key
        elif key == "$metadata" and "$odict" not in tree:
            raise malformed("$metadata without $odict")
    expected = 2 if tag == "$odict" and "$metadata" in tree else 1
    if tag is not None and len(tree) != expected:
        raise malformed(f"other keys beside the tag {tag!r:.80}")
    return tag


def _unique(kind: type, items: list[Any]) -> Any:
    try:
        result = kind(items)
    except TypeError as exc:
        raise malformed(f"a set's element cannot be hashed ({exc})") from exc
    if len(result) != len(items):
        raise malformed("a set holds an element twice")
    return result


def _deeper(depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise malformed(f"containers nest over {MAX_DEPTH} deep")
