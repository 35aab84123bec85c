"""Taking objects apart and putting them together again, for the tests of objects."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from helpers import assert_same

from tallstore.objects import ObjectSource, assemble, build_tensor
from tallstore.specs import TensorSpec

__all__ = ["check", "filled", "read_all", "round_trip", "spec"]


def read_all(source: ObjectSource, *, piece: int = 1 << 20) -> list[torch.Tensor]:
    """Every segment's bytes, read in pieces."""
    segments = []
    for i, spec in enumerate(source.segments):
        # not zeros: padding must be written, too
        data = np.full(spec.nbytes, 0xEE, np.uint8)
        for start in range(0, spec.nbytes, piece):
            source.read(i, start, data[start : start + piece])
        segments.append(torch.from_numpy(data))
    return segments


def round_trip(obj: Any, *, piece: int = 1 << 20) -> Any:
    """Dismantle, write the tree as strict JSON, read everything back and assemble."""
    with ObjectSource(obj) as source:
        text = json.dumps(source.tree, allow_nan=False)
        text.encode("ascii")
        names = [spec.name for spec in source.tensors]
        assert len(set(names)) == len(names)
        "".join(names).encode()
        segments = read_all(source, piece=piece)
        tensors = [build_tensor(spec, segments[spec.segment]) for spec in source.tensors]
        return assemble(json.loads(text), tensors)


def check(obj: Any) -> None:
    assert_same(obj, round_trip(obj))


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of random bytes, NaNs of all sorts among them."""
    data = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        data &= 1
    steps = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(data.untyped_storage(), 0, shape, steps)


def spec(**changes: Any) -> TensorSpec:
    plain = TensorSpec(name="w", segment=0, dtype="float32", shape=(2, 3), stride=(3, 1))
    return replace(plain, **changes)
