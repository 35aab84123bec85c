"""`kernels/reconstruct.py` against the plain form, to the bit, and what compilers make of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, FLOATS, TRITON, draw, nans, same, vast
from ptx import CUDA, Case, Compiled, compile_cases

pytest.importorskip("triton")

from tallstore.kernels import reference
from tallstore.kernels.common import BLOCK, INTERPRETED, Shape
from tallstore.kernels.encode_levels import encode_levels
from tallstore.kernels.reconstruct import reconstruct
from tallstore.kernels.unpack import unpack


def draw_planes(count: int, n: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (count, (n + 7) // 8)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(DEVICE)


def draw_table(rows: int, count: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1 << count, generator=generator).to(DEVICE)


def expected(
    base: torch.Tensor,
    planes: torch.Tensor | None,
    vector: torch.Tensor | None,
    table: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    levels = [1.0] if table is None else table[0].tolist()
    return reference.reconstruct(base, planes, vector, levels, dtype)


@pytest.mark.parametrize("count", range(5))
def test_every_mix_of_dtypes(count: int) -> None:
    n = BLOCK + 13
    planes = draw_planes(count, n) if count else None
    table = draw_table(1, count) if count else None
    for base_dtype, vector_dtype, dtype in itertools.product(FLOATS, (None, *FLOATS), FLOATS):
        base = draw(n, base_dtype)
        vector = None if vector_dtype is None else draw(n, vector_dtype, seed=5)
        out = nans(n, dtype)
        reconstruct(base, planes, vector, table, out)
        wanted = expected(base, planes, vector, table, dtype)
        assert same(out, wanted), (base_dtype, vector_dtype, dtype)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 63, 100, 1023, 1024, 1025, 2047, 2048, 3000])
@pytest.mark.parametrize("shape", [Shape(), Shape(blocks=2), Shape(blocks=4, warps=8)])
def test_sizes_around_the_block(n: int, shape: Shape) -> None:
    for count, dtype in ((1, torch.bfloat16), (3, torch.float32)):
        base, vector = draw(n, dtype), draw(n, dtype, seed=5)
        planes, table = draw_planes(count, n), draw_table(1, count)
        whole = torch.full((n + 2 * BLOCK,), float("nan"), dtype=dtype, device=DEVICE)
        out = whole[BLOCK : BLOCK + n]
        reconstruct(base, planes, vector, table, out, shape=shape)
        assert same(out, expected(base, planes, vector, table, dtype))
        assert whole[:BLOCK].isnan().all() and whole[BLOCK + n :].isnan().all()


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 2500),
    offset=st.integers(0, 9),
    count=st.integers(1, 4),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_views_at_odd_offsets(
    n: int, offset: int, count: int, dtype: torch.dtype, seed: int
) -> None:
    base, vector = (
        draw(n + offset, dtype, seed)[offset:],
        draw(n + offset, dtype, seed + 1)[offset:],
    )
    planes = draw_planes(count, n + 8 * offset, seed)[:, offset:]
    table = draw_table(1, count, seed)
    out = nans(n + offset, dtype)[offset:]
    reconstruct(base, planes, vector, table, out)
    assert same(out, expected(base, planes, vector, table, dtype))


def test_each_block_has_its_row_of_levels() -> None:
    n = 5 * BLOCK + 77
    base, vector = draw(n, torch.float32), draw(n, torch.bfloat16, seed=5)
    rows = torch.tensor([2, 0, 1, 1, 2, 0], dtype=torch.int32, device=DEVICE)
    for count, shape in itertools.product((1, 2, 4), (Shape(), Shape(blocks=4))):
        planes, table = draw_planes(count, n), draw_table(3, count)
        out = nans(n, torch.float32)
        reconstruct(base, planes, vector, table, out, rows=rows, shape=shape)
        for block, row in enumerate(rows.tolist()):
            low, high = block * BLOCK, min((block + 1) * BLOCK, n)
            part = planes[:, low // 8 : (high + 7) // 8]
            wanted = expected(
                base[low:high], part, vector[low:high], table[row : row + 1], torch.float32
            )
            assert same(out[low:high], wanted), (count, shape, block)


def test_in_place_and_a_part_only() -> None:
    n = 6 * BLOCK
    base, vector = draw(n, torch.bfloat16), draw(n, torch.bfloat16, seed=5)
    planes, table = draw_planes(2, n), draw_table(1, 2)
    wanted = expected(base, planes, vector, table, torch.bfloat16)
    start, stop = 2 * BLOCK, 4 * BLOCK + 100
    out = base.clone()
    reconstruct(out, planes, vector, table, out, start=start, stop=stop)
    assert same(out[start:stop], wanted[start:stop])
    assert same(out[:start], base[:start]) and same(out[stop:], base[stop:])
    reconstruct(base, planes, vector, table, base)
    assert same(base, wanted)


def test_nothing_to_do_writes_nothing() -> None:
    out = nans(BLOCK, torch.float32)
    reconstruct(out, None, None, None, out, start=BLOCK)
    assert out.isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_rounding_at_halves_overflow_and_nan() -> None:
    words = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x00008000,
         0x80018000, 0x7F800000, 0x33800000, 0x477FF000, 0x477FEFFF, 0x33000001, 0x33000000]
    ).to(torch.int32)  # fmt: skip
    base = words.view(torch.float32).to(DEVICE)
    for dtype in FLOATS:
        out = nans(base.numel(), dtype)
        reconstruct(base, None, None, None, out)
        assert same(out, base.to(dtype)), dtype
        lost = torch.full((3,), float("nan"), device=DEVICE)
        into = torch.zeros(3, dtype=dtype, device=DEVICE)
        reconstruct(lost, None, None, None, into)
        assert into.isnan().all()


def test_a_product_and_a_sum_are_rounded_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(4)
    n = 4 * BLOCK
    base, vector = (torch.randn(n, generator=generator).to(DEVICE) for _ in range(2))
    planes, table = draw_planes(1, n), torch.tensor([[1.1, -0.7]], device=DEVICE)
    out = nans(n, torch.float32)
    reconstruct(base, planes, vector, table, out)
    assert same(out, expected(base, planes, vector, table, torch.float32))
    chosen = table[0][reference.codes(planes, n)]
    fused = (base.double() + chosen.double() * vector.double()).float()
    assert not same(out, fused), "the inputs do not tell a fused product from a rounded one"


def test_past_the_31st_bit(tmp_path: Path) -> None:
    n = (1 << 31) + 3 * BLOCK + 5
    start = (1 << 31) + BLOCK

    base = vast(tmp_path / "base", n, torch.bfloat16)
    planes = vast(tmp_path / "planes", (n + 7) // 8, torch.uint8).unsqueeze(0)
    rows = vast(tmp_path / "rows", -(-n // BLOCK), torch.int32)
    base[start:] = draw(n - start, torch.bfloat16)
    planes[0, start // 8 :] = draw_planes(1, n - start)[0]
    rows[start // BLOCK :] = 1
    table = draw_table(2, 1)
    wanted = expected(base[start:], planes[:, start // 8 :], None, table[1:], torch.bfloat16)
    reconstruct(base, planes, None, table, base, rows=rows, start=start)
    assert same(base[start:], wanted)
    assert not base[: 2 * BLOCK].any() and not base[start - BLOCK : start].any()


def test_planes_far_apart(tmp_path: Path) -> None:
    """Three planes of 2**30 bytes and some: twice the stride is past the 31st bit."""
    stride, n = (1 << 30) + 64, 2 * BLOCK + 3
    flat = vast(tmp_path / "planes", 3 * stride, torch.uint8)
    planes = flat.view(3, stride)
    planes[:, : (n + 7) // 8] = draw_planes(3, n)
    base, table, out = draw(n, torch.float32), draw_table(1, 3), nans(n, torch.float32)
    reconstruct(base, planes, None, table, out)
    assert same(out, expected(base, planes[:, : (n + 7) // 8], None, table, torch.float32))
    codes = torch.empty(n, dtype=torch.uint8, device=DEVICE)
    unpack(planes, codes)
    assert torch.equal(codes.long(), reference.codes(planes[:, : (n + 7) // 8], n))
    made = flat.clone() if DEVICE == "cuda" else flat
    made = made.view(3, stride)
    made[:, : (n + 7) // 8] = 0xAA
    tuned = base + table[0][codes.long()]
    encode_levels(base, None, tuned, table, made)
    nearest = reference.encode_levels(base, None, tuned, table[0].tolist())
    for k in range(3):
        assert torch.equal(made[k, : (n + 7) // 8], reference.pack((nearest >> k & 1).bool()))


# -- what compilers make of it -------------------------------------------------------------


def case(dtype: torch.dtype, count: int, *, vector: bool, rows: bool, tile: int = BLOCK) -> Case:
    name = TRITON[dtype]
    types = {
        **dict.fromkeys(("base", "vector", "out"), f"*{name}"),
        "planes": "*u8",
        "plane_stride": "i64",
        "rows": "*i32",
        "table": "*fp32",
        "start": "i64",
        "stop": "i64",
    }
    constants = {
        "PLANES": count,
        "VECTOR": vector,
        "ROWS": rows,
        "TILE": tile,
        "BLOCK": BLOCK,
        "LANES": 16 // dtype.itemsize,
        "DTYPE": f"tl.{str(dtype).removeprefix('torch.')}",
        "SOFT": False,
    }
    absent = {"vector": vector, "rows": rows, "planes": count, "table": count}
    constants |= {argument: None for argument, there in absent.items() if not there}
    return Case(
        module="tallstore.kernels.reconstruct",
        kernel="reconstruct_kernel",
        types=types,
        constants=constants,
    )


CASES = [
    case(torch.bfloat16, 1, vector=True, rows=True),
    case(torch.float32, 1, vector=True, rows=True),
    case(torch.float16, 2, vector=True, rows=False),
    case(torch.bfloat16, 4, vector=True, rows=True, tile=2 * BLOCK),
    case(torch.float32, 2, vector=False, rows=True),
    case(torch.bfloat16, 0, vector=False, rows=False),
]


@pytest.fixture(scope="module")
def compiled() -> list[list[Compiled]]:
    return compile_cases(CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_for_every_architecture(compiled: list[list[Compiled]], number: int) -> None:
    constants = CASES[number].constants
    threads = 32 * CASES[number].warps
    rounds = constants["TILE"] // (threads * constants["LANES"])
    for built in compiled[number]:
        assert built.spills == 0, built.target
        inputs = 1 + constants["VECTOR"]
        # The main path, and at least as many in the path of the tile that is cut short.
        assert built.count(r"ld\.global\.v4\.b32") >= rounds * inputs, built.target
        assert built.count(r"st\.global\.v4\.b32") >= rounds, built.target
        assert not built.count(r"fma\.rn"), built.target
        assert bool(built.count(r"mul\.rn\.f32")) == constants["VECTOR"], built.target
        if constants["DTYPE"] == "tl.bfloat16" and constants["PLANES"]:
            assert built.count(r"cvt\.rn\.bf16"), built.target
    assert [built.target for built in compiled[number]] == list(CUDA)


def test_for_amd() -> None:
    one = replace(CASES[1], targets=("gfx942",))
    ((built,),) = compile_cases([one])
    assert built.count("global_load_dwordx4") and built.count("global_store_dwordx4")
    assert not built.count("v_fma_f32") and not built.count("v_pk_fma_f32")


def test_it_is_the_interpreter_without_a_gpu() -> None:
    assert (DEVICE == "cuda") != INTERPRETED
