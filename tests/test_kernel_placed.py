"""`kernels/placed.py` and its operation: the plain form's bits, in tensors that lie anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from kernel_helpers import DEVICE, FLOATS, TRITON, draw, draw_bytes, poison, poisoned, same
from ptx import CUDA, Case, compile_cases

pytest.importorskip("triton")

from tallstore.errors import MismatchError
from tallstore.kernels import reference
from tallstore.layout import BLOCK
from tallstore.ops import Places, place, reconstruct_placed

BACKENDS = ["triton", "reference"] if DEVICE == "cuda" else ["triton", "cpu", "reference"]
#: (first weight, weights) of runs, with a block of nobody's and one cut short between them.
RUNS = ((0, BLOCK + 5), (3 * BLOCK, 700), (4 * BLOCK, 2 * BLOCK), (6 * BLOCK, 1))
WEIGHTS = 7 * BLOCK


def outs(dtype: torch.dtype, *, shift: int = 0) -> list[torch.Tensor]:
    """A tensor for each run, `shift` elements into poisoned memory that reaches past its end."""
    return [poison(n + shift + 9, dtype=dtype)[shift : shift + n] for _, n in RUNS]


def placed(tensors: Sequence[torch.Tensor], *, alone: bool = False) -> Places:
    firsts = [first for first, _ in RUNS]
    return place(list(zip(firsts, tensors, strict=True)), WEIGHTS, alone=alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_plain_forms_bits(backend: str, count: int, alone: bool) -> None:
    planes = draw_bytes(count, WEIGHTS // 8)
    kept = planes
    if alone:
        blocks = [(first // 8, -(-(first + n) // BLOCK) * BLOCK // 8) for first, n in RUNS]
        kept = torch.cat([planes[:, start:stop] for start, stop in blocks], dim=1)
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(len(RUNS) + 1, 1 << count, generator=generator).to(DEVICE)
    for base_dtype, vector_dtype, dtype in itertools.product(FLOATS, (None, *FLOATS), FLOATS):
        base = draw(WEIGHTS, base_dtype)
        vector = None if vector_dtype is None else draw(WEIGHTS, vector_dtype, seed=5)
        for shift in (0, 3):
            found = outs(dtype, shift=shift)
            places = placed(found, alone=alone)
            assert places.aligned == (shift == 0)
            reconstruct_placed(base, kept, vector, table, places, backend=backend)
            for row, ((first, n), out) in enumerate(zip(RUNS, found, strict=True)):
                at = slice(first, first + n)
                wanted = reference.reconstruct(
                    base[at],
                    planes[:, first // 8 : (first + n + 7) // 8],
                    None if vector is None else vector[at],
                    table[row].tolist(),
                    dtype,
                )
                assert same(out, wanted), (base_dtype, vector_dtype, dtype, shift, row)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_else_is_written(backend: str) -> None:
    memory = [poison(n + 18, dtype=torch.bfloat16) for _, n in RUNS]
    found = [held[9 : 9 + n] for held, (_, n) in zip(memory, RUNS, strict=True)]
    base, planes = draw(WEIGHTS, torch.bfloat16), draw_bytes(1, WEIGHTS // 8)
    table = torch.ones(len(RUNS) + 1, 2, device=DEVICE)
    reconstruct_placed(base, planes, None, table, placed(found), backend=backend)
    for held, (_, n) in zip(memory, RUNS, strict=True):
        assert poisoned(held[:9]) and poisoned(held[9 + n :])


def test_refusals() -> None:
    one = torch.empty(BLOCK, device=DEVICE)
    with pytest.raises(MismatchError, match="blocks of 1024 of its own"):
        place([(0, one), (0, one)], WEIGHTS)
    with pytest.raises(MismatchError, match="blocks of 1024 of its own"):
        place([(8, one)], WEIGHTS)
    with pytest.raises(MismatchError, match="blocks of 1024 of its own"):
        place([(WEIGHTS, one)], WEIGHTS)
    with pytest.raises(MismatchError, match=r"float16, the first is torch\.float32"):
        place([(0, one), (BLOCK, one.half())], WEIGHTS)
    places = place([(0, one)], WEIGHTS)
    base, planes = draw(WEIGHTS, torch.float32), draw_bytes(1, WEIGHTS // 8)
    with pytest.raises(MismatchError, match="1 rows for 1 runs and one"):
        reconstruct_placed(base, planes, None, torch.ones(1, 2, device=DEVICE), places)
    with pytest.raises(MismatchError, match="planes of"):
        reconstruct_placed(base, planes[:, :9], None, torch.ones(2, 2, device=DEVICE), places)


def test_sixteen_bytes_at_once_for_every_architecture() -> None:
    cases = [
        Case(
            module="tallstore.kernels.placed",
            kernel="placed_kernel",
            types={
                **dict.fromkeys(("base", "vector"), f"*{TRITON[dtype]}"),
                "planes": "*u8",
                "plane_stride": "i64",
                "rows": "*i32",
                "table": "*fp32",
                "addresses": "*i64",
                "stops": "*i64",
                "blocks": "*i32",
            },
            constants={
                "PLANES": 1,
                "VECTOR": True,
                "LISTED": listed,
                "ALIGNED": True,
                "BLOCK": BLOCK,
                "LANES": 16 // dtype.itemsize,
                "DTYPE": f"tl.{str(dtype).removeprefix('torch.')}",
                "SOFT": False,
            },
        )
        for dtype in (torch.bfloat16, torch.float32)
        for listed in (False, True)
    ]
    for case, built in zip(cases, compile_cases(cases), strict=True):
        assert [one.target for one in built] == list(CUDA)
        rounds = BLOCK // (128 * case.constants["LANES"])
        for one in built:
            assert one.spills == 0
            assert one.count(r"ld\.global\.v4\.b32") >= 2 * rounds, one.target
            assert one.count(r"st\.global\.v4\.b32") >= rounds, one.target
            assert not one.count(r"fma\.rn"), one.target
