"""`kernels/seeded.py`: against full reconstructions, to the bit, and what compilers make of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arenas import draw_codes, draw_levels, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, FLOATS, draw, nans, same, vast
from ptx import CUDA, Case, Compiled, compile_cases
from seeds import SEED, arena, make, support

pytest.importorskip("triton")

from tallstore.kernels import reference, seeded, sparse, sparse_reference
from tallstore.kernels import seeded_reference as plain
from tallstore.kernels.common import BLOCK, Shape
from tallstore.kernels.seeded_reference import SeededCode, SeededTensor
from tallstore.kernels.sparse_reference import UNTOUCHED

MIXED = arena((5000, 7), (30_001, 50), (BLOCK, 1), (1, 3), (2 * BLOCK + 2, 3), first=1, gap=1)


def steps(code: SeededCode) -> tuple[torch.Tensor, torch.Tensor]:
    """What is added to each weight of the arena, and which are touched; from the format alone."""
    step = torch.full((code.weights,), UNTOUCHED)
    there = torch.zeros(code.weights, dtype=torch.bool)
    start = 0
    for i, tensor in enumerate(code.tensors):
        at = tensor.offset + support(tensor)
        count = at.numel()
        part = code.planes[:, start // 8 : (start + count + 7) // 8]
        step[at] = code.table[i].cpu()[reference.codes(part, count).cpu()]
        there[at] = True
        start += -(-count // BLOCK) * BLOCK
    return step.to(DEVICE), there.to(DEVICE)


def dense(code: SeededCode, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The full reconstruction: every weight of the arena is summed and rounded."""
    return (base.float() + steps(code)[0]).to(dtype)


def check(code: SeededCode, base: torch.Tensor, dtype: torch.dtype) -> None:
    """Apply and restore, over the base and over poison, against the full reconstruction."""
    wanted, (_, there) = dense(code, base, dtype), steps(code)
    out = base.to(dtype, copy=True)
    seeded.apply(code, base, out)
    assert same(out, wanted)
    plainly = base.to(dtype, copy=True)
    plain.apply(code, base, plainly)
    assert same(plainly, wanted)
    seeded.restore(code, base, out)
    assert same(out, base.to(dtype))
    for act, source in ((seeded.apply, wanted), (seeded.restore, base.to(dtype))):
        around = nans(code.weights + 2 * BLOCK, dtype)
        inside = around[BLOCK : BLOCK + code.weights]
        act(code, base, inside)
        assert same(inside[there], source[there])
        inside[there] = float("nan")
        assert around.isnan().all(), "a weight that has no value was written"


@pytest.mark.parametrize("count", range(1, 5))
def test_every_mix_of_dtypes(count: int) -> None:
    code = make(arena((5000, 7), (1, 3), first=1, gap=1), count)
    for base_dtype, dtype in itertools.product(FLOATS, FLOATS):
        check(code, draw(code.weights, base_dtype), dtype)


@pytest.mark.parametrize("stride", [1, 2, 3, 10, 1000, 2**31 - 1])
@pytest.mark.parametrize("numel", [1, 2, 1023, 1024, 1025, 10_240, 10_241])
def test_sizes_around_the_group_and_the_block(numel: int, stride: int) -> None:
    code = make(arena((numel, stride)), 2)
    groups = (numel + stride - 1) // stride
    assert code.owners.numel() == (groups + BLOCK - 1) // BLOCK
    check(code, draw(numel, torch.bfloat16), torch.bfloat16)


def test_no_tensors_and_empty_ones() -> None:
    for tensors in ((), arena((0, 5)), arena((0, 5), (3000, 4), (0, 1))):
        check(make(tensors, 1, weights=5000), draw(5000, torch.bfloat16), torch.float32)


