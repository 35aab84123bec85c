"""The encoders against `tallstore.coding`, numpy and the plain forms, to the bit."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, FLOATS, TRITON, draw, poison, poisoned, same, vast
from ptx import CUDA, Case, Compiled, compile_cases

pytest.importorskip("triton")

from tallstore import coding
from tallstore.kernels import reference
from tallstore.kernels.common import BLOCK
from tallstore.kernels.encode_levels import encode_levels
from tallstore.kernels.encode_tall import encode_tall
from tallstore.kernels.sums import LevelSums, TallSums, reduce_sums

#: Differences of NaN and infinity, which both sides make on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)

INF, NAN = float("inf"), float("nan")


def blocks_of(n: int) -> int:
    return -(-n // BLOCK)


def to_float32(tensor: torch.Tensor) -> coding.Floats:
    name = str(tensor.dtype).removeprefix("torch.")
    return coding.to_float32(tensor.cpu().view(torch.uint8).numpy(), name)


def on_cpu(
    base: torch.Tensor, vector: torch.Tensor, finetuned: torch.Tensor, tall_lambda: float
) -> tuple[list[int], coding.CodeStats]:
    """What packing computes without a GPU."""
    one, two, three = (to_float32(t) for t in (base, vector, finetuned))
    packed, stats = coding.encode_tall(one, one + two, three, tall_lambda=tall_lambda)
    alike = base.dtype == finetuned.dtype
    raw = [t.cpu().view(torch.uint8).numpy() for t in (base, finetuned)]
    stats.same = alike and bool(np.array_equal(*raw))
    return packed.tolist(), stats


def tall(
    base: torch.Tensor,
    vector: torch.Tensor,
    finetuned: torch.Tensor,
    tall_lambda: float,
    *,
    warps: int = 2,
) -> tuple[torch.Tensor, TallSums]:
    """The mask and the sums of a whole tensor; what lies around the mask stays poisoned."""
    n = base.numel()
    size = (n + 7) // 8
    whole = poison(size + 32)
    sums = TallSums.empty(blocks_of(n), DEVICE)
    plane = whole[16 : 16 + size]
    encode_tall(base, vector, finetuned, plane, tall_lambda=tall_lambda, sums=sums, warps=warps)
    assert poisoned(whole[:16]) and poisoned(whole[16 + size :])
    bare = poison(size)
    encode_tall(base, vector, finetuned, bare, tall_lambda=tall_lambda)
    assert same(bare, plane)
    return plane, reduce_sums(sums, [(0, blocks_of(n))])


def close(found: torch.Tensor, wanted: torch.Tensor | float) -> bool:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    return torch.allclose(found.cpu(), wanted.cpu(), rtol=1e-5, atol=1e-30)


def check_tall(
    base: torch.Tensor,
    vector: torch.Tensor,
    finetuned: torch.Tensor,
    tall_lambda: float,
    *,
    warps: int = 2,
) -> TallSums:
    plane, sums = tall(base, vector, finetuned, tall_lambda, warps=warps)
    wanted, stats = on_cpu(base, vector, finetuned, tall_lambda)
    assert plane.tolist() == wanted
    assert [sums.ones.item(), sums.same.item(), sums.finite.item()] == [
        stats.ones,
        stats.same,
        stats.finite,
    ]
    if stats.finite:
        assert close(sums.moved[0], stats.moved) and close(sums.error[0], stats.error)
    mask = reference.encode_tall(base, vector, finetuned, tall_lambda=tall_lambda)
    assert same(plane, reference.pack(mask))
    plain = reference.tall_sums(base, vector, finetuned, mask)
    assert (plain.ones, plain.same, plain.finite) == (sums.ones, sums.same, sums.finite)
    if stats.finite:
        assert close(plain.moved, sums.moved.cpu()) and close(plain.error, sums.error.cpu())
    return sums


def task(n: int, *dtypes: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Base, vector and fine-tuned weights, in which both sides of the rule are often near."""
    base = draw(n, torch.float32, seed)
    vector, step = (draw(n, torch.float32, seed + s, scale=0.02) for s in (1, 2))
    finetuned = base + 0.5 * vector + step
    finetuned[::13] = base[::13]
    each = zip((base, vector, finetuned), dtypes, strict=True)
    return tuple(tensor.to(dtype) for tensor, dtype in each)


