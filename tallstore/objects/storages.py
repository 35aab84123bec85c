"""Segments: the used range of each torch storage, and the bytes of what is no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from tallstore.dtypes import itemsize
from tallstore.sources.source import Bytes
from tallstore.specs import SegmentSpec, TensorSpec

__all__ = ["Gathered", "Gatherer", "Piece"]


class Piece(Protocol):
    """The bytes of one segment."""

    def read(self, start: int, out: Bytes) -> None:
        """Copy the bytes from `start` on into `out`."""
        ...


@dataclass(frozen=True, slots=True)
class _ArrayPiece:
    data: Bytes

    def read(self, start: int, out: Bytes) -> None:
        np.copyto(out, self.data[start : start + out.size])


@dataclass(frozen=True, slots=True)
class _StoragePiece:
    storage: torch.UntypedStorage
    first: int

    def read(self, start: int, out: Bytes) -> None:
        begin = self.first + start
        # beyond the storage's end lies the padding of a segment of mixed dtypes
        held = max(0, min(out.size, self.storage.nbytes() - begin))
        out[held:] = 0
        if not held:
            return
        whole = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        part = whole.set_(self.storage)[begin : begin + held]
        if part.device.type == "cpu":
            # One plain memcpy: torch's copy_ waits for a pool of threads at every call, and
            # numpy() would forbid the owner to resize its storage ever after.
            np.copyto(out[:held], np.from_dlpack(part))
        else:
            torch.from_numpy(out[:held]).copy_(part)


@dataclass(slots=True)
class _Group:
    storage: torch.UntypedStorage
    members: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The finished description, and where the bytes are."""

    tensors: tuple[TensorSpec, ...]
    segments: tuple[SegmentSpec, ...]
    pieces: tuple[Piece, ...]


class Gatherer:
    """Collects tensors, then groups them by the storage that they share."""

    def __init__(self) -> None:
        # a spec's `segment` indexes _sources, and its offset counts from the storage's start
        self._tensors: list[TensorSpec] = []
        self._sources: list[_Group | tuple[SegmentSpec, Piece]] = []
        self._groups: dict[int, int] = {}

    def add_tensor(self, name: str, tensor: torch.Tensor) -> int:
        """Take a strided tensor in; return its index."""
        storage = tensor.untyped_storage()
        # the address of the storage itself, not of its memory: storages of no bytes have none
        segment = self._groups.setdefault(storage._cdata, len(self._sources))
        if segment == len(self._sources):
            self._sources.append(_Group(storage))
        source = self._sources[segment]
        assert isinstance(source, _Group)
        source.members.append(len(self._tensors))
        return self._append(
            TensorSpec(
                name=name,
                segment=segment,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                stride=tuple(tensor.stride()),
                offset=int(tensor.storage_offset()),
                conj=tensor.is_conj(),
                neg=tensor.is_neg(),
                parameter=isinstance(tensor, torch.nn.Parameter),
                requires_grad=tensor.requires_grad,
            )
        )

    def add_bytes(self, name: str, data: Bytes, *, dtype: str = "uint8") -> int:
        """Take bytes in as a uint8 tensor on a segment of `dtype`; return its index."""
        segment = SegmentSpec(dtype, data.size // itemsize(dtype))
        self._sources.append((segment, _ArrayPiece(data)))
        return self._append(
            TensorSpec(
                name=name,
                segment=len(self._sources) - 1,
                dtype="uint8",
                shape=(data.size,),
                stride=(1,),
            )
        )

    def _append(self, spec: TensorSpec) -> int:
        self._tensors.append(spec)
        return len(self._tensors) - 1

    def finish(self) -> Gathered:
        """Cut every storage down to the range that is used."""
        tensors = list(self._tensors)
        segments: list[SegmentSpec] = []
        pieces: list[Piece] = []
        for source in self._sources:
            if not isinstance(source, _Group):
                segments.append(source[0])
                pieces.append(source[1])
                continue
            first, segment = _used_range([tensors[i] for i in source.members])
            for i in source.members:
                spec = tensors[i]
                offset = spec.offset - first // itemsize(spec.dtype) if spec.numel else 0
                tensors[i] = replace(spec, offset=offset)
            segments.append(segment)
            pieces.append(_StoragePiece(source.storage, first))
        return Gathered(tuple(tensors), tuple(segments), tuple(pieces))


def _used_range(specs: Sequence[TensorSpec]) -> tuple[int, SegmentSpec]:
    """Return the first byte used, aligned, and the segment."""
    used = [spec for spec in specs if spec.numel]
    if not used:
        return 0, SegmentSpec(specs[0].dtype, 0)
    widest = max(itemsize(spec.dtype) for spec in used)
    first = min(spec.offset * itemsize(spec.dtype) for spec in used) // widest * widest
    end = max(_end(spec) for spec in used)
    if len({spec.dtype for spec in used}) == 1:
        return first, SegmentSpec(used[0].dtype, (end - first) // widest)
    return first, SegmentSpec("uint8", -(-(end - first) // widest) * widest)


def _end(spec: TensorSpec) -> int:
    last = sum((n - 1) * step for n, step in zip(spec.shape, spec.stride, strict=True))
    return (spec.offset + last + 1) * itemsize(spec.dtype)