@pytest.mark.parametrize("count", range(1, 4))
@pytest.mark.parametrize("tensors", [MIXED, arena((3000, 1)), arena((33, 40)), ()])
def test_planes_reconstruct_the_same_weights(tensors: tuple[SeededTensor, ...], count: int) -> None:
    code = make(tensors, count, weights=200)
    n, width = code.weights, sparse_reference.plane_bytes(code.weights)
    whole = torch.full((count + 3, width + 64), 0xAA, dtype=torch.uint8, device=DEVICE)
    planes = whole[1:-1, 16:-48]
    seeded.expand(code, planes)
    assert torch.equal(planes[:, :width], plain.expand(code))
    base = draw(n, torch.bfloat16)
    table, rows = plain.expanded_levels(code)
    wanted = dense(code, base, torch.bfloat16)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        levels = table[int(rows[start // BLOCK])].tolist()
        part = planes[:, start // 8 : (stop + 7) // 8]
        got = reference.reconstruct(base[start:stop], part, None, levels, torch.bfloat16)
        assert same(got, wanted[start:stop])
    whole[1:-1, 16 : 16 + width] = 0xAA
    assert (whole == 0xAA).all()


def test_four_bits_and_none_have_no_planes() -> None:
    code = make(MIXED, 4)
    planes = torch.full((5, 1 << 15), 0xAA, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="4 bits have no planes"):
        seeded.expand(code, planes)
    with pytest.raises(ValueError, match="4 bits have no planes"):
        plain.expand(code)
    assert (planes == 0xAA).all()


def test_in_place_and_the_signs_of_zeros() -> None:
    code = make(MIXED, 4)
    base = torch.zeros(code.weights, device=DEVICE)
    base[::2] = -0.0
    wanted = dense(code, base, torch.float32)
    assert not same(wanted, wanted + 0.0)
    seeded.apply(code, base, base, shape=Shape(warps=8))
    assert same(base, wanted)


# -- switch --------------------------------------------------------------------------------


def launches(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    found: list[object] = []
    kernel = seeded.touch_kernel

    class Counted:
        def __getitem__(self, grid: object) -> object:
            found.append(grid)
            return kernel[grid]

    monkeypatch.setattr(seeded, "touch_kernel", Counted())
    return found


OTHERS = {
    "the same support": (MIXED, 1),
    "another seed": (tuple(replace(one, seed=5) for one in MIXED), 2),
    "another stride": (tuple(replace(one, stride=one.stride + 1) for one in MIXED), 2),
    "some tensors": (MIXED[1:4], 2),
    "none": ((), 1),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_switching_equals_a_full_reconstruction(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, wanted = OTHERS[kind]
    found = launches(monkeypatch)
    old = make(MIXED, 2)
    for count, dtype in itertools.product((1, 4), (torch.bfloat16, torch.float32)):
        new = make(tensors, count, weights=old.weights, seed=3)
        base = draw(old.weights, torch.bfloat16)
        out = dense(old, base, dtype)
        plainly = out.clone()
        found.clear()
        seeded.switch(old, new, base, out)
        assert len(found) == wanted
        plain.switch(old, new, base, plainly)
        assert same(out, dense(new, base, dtype)) and same(plainly, out)
        out = nans(old.weights, dtype)
        seeded.switch(old, new, base, out)
        either = steps(old)[1] | steps(new)[1]
        assert same(out[either], dense(new, base, dtype)[either]) and out[~either].isnan().all()


def test_from_one_kind_to_the_other() -> None:
    hashed = make(MIXED, 2)
    n = hashed.weights
    planes = packed(draw_codes(n, 0.05, 2), 2)
    few = sparse_reference.compress(planes, n, table=draw_levels(1, 2, UNTOUCHED))
    base = draw(n, torch.bfloat16)
    full = reference.reconstruct(base, planes, None, few.table[0].tolist(), torch.bfloat16)
    out = base.clone()
    sparse.apply(few, base, out)
    sparse.restore(few, base, out)
    seeded.apply(hashed, base, out)
    assert same(out, dense(hashed, base, torch.bfloat16))
    seeded.restore(hashed, base, out)
    sparse.apply(few, base, out)
    assert same(out, full)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 400)), min_size=1, max_size=4),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    base_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**64 - 1),
)
def test_task_after_task(
    sizes: list[tuple[int, int]],
    counts: list[int],
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    seed: int,
) -> None:
    tensors = arena(*sizes, seed=seed, gap=1)
    old = make((), 1, weights=max((one.offset + one.numel for one in tensors), default=0))
    base = draw(old.weights, base_dtype, seed % 2**32)
    out = base.to(dtype, copy=True)
    for i, count in enumerate(counts):
        # The seed stays or goes.
        now = tuple(replace(one, seed=(seed + i // 2) % 2**64) for one in tensors)
        new = make(now, count, weights=old.weights, seed=i)
        seeded.switch(old, new, base, out)
        old = new
        assert same(out, dense(new, base, dtype))
    seeded.restore(old, base, out)
    assert same(out, base.to(dtype))


def test_past_the_31st_bit(tmp_path: Path) -> None:
    offset = (1 << 31) + 2 * BLOCK
    wide = SeededTensor(seed=SEED, number=0, stride=2**31 - 1, offset=0, numel=2**31 - 1)
    near = SeededTensor(seed=SEED, number=2, stride=5, offset=offset, numel=9000)
    code = make((wide, near), 2)
    base = vast(tmp_path / "base", code.weights, torch.bfloat16)
    out = vast(tmp_path / "out", code.weights, torch.bfloat16)
    base[offset:] = draw(near.numel, torch.bfloat16)
    seeded.apply(code, base, out)
    alone = plain.build(
        (replace(near, offset=0),), code.planes[:, BLOCK // 8 :], code.table[1:], 9000
    )
    there = steps(alone)[1]
    assert same(out[offset:][there], dense(alone, base[offset:], torch.bfloat16)[there])
    assert not out[offset:][~there].any()
    one = int(support(wide))
    value = reference.codes(code.planes, 1)
    assert one > 1 << 30 and out[one] == code.table[0][value].bfloat16()
    assert not out[one - BLOCK : one].any() and not out[one + 1 : one + BLOCK].any()
    assert not out[:BLOCK].any() and not out[offset - BLOCK : offset].any()


def test_planes_far_apart(tmp_path: Path) -> None:
    """Strides of 32 bits whose multiples are not."""
    code = make(MIXED, 3)
    far = (1 << 30) + 64
    values = vast(tmp_path / "values", 3 * far, torch.uint8).view(3, far)
    values[:, : code.planes.shape[1]] = code.planes
    words = vast(tmp_path / "planes", 16 * far, torch.uint8).view(4, 4 * far)
    seeded.expand(replace(code, planes=values), words)
    width = sparse_reference.plane_bytes(code.weights)
    assert torch.equal(words[:, :width], plain.expand(code))
    base = draw(code.weights, torch.bfloat16)
    out = base.clone()
    seeded.apply(replace(code, planes=values), base, out)
    assert same(out, dense(code, base, torch.bfloat16))


# -- what compilers make of it -------------------------------------------------------------

_TYPES = {
    "planes": "*u8",
    "plane_stride": "i64",
    "table": "*fp32",
    "index": "*i64",
    "owners": "*i32",
    "words": "*i32",
    "word_stride": "i64",
}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def case(dtype: torch.dtype, count: int, *, applying: bool) -> Case:
    return Case(
        module="tallstore.kernels.seeded",
        kernel="touch_kernel",
        types={**_TYPES, **dict.fromkeys(("base", "out"), f"*{_NAMES[dtype]}")},
        constants={
            "BITS": count,
            "APPLY": applying,
            "BLOCK": BLOCK,
            "DTYPE": f"tl.{str(dtype).removeprefix('torch.')}",
            "SOFT": False,
        },
        odd=("plane_stride",),
    )


_EXPAND = Case(
    module="tallstore.kernels.seeded",
    kernel="expand_kernel",
    types=_TYPES,
    constants={"BITS": 3, "BLOCK": BLOCK},
    odd=("plane_stride", "word_stride"),
)
CASES = [
    case(torch.bfloat16, 1, applying=True),
    case(torch.float32, 4, applying=True),
    case(torch.float16, 2, applying=False),
    _EXPAND,
]


@pytest.fixture(scope="module")
def compiled() -> list[list[Compiled]]:
    return compile_cases(CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_for_every_architecture(compiled: list[list[Compiled]], number: int) -> None:
    asked = CASES[number]
    constants = asked.constants
    rounds = BLOCK // (32 * asked.warps)
    for built in compiled[number]:
        assert built.spills == 0, built.target
        assert not built.count(r"fma\.rn"), built.target
        # Nothing goes through shared memory, and no thread waits for another.
        assert not built.count(r"(ld|st)\.shared|bar\."), built.target
        # A position takes the high half of a product, in one instruction.
        assert built.count(r"mul\.hi\.u32") == rounds, built.target
        assert not built.count(r"(div|rem)\."), built.target
        if asked is _EXPAND:
            assert built.count(r"(red|atom)\.global\S*\.or\.b32") == rounds * (
                constants["BITS"] + 1
            )
            continue
        size = 32 if constants["DTYPE"] == "tl.float32" else 16
        assert built.count(rf"st\.global\.b{size}") == rounds, built.target
        values = constants["BITS"] * rounds * constants["APPLY"]
        assert built.count(r"ld\.global\.b8") == values, built.target
    assert [built.target for built in compiled[number]] == list(CUDA)
