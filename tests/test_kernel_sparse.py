"""`kernels/sparse.py` against full reconstructions, to the bit, and what compilers make of it."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arenas import compact, draw_codes, draw_levels
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, FLOATS, draw, nans, same, vast
from ptx import CUDA, Case, Compiled, compile_cases

pytest.importorskip("triton")

from tallstore.kernels import reference, sectors, sparse
from tallstore.kernels import sparse_reference as plain
from tallstore.kernels.sparse import Cut
from tallstore.kernels.sparse_reference import BLOCK, GROUP, UNTOUCHED, SparseCode

CUTS = (Cut(groups=1, chunk=1024), Cut(groups=4, chunk=256, warps=2), Cut(groups=8, chunk=512))


def dense(code: SparseCode, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The full reconstruction from planes, block by block where blocks differ in their levels."""
    planes = plain.expand(code)
    if code.rows is None:
        return reference.reconstruct(base, planes, None, code.table[0].tolist(), dtype)
    parts = []
    for block, row in enumerate(code.rows.tolist()[: -(-code.weights // BLOCK)]):
        part = base[block * BLOCK : (block + 1) * BLOCK]
        cut = planes[:, block * BLOCK // 8 : (block + 1) * BLOCK // 8]
        parts.append(reference.reconstruct(part, cut, None, code.table[row].tolist(), dtype))
    return torch.cat(parts)


def touched(code: SparseCode) -> torch.Tensor:
    return (reference.codes(plain.expand(code), code.weights) != 0).to(DEVICE)


def check(code: SparseCode, base: torch.Tensor, dtype: torch.dtype, shape: Cut | None) -> None:
    """Apply and restore, over the base and over poison, against the full reconstruction."""
    wanted, there = dense(code, base, dtype), touched(code)
    out = base.to(dtype, copy=True)
    sparse.apply(code, base, out, shape=shape)
    assert same(out, wanted)
    sparse.restore(code, base, out, shape=shape)
    assert same(out, base.to(dtype))
    for act, source in ((sparse.apply, wanted), (sparse.restore, base.to(dtype))):
        around = nans(code.weights + 2 * GROUP, dtype)
        act(code, base, around[GROUP : GROUP + code.weights], shape=shape)
        inside = around[GROUP : GROUP + code.weights]
        assert same(inside[there], source[there])
        inside[there] = float("nan")
        assert around.isnan().all(), "a weight that the code does not touch was written"


# -- apply and restore ---------------------------------------------------------------------


@pytest.mark.parametrize("density", [0, 0.001, 0.02, 0.5, 1])
def test_every_mix_of_dtypes(density: float) -> None:
    n = GROUP + 13
    for (k, base_dtype), dtype in itertools.product(enumerate(FLOATS), FLOATS):
        code = compact(draw_codes(n, density, k + 1), k + 1)
        check(code, draw(n, base_dtype), dtype, None)


@pytest.mark.parametrize("shape", [None, *CUTS])
@pytest.mark.parametrize("n", [1, 9, 1023, 1025, GROUP - 1, GROUP, GROUP + 1, 9 * GROUP + 5])
def test_sizes_around_the_group(n: int, shape: Cut | None) -> None:
    code = compact(draw_codes(n, 0.05, 2), 2)
    check(code, draw(n, torch.bfloat16), torch.bfloat16, shape)


def test_groups_of_uneven_counts() -> None:
    n = 11 * GROUP + 3
    codes = draw_codes(n, 0.002, 4)
    codes[3 * GROUP : 4 * GROUP] = draw_codes(GROUP, 1, 4)
    codes[6 * GROUP : 9 * GROUP] = 0
    codes[10 * GROUP] = 15
    for shape in (None, *CUTS):
        check(compact(codes, 4), draw(n, torch.float32), torch.float32, shape)


def test_each_block_has_its_row_of_levels() -> None:
    n = 2 * GROUP + BLOCK + 77
    rows = torch.tensor([2, 0, 1, 1, 2, 0, 3, 0, 1, 3], dtype=torch.int32, device=DEVICE)
    for count, shape in itertools.product((1, 2, 4), (None, *CUTS)):
        code = compact(draw_codes(n, 0.1, count), count, rows=rows)
        check(code, draw(n, torch.bfloat16), torch.float32, shape)
        out, wanted = nans(n, torch.float32), nans(n, torch.float32)
        sparse.apply(code, draw(n, torch.bfloat16), out)
        plain.apply(code, draw(n, torch.bfloat16), wanted)
        assert same(out, wanted)


def test_in_place() -> None:
    n = 3 * GROUP + 5
    code, base = compact(draw_codes(n, 0.02, 2), 2), draw(n, torch.float16)
    wanted = dense(code, base, torch.float16)
    sparse.apply(code, base, base)
    assert same(base, wanted)


def test_untouched_zeros_keep_their_signs() -> None:
    n = GROUP
    base = torch.zeros(n, device=DEVICE)
    base[::2] = -0.0
    code = compact(draw_codes(n, 0.02, 2), 2)
    out = base.clone()
    sparse.apply(code, base, out)
    assert same(out, dense(code, base, torch.float32))
    lost = replace(code, table=draw_levels(1, 2, +0.0))
    assert not same(out, dense(lost, base, torch.float32)), "+0.0 would do as well"


def test_some_groups_only() -> None:
    n = 6 * GROUP + 100
    code, base = compact(draw_codes(n, 0.05, 2), 2), draw(n, torch.bfloat16)
    wanted = dense(code, base, torch.bfloat16)
    for start, stop in ((2 * GROUP, 5 * GROUP), (3 * GROUP, None), (0, GROUP), (GROUP, GROUP)):
        out = base.clone()
        sparse.apply(code, base, out, start=start, stop=stop)
        end = n if stop is None else stop
        assert same(out[start:end], wanted[start:end])
        assert same(out[:start], base[:start]) and same(out[end:], base[end:])


@pytest.mark.parametrize("density", [0, 1e-5, 0.001, 0.01, 0.02, 0.05, 0.2, 1])
def test_a_program_has_its_entries_in_one_chunk_or_takes_one_group(density: float) -> None:
    entries = torch.zeros(int(density * 64 * GROUP), dtype=torch.int16)
    one = replace(compact(torch.zeros(64 * GROUP, dtype=torch.int64), 1), entries=entries)
    found = sparse.cut(one)
    assert density * GROUP * found.groups <= found.chunk or found.groups == 1
    assert found.chunk % (32 * found.warps) == 0


# -- switch --------------------------------------------------------------------------------


def overlaps(n: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes before and after, by how they overlap."""
    one, two = draw_codes(n, 0.05, 2, seed=1), draw_codes(n, 0.05, 2, seed=2)
    odd = torch.arange(n) % 2
    many, none = draw_codes(n, 1, 2, seed=3), torch.zeros(n, dtype=torch.int64)
    return {
        "identical": (one, one),
        "other levels": (one, one % 3 + (one != 0)),
        "disjoint": (one * odd, two * (1 - odd)),
        "partial": (torch.where(two % 2 == 1, two, one), two),
        "nothing before": (none, one),
        "nothing after": (one, none),
        "nothing": (none, none),
        "everything": (many, many.flip(0)),
        "few to all": (one, many),
        "all to few": (many, one),
    }


@pytest.mark.parametrize("kind", overlaps(1))
def test_switching_equals_a_full_reconstruction(kind: str) -> None:
    n = 5 * GROUP + 13
    before, after = overlaps(n)[kind]
    assert (kind != "disjoint") or not (before * after).any()
    for dtype, shape in zip((*FLOATS, torch.bfloat16), (*CUTS, None), strict=True):
        base = draw(n, torch.bfloat16)
        old, new = compact(before, 2, seed=2), compact(after, 2, seed=3)
        out = dense(old, base, dtype)
        sparse.switch(old, new, base, out, shape=shape)
        assert same(out, dense(new, base, dtype)), (dtype, shape)
        sparse.switch(new, old, base, out, shape=shape)
        assert same(out, dense(old, base, dtype)), (dtype, shape)


@pytest.mark.parametrize("dtype", FLOATS)
def test_switching_writes_the_sectors_that_either_touches_and_nothing_else(
    dtype: torch.dtype,
) -> None:
    n = 5 * GROUP + 13
    old, new = (compact(draw_codes(n, 0.02, k, seed=k), k, seed=k) for k in (1, 3))
    base, out = draw(n, torch.bfloat16), nans(n, dtype)
    sparse.switch(old, new, base, out)
    width = 32 // out.element_size()
    either = torch.nn.functional.pad(touched(old) | touched(new), (0, -n % width))
    written = either.view(-1, width).any(1).repeat_interleave(width)[:n]
    assert same(out[written], dense(new, base, dtype)[written])
    assert out[~written].isnan().all() and 0 < int(written.sum()) < n


def test_switching_sectors_that_many_entries_share() -> None:
    """As many as a sector holds, more than a chunk, in every place of it."""
    n = 2 * GROUP + 5
    for shape in (None, Cut(groups=2, chunk=16, warps=1)):
        for every in (1, 3, 4, 5, 8):
            codes = torch.zeros(n, dtype=torch.int64)
            codes[every::32] = 1
            for more in range(every):
                codes[more::32] = 2 + more % 2
            codes[GROUP : GROUP + 100] = 3
            old, new = compact(codes.flip(0), 2, seed=3), compact(codes, 2, seed=4)
            base = draw(n, torch.bfloat16)
            out = dense(old, base, torch.bfloat16)
            sparse.switch(old, new, base, out, shape=shape)
            assert same(out, dense(new, base, torch.bfloat16)), (shape, every)


def test_switching_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    kernel = sectors.switch_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(sectors, "switch_kernel", Counted())
    n = 9 * GROUP
    old, new = (compact(draw_codes(n, 0.02, 2, seed=k), 2) for k in (1, 2))
    base, out = draw(n, torch.float32), draw(n, torch.float32)
    sparse.switch(old, new, base, out)
    assert grids == [(9,)]
    empty = compact(torch.zeros(n, dtype=torch.int64), 2)
    sparse.switch(empty, empty, base, out)
    assert len(grids) == 1


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3 * GROUP),
    densities=st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]), min_size=1, max_size=4),
    count=st.integers(1, 4),
    base_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    shape=st.sampled_from([None, *CUTS]),
    seed=st.integers(0, 99),
)
def test_task_after_task(
    n: int,
    densities: list[float],
    count: int,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    shape: Cut | None,
    seed: int,
) -> None:
    base = draw(n, base_dtype, seed)
    out = base.to(dtype, copy=True)
    plainly = out.clone()
    old = compact(torch.zeros(n, dtype=torch.int64), count)
    for i, density in enumerate(densities):
        new = compact(draw_codes(n, density, count, seed + i), count, seed=seed + i)
        sparse.switch(old, new, base, out, shape=shape)
        plain.switch(old, new, base, plainly)
        old = new
        assert same(out, dense(new, base, dtype)) and same(out, plainly)
    sparse.restore(old, base, out)
    plain.restore(old, base, plainly)
    assert same(out, base.to(dtype)) and same(out, plainly)


def test_past_the_31st_bit(tmp_path: Path) -> None:
    start = (1 << 31) + 2 * GROUP
    n = start + 3 * GROUP + 5
    codes = [draw_codes(n - start, 0.02, 2, seed=k) for k in (1, 2)]
    parts = [compact(one, 2, seed=k) for k, one in enumerate(codes)]
    base = vast(tmp_path / "base", n, torch.bfloat16)
    out = vast(tmp_path / "out", n, torch.bfloat16)
    base[start:] = draw(n - start, torch.bfloat16)
    out[start:] = dense(parts[0], base[start:], torch.bfloat16)
    low = (1 << 31) + 5
    whole = []
    for k, part in enumerate(parts):
        entries = vast(tmp_path / f"entries{k}", low + part.entries.numel(), torch.int16)
        entries[low:] = part.entries
        rows = vast(tmp_path / f"rows{k}", -(-n // BLOCK), torch.int32)
        rows[start // BLOCK :] = 1
        other = part.table + 1
        other[:, 0] = UNTOUCHED
        whole.append(
            replace(
                part,
                entries=entries,
                starts=torch.cat([torch.full_like(part.starts, low)[:1].expand(start // GROUP),
                                  part.starts + low]),
                table=torch.cat([other, part.table]),
                rows=rows,
                weights=n,
            )
        )  # fmt: skip
    shape = Cut(groups=2, chunk=256)
    sparse.switch(whole[0], whole[1], base, out, start=start, shape=shape)
    assert same(out[start:], dense(parts[1], base[start:], torch.bfloat16))
    assert not out[: 8 * GROUP].any() and not out[start - GROUP : start].any()


# -- what compilers make of it -------------------------------------------------------------

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def case(dtype: torch.dtype, *, applying: bool, rows: bool, shape: Cut) -> Case:
    types = {
        "entries": "*i16",
        "starts": "*i64",
        **dict.fromkeys(("base", "out"), f"*{_NAMES[dtype]}"),
        **dict.fromkeys(("start", "stop"), "i64"),
        "rows": "*i32",
        "table": "*fp32",
    }
    constants = {
        "LEVELS": 4 * applying,
        "ROWS": rows,
        "GROUPS": shape.groups,
        "GROUP": GROUP,
        "BLOCK": BLOCK,
        "CHUNK": shape.chunk,
        "DTYPE": f"tl.{str(dtype).removeprefix('torch.')}",
        "SOFT": False,
    }
    there = {"rows": rows, "table": applying}
    constants |= {name: None for name, present in there.items() if not present}
    return Case(
        module="tallstore.kernels.sparse",
        kernel="touch_kernel",
        types=types,
        constants=constants,
        warps=shape.warps,
        odd=("start", "stop"),
    )


def switching(dtype: torch.dtype, *, rows: bool, shape: Cut) -> Case:
    one = case(dtype, applying=True, rows=rows, shape=shape)
    types = {name: kind for name, kind in one.types.items() if name not in ("entries", "starts")}
    for which in ("old", "new"):
        types |= {f"{which}_entries": "*i16", f"{which}_starts": "*i64"}
    return replace(
        one,
        module="tallstore.kernels.sectors",
        kernel="switch_kernel",
        types=types | {"weights": "i64"},
        constants=one.constants | {"WIDTH": 32 // dtype.itemsize, "NEAR": 4},
        odd=("start", "stop", "weights"),
    )


_EXPAND = Case(
    module="tallstore.kernels.sparse",
    kernel="expand_kernel",
    types={"entries": "*i16", "starts": "*i64", "words": "*i32", "word_stride": "i64",
           "stop": "i64"},
    constants={"PLANES": 2, "GROUPS": 8, "GROUP": GROUP, "CHUNK": 1024},
    odd=("word_stride", "stop"),
)  # fmt: skip
CASES = [
    case(torch.bfloat16, applying=True, rows=True, shape=Cut(groups=8, chunk=1024)),
    case(torch.float32, applying=True, rows=True, shape=Cut(groups=1, chunk=1024)),
    case(torch.float16, applying=True, rows=False, shape=Cut(groups=8, chunk=256)),
    case(torch.bfloat16, applying=False, rows=False, shape=Cut(groups=4, chunk=1024)),
    _EXPAND,
]
SWITCHES = [
    switching(torch.bfloat16, rows=True, shape=Cut(groups=1, chunk=128, warps=2)),
    replace(
        switching(torch.float32, rows=False, shape=Cut(groups=1, chunk=128, warps=2)),
        targets=("sm_90",),
    ),
]


@pytest.fixture(scope="module")
def compiled() -> list[list[Compiled]]:
    return compile_cases(CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_for_every_architecture(compiled: list[list[Compiled]], number: int) -> None:
    asked = CASES[number]
    constants = asked.constants
    rounds = constants["CHUNK"] // (32 * asked.warps)
    for built in compiled[number]:
        assert built.spills == 0, built.target
        assert not built.count(r"fma\.rn"), built.target
        # Nothing goes through shared memory: each thread has what it needs.
        assert not built.count(r"(ld|st)\.shared"), built.target
        assert not built.count(r"bar\.sync"), built.target
        if asked is _EXPAND:
            assert built.count(r"(red|atom)\.global\S*\.or\.b32") == rounds * constants["PLANES"]
            assert built.count(r"ld\.global\.b16") == rounds
            continue
        size = 32 if constants["DTYPE"] == "tl.float32" else 16
        assert built.count(rf"st\.global\.b{size}") == rounds, built.target
        loads = rounds * (2 if size == 16 else 1)
        assert built.count(r"ld\.global\.b16") == loads, built.target
    assert [built.target for built in compiled[number]] == list(CUDA)


def test_sectors_for_every_architecture() -> None:
    for asked, every in zip(SWITCHES, compile_cases(SWITCHES), strict=True):
        # Two threads a sector, 16 bytes each; restored and applied.
        rounds = 2 * asked.constants["CHUNK"] * 2 // (32 * asked.warps)
        for built in every:
            assert built.spills == 0, built.target
            assert not built.count(r"fma\.rn"), built.target
            assert built.count(r"ld\.global\.v4\.b32") >= rounds, built.target
            assert built.count(r"st\.global\.v4\.b32") >= rounds, built.target
        assert [built.target for built in every] == list(asked.targets)


def test_neighbouring_threads_take_neighbouring_entries(
    compiled: list[list[Compiled]],
) -> None:
    """What a thread takes lies whole rounds of threads apart, not side by side."""
    asked = CASES[0]
    threads = 32 * asked.warps
    for built in compiled[0]:
        steps = {
            int(step)
            for step in re.findall(
                r"^\s*(?:add\.s32|or\.b32)\s+%r\d+, %r\d+, (\d+);", built.text, re.M
            )
        }
        rounds = range(1, asked.constants["CHUNK"] // threads - 1)
        assert steps >= {i * threads for i in rounds}, built.target
        assert not steps & set(range(1, 8)), built.target
