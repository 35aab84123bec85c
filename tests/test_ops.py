"""The operations on codes: every backend gives the same bits, and what does not fit is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import CPU_BACKENDS
from zoo import bits, run_child

from tallstore.errors import DeviceError, MismatchError, OptionError
from tallstore.ops import TALL_LEVELS, choose_backend, reconstruct

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = "triton"
BACKENDS = [*((name, "cpu") for name in (*CPU_BACKENDS, "reference")), (FAST, DEVICE)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_planes(count: int, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, -(-n // 8)), generator=generator, dtype=torch.uint8)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4000),
    count=st.integers(0, 4),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    vector=st.booleans(),
    per_block=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_backend_gives_the_same_bits(
    n: int,
    count: int,
    dtypes: tuple[torch.dtype, ...],
    vector: bool,
    per_block: bool,
    seed: int,
) -> None:
    base = draw(n, dtypes[0], seed)
    step = draw(n, dtypes[1], seed + 1) if vector else None
    planes = draw_planes(count, n, seed + 2) if count else None
    table = draw(3 << count, torch.float32, seed + 3).view(3, -1)
    blocks = -(-n // 1024)
    rows = torch.tensor(np.random.default_rng(seed).integers(0, 3, blocks), dtype=torch.int32)
    found = []
    for backend, device in BACKENDS:
        out = torch.full((n,), float("nan"), dtype=dtypes[2], device=device)
        given = [None if t is None else t.to(device) for t in (base, planes, step, table)]
        index = rows.to(device) if per_block else None
        reconstruct(*given, out, rows=index, backend=backend)  # type: ignore[arg-type]
        found.append(bits(out.cpu()))
    assert len(set(found)) == 1


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_than_a_step_on_the_cpu(dtype: torch.dtype, count: int, backend: str) -> None:
    n = 3 * (1 << 16) + 77
    base, step = draw(n, dtype, 1), draw(n, dtype, 2)
    planes = draw_planes(count, n + 800, 3)[:, 100:]
    table = draw(1 << count, torch.float32, 4).tolist()
    for vector in (step, None):
        for into in (torch.float32, torch.bfloat16, torch.float16):
            out, wanted = torch.empty(n, dtype=into), torch.empty(n, dtype=into)
            reconstruct(base, planes, vector, table, out, backend=backend)
            reconstruct(base, planes, vector, table, wanted, backend="reference")
            assert bits(out) == bits(wanted)
    held = base.clone()
    reconstruct(held, planes, step, table, held, backend=backend)
    reconstruct(base, planes, step, table, base, backend="reference")
    assert bits(held) == bits(base)


def test_a_tall_mask_in_place() -> None:
    base, vector, planes = draw(3000, torch.bfloat16, 1), draw(3000, torch.bfloat16, 2), None
    planes = draw_planes(1, 3000, 3)
    wanted = torch.empty_like(base)
    reconstruct(base, planes, vector, TALL_LEVELS, wanted, backend="reference")
    for backend in (*CPU_BACKENDS, FAST):
        device = DEVICE if backend == FAST else "cpu"
        out = base.clone().to(device)
        reconstruct(out, planes.to(device), vector.to(device), TALL_LEVELS, out, backend=backend)
        assert bits(out.cpu()) == bits(wanted)


def valid() -> dict[str, Any]:
    return {
        "base": torch.ones(2048),
        "planes": torch.zeros(2, 256, dtype=torch.uint8),
        "vector": torch.ones(2048),
        "levels": torch.ones(3, 4),
        "out": torch.full((2048,), 7.0),
        "rows": torch.zeros(2, dtype=torch.int32),
    }


def misaligned(n: int) -> torch.Tensor:
    raw = np.zeros(4 * n + 1, np.uint8)[1:]
    return torch.from_numpy(np.ndarray((n,), np.float32, raw.data))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.ones(2048).double()}, "base: dtype torch.float64 has no codes"),
        ({"vector": torch.ones(2047)}, r"vector: shape \(2047,\), a contiguous \(2048,\)"),
        ({"out": torch.full((4096,), 7.0)[::2]}, "out: shape"),
        ({"out": torch.full((2, 1024), 7.0)}, r"out: shape \(2, 1024\)"),
        (
            {"vector": torch.ones(2048, device="meta")},
            "several devices: base on cpu, planes on cpu",
        ),
        (
            {"planes": torch.zeros(2, 255, dtype=torch.uint8)},
            "planes of 255 bytes for 2048 weights",
        ),
        (
            {"planes": torch.zeros(2, 256, dtype=torch.int8)},
            r"planes: torch.int8, shape \(2, 256\)",
        ),
        ({"planes": torch.zeros(256, dtype=torch.uint8)}, "uint8, .K, bytes., is needed"),
        ({"planes": torch.zeros(5, 256, dtype=torch.uint8)}, "5 planes; 1 to 4 are possible"),
        ({"planes": torch.zeros(0, 256, dtype=torch.uint8)}, "0 planes; 1 to 4 are possible"),
        ({"planes": torch.zeros(2, 512, dtype=torch.uint8)[:, ::2]}, "one after the other"),
        ({"levels": torch.ones(3, 2)}, r"levels: torch.float32, shape \(3, 2\)"),
        ({"levels": torch.ones(3, 4).double()}, "levels: torch.float64"),
        ({"levels": (1.0, 2.0)}, "2 levels for codes of 4 values"),
        ({"rows": torch.zeros(1, dtype=torch.int32)}, r"at least \(2,\), is needed"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, "rows: torch.int64"),
        ({"rows": torch.tensor([0, 3], dtype=torch.int32)}, "outside the 3 of the levels"),
        ({"rows": torch.tensor([-1, 0], dtype=torch.int32)}, "outside the 3 of the levels"),
        ({"vector": misaligned(2048)}, "vector: starts at an address"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_what_does_not_fit_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, backend: str | None
) -> None:
    given = valid() | change
    with pytest.raises(MismatchError, match=message):
        reconstruct(**given, backend=backend)
    if given["out"].numel() == 2048:
        assert (given["out"] == 7.0).all()


def test_backends_that_cannot_run_there() -> None:
    cpu, meta, cuda = torch.device("cpu"), torch.device("meta"), torch.device("cuda")
    assert choose_backend(cpu, None) == choose_backend(cpu, "cpu") == "cpu"
    assert choose_backend(cuda, None) == choose_backend(cuda, "triton") == "triton"
    assert choose_backend(meta, "reference") == "reference"
    with pytest.raises(
        OptionError, match="backend='cuda': it is one of cpu, compiled, triton, reference"
    ):
        choose_backend(cpu, "cuda")
    with pytest.raises(DeviceError, match="meta: only CPU and CUDA tensors have fast paths"):
        choose_backend(meta, None)
    with pytest.raises(DeviceError, match="backend='cpu': the tensors are on cuda"):
        choose_backend(cuda, "cpu")
    with pytest.raises(DeviceError, match="backend='triton': the tensors are on meta"):
        choose_backend(meta, "triton")


def test_triton_on_the_cpu_takes_its_interpreter() -> None:
    run_child("""
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from tallstore.errors import DeviceError
from tallstore.ops import reconstruct
try:
    reconstruct(torch.ones(8), None, None, (1.0,), torch.ones(8), backend="triton")
