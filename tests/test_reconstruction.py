"""Reconstruction on the CPU is the plain formula, to the bit."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import bits

from tallstore.errors import MismatchError
from tallstore.ops import TALL_LEVELS, reconstruct

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def reference() -> ModuleType:
    import importlib

    return importlib.import_module("tallstore.kernels.reference")


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 6e-8, -6e-8, 65504.0, -1.0, 1.0e38, 1e-4]
SIZES = [0, 1, 7, 8, 9, 63, 1023, 1024, 1025, (1 << 17) - 1, 1 << 17, (1 << 17) + 9]


def draw_floats(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=draw)
    special = torch.tensor(SPECIAL)
    where = torch.rand(count, generator=draw) < 0.5
    chosen = special[torch.randint(len(SPECIAL), (count,), generator=draw)]
    return torch.where(where, chosen, values).to(dtype)


def check_reconstruct(
    count: int, k: int, dtypes: tuple[torch.dtype, ...], vector: bool, levels: Any, seed: int = 0
) -> None:
    base_dtype, vector_dtype, out_dtype = dtypes
    draw = torch.Generator().manual_seed(seed + 17)
    base = draw_floats(count, base_dtype, seed)
    # Levels and vectors whose products stay finite: 0 * inf is for the codes never to hold.
    step = draw_floats(count, vector_dtype, seed + 1) if vector else None
    if step is not None:
        step = torch.where(step.isfinite(), step, torch.ones_like(step))
    planes = torch.randint(256, (k, (count + 7) // 8 + 3), generator=draw, dtype=torch.uint8)
    given_bytes = [bits(t) for t in (base, planes, step) if t is not None]
    out = torch.full((count,), float("nan"), dtype=out_dtype)
    reconstruct(base, planes, step, levels, out)
    expected = reference().reconstruct(base, planes, step, levels, out_dtype)
    assert bits(out) == bits(expected)
    assert [bits(t) for t in (base, planes, step) if t is not None] == given_bytes
    if out_dtype == base_dtype:
        reconstruct(base, planes, step, levels, base)
        assert bits(base) == bits(expected), "in place"


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS.values(), repeat=3)), ids=str)
@pytest.mark.parametrize("count", [9, 1025, (1 << 17) + 9])
def test_masks_reconstruct_as_the_reference(count: int, dtypes: tuple[torch.dtype, ...]) -> None:
    check_reconstruct(count, 1, dtypes, True, TALL_LEVELS)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("vector", [True, False], ids=["vector", "ones"])
def test_codes_reconstruct_as_the_reference(count: int, k: int, vector: bool) -> None:
    levels = torch.linspace(-1.3, 0.9, 1 << k).tolist()
    for dtype in FLOATS.values():
        check_reconstruct(count, k, (dtype, dtype, dtype), vector, levels, seed=count + k)
    check_reconstruct(count, k, (torch.float32, torch.bfloat16, torch.float16), vector, levels)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 66),
    st.integers(1, 4),
    st.tuples(*[st.sampled_from(list(FLOATS.values()))] * 3),
    st.booleans(),
    st.integers(0, 10**6),
    st.data(),
)
def test_small_reconstructions(
    count: int,
    k: int,
    dtypes: tuple[torch.dtype, ...],
    vector: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    level = st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.0, 1e-30, 0.1])
    levels = data.draw(st.lists(level, min_size=1 << k, max_size=1 << k))
    check_reconstruct(count, k, dtypes, vector, levels, seed)


def test_no_planes_is_the_base() -> None:
    for dtypes in itertools.product(FLOATS.values(), repeat=2):
        base = draw_floats(1025, dtypes[0], 3)
        out = torch.empty(1025, dtype=dtypes[1])
        reconstruct(base, None, None, (1.0,), out)
        assert bits(out) == bits(reference().reconstruct(base, None, None, (1.0,), dtypes[1]))


def test_reconstruct_refuses_what_does_not_fit() -> None:
    base, plane = torch.ones(16), torch.zeros(1, 2, dtype=torch.uint8)
    out = torch.full((16,), 7.0)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((base, plane, torch.ones(15), TALL_LEVELS, out), r"vector: shape \(15,\)"),
        ((base, plane, base, (0.0, 1.0, 2.0), out), "3 levels for codes of 2 values"),
        ((base, plane[:, :1], base, TALL_LEVELS, out), "planes of 1 bytes for 16 weights"),
        ((base.double(), plane, base, TALL_LEVELS, out), "base: dtype torch.float64"),
        ((base, plane, base, TALL_LEVELS, torch.full((32,), 7.0)[::2]), "out: shape"),
        ((base, plane, base.to("meta"), TALL_LEVELS, out), "vector on meta"),
    ]
    for arguments, message in cases:
        with pytest.raises(MismatchError, match=message):
            reconstruct(*arguments)
    assert torch.equal(out, torch.full((16,), 7.0))


def test_the_reference_is_the_formula() -> None:
    """The yardstick itself, one weight at a time in Python and numpy scalars."""
    base = torch.tensor([1.0, -0.0, 0.1, 5.0, 1e-45])
    vector = torch.tensor([0.5, -2.0, 0.2, -5.0, 1e-45])
    planes = torch.tensor([[0b01101], [0b10110]], dtype=torch.uint8)
    levels = (0.0, 1.0, -0.5, 0.3)
    codes = [1, 2, 3, 1, 2]
    assert reference().codes(planes, 5).tolist() == codes
    found = reference().reconstruct(base, planes, vector, levels, torch.float32)
    for i, code in enumerate(codes):
        step = np.float32(levels[code]) * np.float32(vector[i].item())
        assert found[i].item() == np.float32(base[i].item()) + step
