"""`kernels/residual.py` against `tallstore.coding`, to the bit, and what compilers make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, draw_bytes, poison, poisoned, same, vast
from ptx import CUDA, Case, Compiled, compile_cases

pytest.importorskip("triton")

from tallstore import coding
from tallstore.kernels import reference
from tallstore.kernels.common import BLOCK, Shape
from tallstore.kernels.residual import add_residual

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def draw(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit patterns: NaN, infinities, subnormals, both zeros."""
    return draw_bytes(n * dtype.itemsize, seed=seed).view(dtype)


def zigzag_of(actual: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """What the CPU stores, as bytes."""
    name = str(actual.dtype).removeprefix("torch.")
    raw = [t.cpu().view(torch.uint8).numpy() for t in (actual, predicted)]
    return torch.from_numpy(coding.residual(*raw, name)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 1024, 2048, 2049, 5003])
def test_the_actual_bits_come_back(dtype: torch.dtype, n: int) -> None:
    actual, predicted = draw(n, dtype), draw(n, dtype, seed=7)
    # Close to it, as predictions are, and across zero.
    predicted[::2] = -actual[::2]
    predicted[::3] = actual[::3]
    zigzag = zigzag_of(actual, predicted)
    whole = poison(n + 128, dtype=dtype)
    out = whole[64 : 64 + n]
    add_residual(predicted, zigzag, out)
    assert same(out, actual)
    assert poisoned(whole[:64]) and poisoned(whole[64 + n :])
    assert same(reference.add_residual(predicted, zigzag), actual)
    add_residual(predicted, zigzag.view(predicted.dtype), predicted)
    assert same(predicted, actual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int16], ids=str)
def test_every_word_of_sixteen_bits(dtype: torch.dtype) -> None:
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).to(DEVICE)
    for predicted in (words, words.roll(1), words.flip(0), words.roll(20001)):
        out = poison(1 << 16, dtype=dtype)
        add_residual(
            predicted.view(dtype), zigzag_of(words.view(dtype), predicted.view(dtype)), out
        )
        assert same(out.view(torch.int16), words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_ends_of_the_range(dtype: torch.dtype) -> None:
    word = torch.int32 if dtype.itemsize == 4 else torch.int64
    least, most = torch.iinfo(word).min, torch.iinfo(word).max
    ends = torch.tensor([least, least + 1, -2, -1, 0, 1, 2, most - 1, most], dtype=word)
    ends = ends.view(dtype).to(DEVICE)
    actual, predicted = ends.repeat(9), ends.repeat_interleave(9)
    out = poison(81, dtype=dtype)
    add_residual(predicted, zigzag_of(actual, predicted), out)
    assert same(out, actual)


@pytest.mark.parametrize("flag", [False, True])
def test_bools(flag: bool) -> None:
    actual = torch.tensor([False, True, True, False], device=DEVICE)
    predicted = torch.full((4,), flag, device=DEVICE)
    out = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    add_residual(predicted, zigzag_of(actual, predicted), out)
    assert out.tolist() == actual.tolist()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2500),
    offset=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_views_at_odd_offsets(n: int, offset: int, dtype: torch.dtype, seed: int) -> None:
    actual, predicted = (draw(n + offset, dtype, seed=s)[offset:] for s in (seed, seed + 1))
    zigzag = zigzag_of(actual, predicted).view(dtype)
    out = poison(n + offset, dtype=dtype)[offset:]
    add_residual(predicted, zigzag, out)
    assert same(out, actual)


def test_a_part_only_in_place() -> None:
    n, start, stop = 6 * BLOCK, 2 * BLOCK, 4 * BLOCK + 101
    actual, predicted = draw(n, torch.bfloat16), draw(n, torch.bfloat16, seed=7)
    zigzag, out = zigzag_of(actual, predicted), predicted.clone()
    add_residual(out, zigzag, out, start=start, stop=stop, shape=Shape(blocks=1))
    assert same(out[start:stop], actual[start:stop])
    assert same(out[:start], predicted[:start]) and same(out[stop:], predicted[stop:])
    add_residual(out, zigzag, out, start=stop, stop=stop)
    assert same(out[stop:], predicted[stop:])


def test_past_the_31st_bit(tmp_path: Path) -> None:
    n = (1 << 31) + 3 * BLOCK + 5
    start = (1 << 31) + BLOCK
    out = vast(tmp_path / "out", n, torch.int8)
    zigzag = vast(tmp_path / "zigzag", n, torch.int8)
    actual = draw(n - start, torch.int8)
    out[start:] = draw(n - start, torch.int8, seed=7)
    zigzag[start:] = zigzag_of(actual, out[start:]).view(torch.int8)
    add_residual(out, zigzag, out, start=start)
    assert same(out[start:], actual)
    assert not out[: 2 * BLOCK].any() and not out[start - BLOCK : start].any()


CASES = [
    Case(
        module="tallstore.kernels.residual",
        kernel="residual_kernel",
        types={
            **dict.fromkeys(("predicted", "zigzag", "out"), f"*{kind}"),
            "start": "i64",
            "stop": "i64",
        },
        constants={"ORDERED": ordered, "TILE": 2 * BLOCK},
        odd=("stop",),
    )
    for kind, ordered in (("i8", False), ("i16", True), ("i32", True), ("i64", False))
]


@pytest.fixture(scope="module")
def compiled() -> list[list[Compiled]]:
    return compile_cases(CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_for_every_architecture(compiled: list[list[Compiled]], number: int) -> None:
    size = int(CASES[number].types["out"].removeprefix("*i")) // 8
    rounds = 2 * BLOCK * size // (16 * 32 * CASES[number].warps)
    for built in compiled[number]:
        assert built.spills == 0, built.target
        sixteen = r"\.v2\.b64" if size == 8 else r"\.v4\.b32"
        assert built.count(rf"ld\.global{sixteen}") == 2 * rounds, built.target
        assert built.count(rf"st\.global{sixteen}") == rounds, built.target
        assert not built.count(r"[a-z]+\.shared"), built.target
    assert [built.target for built in compiled[number]] == list(CUDA)