except DeviceError as exc:
    assert "TRITON_INTERPRET=1" in str(exc), exc
else:
    raise AssertionError("not refused")
""")


def test_a_missing_triton_is_named_and_nothing_slower_steps_in() -> None:
    run_child("""
import sys
sys.modules["triton"] = None
import torch
from tallstore.errors import DeviceError
from tallstore.ops import choose_backend, reconstruct
out = torch.zeros(8)
reconstruct(torch.ones(8), None, None, (1.0,), out)
assert out.sum() == 8
try:
    choose_backend(torch.device("cuda"), None)
except DeviceError as exc:
    assert "pip install 'tallstore[gpu]'" in str(exc) and "backend='reference'" in str(exc), exc
else:
    raise AssertionError("not refused")
""")


def test_a_triton_that_cannot_start_is_told_before_anything_is_launched() -> None:
    run_child("""
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from tallstore.errors import DeviceError
from tallstore.kernels import common
from tallstore.ops import choose_backend
def fail():
    raise RuntimeError("Failed to find C compiler")
common.start_driver = fail
try:
    choose_backend(torch.device("cuda"), None)
except DeviceError as exc:
    assert "Failed to find C compiler" in str(exc) and "gcc" in str(exc), exc
else:
    raise AssertionError("not refused")
if not torch.cuda.is_available():
    import importlib
    importlib.reload(common)
    try:
        choose_backend(torch.device("cuda"), None)
    except DeviceError as exc:
        assert "Triton cannot start" in str(exc), exc
    else:
        raise AssertionError("not refused")
""")


def test_weights_take_no_room_of_their_own() -> None:
    """Nothing of the model's size is allocated by the way."""
    n = 1 << 22
    base, vector = torch.zeros(n), torch.zeros(n)
    planes, out = torch.zeros(1, n // 8, dtype=torch.uint8), torch.empty(n)
    import tracemalloc

    # What is compiled at the first call takes room too.
    reconstruct(base, planes, vector, TALL_LEVELS, out)
    tracemalloc.start()
    reconstruct(base, planes, vector, TALL_LEVELS, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * n / 2


def test_none_is_no_weight() -> None:
    for backend, count in itertools.product((None, "reference", FAST), (0, 1)):
        planes = torch.zeros(1, 0, dtype=torch.uint8, device=DEVICE) if count else None
        none = torch.ones(0, device=DEVICE)
        reconstruct(none, planes, None, (1.0,) * (1 << count), none.clone(), backend=backend)