@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_tall_masks_of_every_mix_of_dtypes(base_dtype: torch.dtype) -> None:
    for vector_dtype, dtype in itertools.product(FLOATS, FLOATS):
        sums = check_tall(*task(BLOCK + 13, base_dtype, vector_dtype, dtype), 0.4)
        assert 0 < sums.ones < BLOCK + 13


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100, 1023, 1024, 1025, 2047, 2048, 3000])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_tall_masks_of_sizes_around_the_block(n: int, warps: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check_tall(*task(n, dtype, dtype, dtype), 0.3, warps=warps)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2500),
    offset=st.integers(0, 9),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    tall_lambda=st.floats(0, 4, width=32) | st.sampled_from([0.2, 0.3, 0.4, 0.5, 0.6]),
    seed=st.integers(0, 99),
)
def test_tall_masks_of_views_at_odd_offsets(
    n: int, offset: int, dtypes: tuple[torch.dtype, ...], tall_lambda: float, seed: int
) -> None:
    views = [tensor[offset:] for tensor in task(n + offset, *dtypes, seed=seed)]
    check_tall(*views, tall_lambda)


#: Taken in every combination: zeros of both signs, ties, the largest, the smallest, none.
ODDITIES = (0.0, -0.0, 1.0, -1.0, 0.5, 3e38, -3e38, 1e-45, 1.5e-42, INF, -INF, NAN)


def test_tall_masks_of_odd_numbers() -> None:
    numbers = torch.tensor(ODDITIES, device=DEVICE)
    triples = torch.cartesian_prod(numbers, numbers, numbers)
    for tall_lambda in (0.0, 0.5, 1.0):
        plane, _ = tall(*triples.T.contiguous(), tall_lambda)
        wanted, _ = on_cpu(*triples.T.contiguous(), tall_lambda)
        assert plane.tolist() == wanted


def test_flags_of_odd_numbers() -> None:
    """One to a block, among zeros."""
    numbers = torch.tensor(ODDITIES, device=DEVICE)
    triples = torch.cartesian_prod(numbers, numbers, numbers)[::11].T.contiguous()
    n = triples.shape[1]
    spaced = torch.zeros(3, n, BLOCK, device=DEVICE)
    spaced[:, :, 77] = triples
    sums = TallSums.empty(n, DEVICE)
    encode_tall(*spaced.flatten(1), poison(n * BLOCK // 8), tall_lambda=0.5, sums=sums)
    assert 10 < sums.finite.sum() < n - 10 and 5 < sums.same.sum() < n - 5
    for i in range(n):
        _, stats = on_cpu(*triples[:, i : i + 1], 0.5)
        found = (sums.ones[i].item(), sums.same[i].item(), sums.finite[i].item())
        assert found == (stats.ones, stats.same, stats.finite), triples[:, i]


def test_equal_bits_and_not_equal_numbers_are_the_same() -> None:
    base = torch.tensor([1.0, NAN, 0.0, INF], device=DEVICE)
    vector = torch.zeros(4, device=DEVICE)
    for dtype in FLOATS:
        cast = base.to(dtype)
        assert check_tall(cast, vector, cast.clone(), 0.4).same
        negative = cast.clone()
        negative[2] = -0.0
        assert not check_tall(cast, vector, negative, 0.4).same
    # Another NaN: arithmetic would not tell the two from each other.
    quiet = torch.tensor([0x7C01], dtype=torch.int16, device=DEVICE).view(torch.float16)
    other = torch.tensor([0x7E01], dtype=torch.int16, device=DEVICE).view(torch.float16)
    sums = TallSums.empty(1, DEVICE)
    encode_tall(quiet, vector[:1], other, poison(1), tall_lambda=0.4, sums=sums)
    assert not sums.same


def test_a_difference_and_a_product_are_rounded_one_after_the_other() -> None:
    """Near ties: one fused multiply-add would turn bits around."""
    n = 16 * BLOCK
    base, vector, finetuned = task(n, *[torch.float32] * 3)
    # |base - finetuned| = |merged - finetuned| * lambda, up to the rounding.
    finetuned = base + vector * np.float32(0.3 / 1.3)
    check_tall(base, vector, finetuned, 0.3)
    exact = [t.double() for t in (base, vector, finetuned)]
    factor = float(np.float32(0.3))
    unrounded = (exact[0] - exact[2]).abs() > (exact[0] + exact[1] - exact[2]).abs() * factor
    mask = reference.encode_tall(base, vector, finetuned, tall_lambda=0.3)
    assert not torch.equal(mask, unrounded), "the inputs do not tell"


def test_sums_of_each_block_and_of_ranges_of_them() -> None:
    n = 5 * BLOCK + 77
    base, vector, finetuned = task(n, *[torch.bfloat16] * 3)
    finetuned[BLOCK : 2 * BLOCK] = base[BLOCK : 2 * BLOCK]
    finetuned[3 * BLOCK + 5] = INF
    sums = TallSums.empty(6, DEVICE)
    encode_tall(base, vector, finetuned, poison((n + 7) // 8), tall_lambda=0.4, sums=sums)
    assert sums.same.tolist() == [False, True, False, False, False, False]
    assert sums.finite.tolist() == [True, True, True, False, True, True]
    ranges = [(0, 1), (1, 3), (4, 6), (2, 2), (0, 6)]
    reduced = reduce_sums(sums, ranges)
    for i, (low, high) in enumerate(ranges[:3]):
        part = slice(low * BLOCK, high * BLOCK)
        _, stats = on_cpu(base[part], vector[part], finetuned[part], 0.4)
        assert reduced.ones[i] == stats.ones and reduced.finite[i]
        assert close(reduced.moved[i], stats.moved) and close(reduced.error[i], stats.error)
    empty = [getattr(reduced, field.name)[3].item() for field in fields(reduced)]
    assert empty == [0, 0.0, 0.0, True, True]
    assert reduced.moved.dtype == torch.float64 and reduced.ones.dtype == torch.int64
    assert not reduced.finite[4] and not reduced.same[4]
    assert reduce_sums(sums, []).error.shape == (0,)


def test_tall_masks_of_a_part_only() -> None:
    n, start, stop = 6 * BLOCK, 2 * BLOCK, 4 * BLOCK + 101
    inputs = task(n, *[torch.bfloat16] * 3)
    wanted, _ = on_cpu(*inputs, 0.4)
    plane, sums = poison(n // 8), TallSums.empty(6, DEVICE)
    sums.ones.fill_(-1)
    encode_tall(*inputs, plane, tall_lambda=0.4, sums=sums, start=start, stop=stop)
    assert plane[start // 8 : stop // 8].tolist() == wanted[start // 8 : stop // 8]
    last = wanted[stop // 8] & ((1 << stop % 8) - 1)
    assert plane[stop // 8] == last
    assert poisoned(plane[: start // 8]) and poisoned(plane[stop // 8 + 1 :])
    assert (sums.ones >= 0).tolist() == [False, False, True, True, True, False]
    before = plane.clone()
    encode_tall(*inputs, plane, tall_lambda=0.4, start=stop, stop=stop)
    assert same(plane, before)


# -- levels --------------------------------------------------------------------------------


def by_numpy(
    base: torch.Tensor, vector: torch.Tensor | None, finetuned: torch.Tensor, levels: torch.Tensor
) -> list[int]:
    one, three = to_float32(base), to_float32(finetuned)
    two = np.ones_like(one) if vector is None else to_float32(vector)
    distances = np.abs((three - one) - levels.cpu().numpy()[:, None] * two)
    return np.where(np.isnan(distances), np.inf, distances).argmin(0).tolist()


def check_levels(
    base: torch.Tensor,
    vector: torch.Tensor | None,
    finetuned: torch.Tensor,
    levels: torch.Tensor,
    *,
    warps: int | None = None,
) -> LevelSums:
    n, count = base.numel(), levels.numel().bit_length() - 1
    size = (n + 7) // 8
    planes, bare = poison(count, size + 3)[:, :size], poison(count, size)
    sums = LevelSums.empty(blocks_of(n), count, DEVICE)
    encode_levels(base, vector, finetuned, levels[None], planes, sums=sums, warps=warps)
    encode_levels(base, vector, finetuned, levels[None], bare)
    assert same(planes.contiguous(), bare)
    found = reference.codes(planes, 8 * size)
    assert found[:n].tolist() == by_numpy(base, vector, finetuned, levels)
    assert not found[n:].any()
    plain = reference.encode_levels(base, vector, finetuned, levels.tolist())
    assert torch.equal(found[:n], plain)
    reduced = reduce_sums(sums, [(0, blocks_of(n))])
    wanted = reference.level_sums(base, vector, finetuned, levels.tolist(), plain)
    assert torch.equal(reduced.counts, wanted.counts)
    assert (reduced.same, reduced.finite) == (wanted.same, wanted.finite)
    if wanted.finite and wanted.moved < 1e38:
        for name in ("squares", "moved", "error"):
            assert close(getattr(reduced, name), getattr(wanted, name)), name
        # Sums of both signs: as exact as their terms, not as what is left of them.
        bound = (wanted.squares * wanted.moved).sqrt()
        assert ((reduced.products - wanted.products).abs() <= 1e-5 * bound).all()
    return reduced


LEVELS = (-1.2, -0.7, -0.35, -0.1, 0.0, 0.15, 0.4, 0.8, 1.3, -0.0, 0.4, 2.0, -2.0, 0.02, 5.0, 0.7)


def levels_for(count: int) -> torch.Tensor:
    return torch.tensor(LEVELS[: 1 << count], device=DEVICE)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_levels_of_mixed_dtypes(count: int) -> None:
    mixes = [(d, d, d) for d in FLOATS] + [
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ]
    for mix in mixes:
        base, vector, finetuned = task(BLOCK + 13, *mix)
        check_levels(base, vector, finetuned, levels_for(count))
        check_levels(base, None, finetuned, levels_for(count) * 0.02)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1023, 1024, 1025, 2048, 3000])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_levels_of_sizes_around_the_block(n: int, warps: int) -> None:
    for count, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        inputs = task(n, dtype, dtype, dtype)
        check_levels(*inputs, levels_for(count), warps=warps)
        # Past the end there is no difference, whose nearest level is not the first.
        check_levels(inputs[0], None, inputs[2], levels_for(count) - 9, warps=warps)
        check_levels(inputs[0], None, inputs[2], 9 - levels_for(count), warps=warps)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 2500),
    offset=st.integers(0, 9),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    count=st.integers(1, 4),
    vector=st.booleans(),
    seed=st.integers(0, 99),
)
def test_levels_of_views_at_odd_offsets(
    n: int, offset: int, dtypes: tuple[torch.dtype, ...], count: int, vector: bool, seed: int
) -> None:
    one, two, three = (tensor[offset:] for tensor in task(n + offset, *dtypes, seed=seed))
    check_levels(one, two if vector else None, three, levels_for(count))


def test_levels_of_odd_numbers() -> None:
    numbers = torch.tensor(ODDITIES, device=DEVICE)
    base, vector, finetuned = torch.cartesian_prod(numbers, numbers, numbers).T.contiguous()
    for levels in ((0.0, 1.0), (1.0, -1.0, 0.0, 0.5), (INF, 0.0), (NAN, 1.0)):
        table = torch.tensor(levels, device=DEVICE)
        assert not check_levels(base, vector, finetuned, table).finite
        check_levels(base, None, finetuned, table)
        for i in range(0, base.numel(), 191):
            one, two, three = (t[i : i + 1] for t in (base, vector, finetuned))
            check_levels(one, two, three, table)


def test_of_equal_distances_the_first() -> None:
    base = torch.zeros(9, device=DEVICE)
    finetuned = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, -1.0, 3.0, -0.0, 0.25], device=DEVICE)
    levels = torch.tensor([1.0, 0.0, 1.0, 2.0], device=DEVICE)
    planes = poison(2, 2)
    encode_levels(base, None, finetuned, levels[None], planes)
    assert reference.codes(planes, 9).tolist() == [1, 0, 0, 0, 3, 1, 3, 1, 1]


def test_each_block_has_its_row_of_levels_and_a_part_may_do() -> None:
    n = 5 * BLOCK + 77
    base, vector, finetuned = task(n, *[torch.bfloat16] * 3)
    table = torch.stack([levels_for(2), -levels_for(2), levels_for(2) * 3])
    rows = torch.tensor([2, 0, 1, 1, 2, 0], dtype=torch.int32, device=DEVICE)
    planes, sums = poison(2, (n + 7) // 8), LevelSums.empty(6, 2, DEVICE)
    sums.counts.fill_(-1)
    encode_levels(base, vector, finetuned, table, planes, rows=rows, sums=sums, start=BLOCK)
    assert poisoned(planes[:, : BLOCK // 8]) and (sums.counts[0] == -1).all()
    found = reference.codes(planes, n)
    for block in range(1, 6):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        levels = table[rows[block]]
        wanted = by_numpy(base[part], vector[part], finetuned[part], levels)
        assert found[part].tolist() == wanted
        assert sums.counts[block].tolist() == np.bincount(wanted, minlength=4).tolist()


def test_sums_give_fitted_levels_and_their_error() -> None:
    base, vector, finetuned = task(4 * BLOCK, *[torch.float32] * 3)
    sums = check_levels(base, vector, finetuned, levels_for(2))
    fitted = (sums.products / sums.squares)[0]
    t, v = (finetuned - base).double(), vector.double()
    code = reference.encode_levels(base, vector, finetuned, levels_for(2).tolist())
    for c in range(4):
        here = code == c
        solution = torch.linalg.lstsq(v[here][:, None], t[here][:, None]).solution.item()
        assert fitted[c].item() == pytest.approx(solution, rel=1e-4)
    error = sums.moved[0] + (fitted**2 * sums.squares - 2 * fitted * sums.products).sum()
    assert error.item() == pytest.approx((t - fitted[code] * v).square().sum().item(), rel=1e-4)
    assert error < sums.error[0]


def test_past_the_31st_bit(tmp_path: Path) -> None:
    n = (1 << 31) + 3 * BLOCK + 5
    start = (1 << 31) + BLOCK
    big = [vast(tmp_path / name, n, torch.bfloat16) for name in "bvf"]
    ends = task(n - start, *[torch.bfloat16] * 3)
    for tensor, end in zip(big, ends, strict=True):
        tensor[start:] = end
    size, first = (n + 7) // 8, start // 8
    plane = vast(tmp_path / "plane", size, torch.uint8)
    sums = TallSums.empty(blocks_of(n), DEVICE)
    encode_tall(*big, plane, tall_lambda=0.4, sums=sums, start=start)
    wanted, stats = on_cpu(*ends, 0.4)
    assert plane[first:].tolist() == wanted and not plane[: 4 * BLOCK].any()
    assert sums.ones[start // BLOCK :].sum() == stats.ones
    planes = vast(tmp_path / "planes", 2 * size, torch.uint8).view(2, size)
    rows = vast(tmp_path / "rows", blocks_of(n), torch.int32)
    rows[start // BLOCK :] = 1
    table = torch.stack([levels_for(2) + 7, levels_for(2)])
    encode_levels(*big, table, planes, rows=rows, start=start)
    found = reference.codes(planes[:, first:], n - start)
    assert found.tolist() == by_numpy(*ends, levels_for(2))
    assert not planes[:, : 4 * BLOCK].any()


# -- what compilers make of it -------------------------------------------------------------

_TALL = ("ones", "moved", "error", "same", "finite")
_LEVELS = ("counts", "products", "squares", "moved", "error", "same", "finite")
_TYPES = {
    "ones": "*i32",
    "counts": "*i32",
    **dict.fromkeys(("moved", "error", "products", "squares"), "*fp32"),
    **dict.fromkeys(("same", "finite", "plane", "planes"), "*u8"),
    "plane_stride": "i64",
    "rows": "*i32",
    "table": "*fp32",
    "tall_lambda": "fp32",
    "start": "i64",
    "stop": "i64",
}


def weights(*dtypes: torch.dtype) -> dict[str, str]:
    names = ("base", "vector", "finetuned")
    return {name: f"*{TRITON[dtype]}" for name, dtype in zip(names, dtypes, strict=True)}


def tall_case(*dtypes: torch.dtype, sums: bool) -> Case:
    constants = {"SUMS": sums, "BLOCK": BLOCK} | ({} if sums else dict.fromkeys(_TALL))
    return Case(
        module="tallstore.kernels.encode_tall",
        kernel="tall_kernel",
        types=_TYPES | weights(*dtypes),
        constants=constants,
        warps=1 if sums else 2,
        odd=("start", "stop"),
    )


def levels_case(count: int, dtype: torch.dtype, *, sums: bool, targets: tuple[str, ...]) -> Case:
    constants = {"PLANES": count, "VECTOR": True, "ROWS": True, "SUMS": sums, "BLOCK": BLOCK}
    return Case(
        module="tallstore.kernels.encode_levels",
        kernel="levels_kernel",
        types=_TYPES | weights(dtype, dtype, dtype),
        constants=constants | ({} if sums else dict.fromkeys(_LEVELS)),
        warps=2 if count <= 2 else 4,
        odd=("start", "stop"),
        targets=targets,
    )


CASES = [
    tall_case(*[torch.bfloat16] * 3, sums=True),
    tall_case(*[torch.float32] * 3, sums=False),
    tall_case(torch.bfloat16, torch.float32, torch.float16, sums=True),
    levels_case(1, torch.bfloat16, sums=True, targets=CUDA),
    levels_case(4, torch.float32, sums=True, targets=("sm_90",)),
    levels_case(3, torch.bfloat16, sums=True, targets=("sm_80",)),
]


@pytest.fixture(scope="module")
def compiled() -> list[list[Compiled]]:
    return compile_cases(CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_for_every_architecture(compiled: list[list[Compiled]], number: int) -> None:
    case = CASES[number]
    sizes = [4 if case.types[n] == "*fp32" else 2 for n in ("base", "vector", "finetuned")]
    loads = sum(BLOCK * size // (16 * 32 * case.warps) for size in sizes)
    for built in compiled[number]:
        assert built.spills == 0, built.target
        # Each weight of the main path once; the path of the cut block may have them too.
        assert built.count(r"ld\.global\.v4\.b32") >= loads, built.target
        assert not built.count(r"fma\."), built.target
        assert built.count(r"mul\.rn\.f32"), built.target
        # One flush to zero and the smallest differences are gone.
        assert not built.count(r"\w+\.(rn\.)?ftz"), built.target
    assert [built.target for built in compiled[number]] == list(case.targets)


def test_sums_cost_nothing_where_not_wanted(compiled: list[list[Compiled]]) -> None:
    for built in compiled[1]:
        assert not built.count(r"redux"), built.target
    for built in compiled[0]:
        assert built.count(r"redux\.sync"), built.target
