"""`kernels/count.py` and `kernels/overlaps.py` against numpy and the plain forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, draw_bytes, poison, poisoned, same, vast
from ptx import CUDA, Case, Compiled, compile_cases

pytest.importorskip("triton")

from tallstore.kernels import reference
from tallstore.kernels.common import BLOCK, Shape
from tallstore.kernels.count import at_least, count_uses, use_histogram
from tallstore.kernels.overlaps import overlaps

SMALL = Shape(blocks=1)


def flags_of(masks: torch.Tensor, start: int, stop: int) -> np.ndarray:
    rows = np.unpackbits(masks.cpu().numpy(), axis=1, bitorder="little")
    return rows[:, start:stop]


def draw_masks(tasks: int, weights: int, seed: int = 1) -> torch.Tensor:
    """Rows at multiples of 16 bytes, with ones past the end; some masks alike, some opposite."""
    masks = draw_bytes(tasks, -(-weights // 128) * 16, seed=seed)
    if tasks > 2:
        masks[tasks // 2] = masks[0]
        masks[-1] = ~masks[0]
    return masks[:, : (weights + 7) // 8]


def check(masks: torch.Tensor, start: int, stop: int, shape: Shape | None = None) -> None:
    how = {} if shape is None else {"shape": shape}
    tasks, size = masks.shape
    flags = flags_of(masks, start, stop)
    uses = flags.sum(0, dtype=np.int64)

    whole = poison(stop + 64)
    out = whole[16 : 16 + stop]
    count_uses(masks, out, start=start, **how)
    assert out[start:].tolist() == uses.tolist()
    assert poisoned(whole[: 16 + start]) and poisoned(whole[16 + stop :])
    assert same(out[start:], reference.count_uses(masks, start=start, stop=stop))

    histogram = poison(tasks + 1, dtype=torch.int64)
    use_histogram(masks, histogram, start=start, stop=stop, **how)
    assert histogram.tolist() == np.bincount(uses, minlength=tasks + 1).tolist()
    assert same(histogram, reference.use_histogram(masks, start=start, stop=stop))

    pairs = poison(tasks, tasks, dtype=torch.int64)
    overlaps(masks, pairs, start=start, stop=stop, **how)
    assert pairs.tolist() == (flags.astype(np.int64) @ flags.T.astype(np.int64)).tolist()
    assert same(pairs, reference.overlaps(masks, start=start, stop=stop))

    for least in (0, 1, tasks // 2 + 1, tasks):
        rows = poison(size + 48)
        plane = rows[16 : 16 + size]
        at_least(masks, least, plane, start=start, stop=stop, **how)
        wanted = np.packbits(uses >= least, bitorder="little")
        assert plane[start // 8 :].tolist() == wanted.tolist(), least
        assert poisoned(rows[: 16 + start // 8]) and poisoned(rows[16 + size :])
        assert same(plane[start // 8 :], reference.at_least(masks, least, start=start, stop=stop))


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 9, 17])
def test_numbers_of_tasks(tasks: int) -> None:
    check(draw_masks(tasks, 4 * BLOCK + 300), 0, 4 * BLOCK + 300, SMALL)


def test_every_number_of_uses() -> None:
    """Mask t has the weights past t, so that weight w has min(w, 64) uses."""
    weights = 4 * BLOCK
    flags = np.arange(weights)[None, :] > np.arange(64)[:, None]
    masks = torch.from_numpy(np.packbits(flags, axis=1, bitorder="little")).to(DEVICE)
    uses = np.minimum(np.arange(weights), 64)
    out = poison(weights)
    count_uses(masks, out)
    assert out.tolist() == uses.tolist()
    histogram = poison(65, dtype=torch.int64)
    use_histogram(masks, histogram, stop=weights)
    assert histogram.tolist() == [1] * 64 + [weights - 64]
    for least in (0, 1, 2, 31, 32, 33, 63, 64, 65):
        plane = poison(weights // 8)
        at_least(masks, least, plane, stop=weights, shape=SMALL)
        assert plane.tolist() == np.packbits(uses >= least, bitorder="little").tolist(), least


@pytest.mark.parametrize("weights", [1, 7, 9, 33, 1023, 1024, 1025, 2048, 4095, 4096, 16385, 33000])
def test_sizes_around_the_tiles(weights: int) -> None:
    check(draw_masks(3, weights), 0, weights)
    check(draw_masks(2, weights), 0, weights, Shape(blocks=2, warps=8))


@settings(max_examples=15, deadline=None)
@given(
    tasks=st.integers(1, 4),
    blocks=st.integers(0, 2),
    tail=st.integers(1, 1300),
    offset=st.integers(0, 17),
    extra=st.integers(0, 17),
    seed=st.integers(0, 99),
)
def test_views_at_odd_offsets(
    tasks: int, blocks: int, tail: int, offset: int, extra: int, seed: int
) -> None:
    start = blocks * BLOCK
    size = (start + tail + 7) // 8
    masks = draw_bytes(tasks, offset + size + extra, seed=seed)[:, offset : offset + size]
    check(masks, start, start + tail, SMALL)


def test_nothing_to_do() -> None:
    masks, out = draw_masks(3, BLOCK), poison(BLOCK)
    count_uses(masks, out, start=BLOCK)
    at_least(masks, 1, out, start=BLOCK, stop=BLOCK)
    assert poisoned(out)
    histogram, pairs = poison(4, dtype=torch.int64), poison(3, 3, dtype=torch.int64)
    use_histogram(masks, histogram, start=BLOCK, stop=BLOCK)
    overlaps(masks, pairs, start=BLOCK, stop=BLOCK)
    assert not histogram.any() and not pairs.any()


def test_rows_far_from_each_other(tmp_path: Path) -> None:
    stride, weights = (1 << 30) + 64, 3 * BLOCK + 77
    size = (weights + 7) // 8
    far = vast(tmp_path / "far", 3 * stride + size, torch.uint8)
    masks = far.as_strided((4, size), (stride, 1))
    masks[:] = draw_bytes(4, size)
    check(masks, 0, weights, SMALL)


def test_past_the_31st_bit(tmp_path: Path) -> None:
    n = (1 << 31) + 3 * BLOCK + 5
    start = (1 << 31) + BLOCK
    size, first = (n + 7) // 8, start // 8
    masks = vast(tmp_path / "masks", 2 * size, torch.uint8).view(2, size)
    masks[:, first:] = draw_bytes(2, size - first)
    end = masks[:, first:].clone()
    uses = vast(tmp_path / "uses", n, torch.uint8)
    count_uses(masks, uses, start=start)
    assert same(uses[start:], reference.count_uses(end, stop=n - start))
    assert not uses[: 4 * BLOCK].any() and not uses[start - BLOCK : start].any()
    plane = vast(tmp_path / "plane", size, torch.uint8)
    at_least(masks, 2, plane, start=start, stop=n)
    assert same(plane[first:], reference.at_least(end, 2, stop=n - start))
    assert not plane[: 4 * BLOCK].any()
    histogram, pairs = poison(3, dtype=torch.int64), poison(2, 2, dtype=torch.int64)
    use_histogram(masks, histogram, start=start, stop=n)
    overlaps(masks, pairs, start=start, stop=n)
    assert same(histogram, reference.use_histogram(end, stop=n - start))
    assert same(pairs, reference.overlaps(end, stop=n - start))


# -- what compilers make of it -------------------------------------------------------------


def case(kernel: str, blocks: int, word: str, out: str, **constants: int) -> Case:
    return Case(
        module=f"tallstore.kernels.{'overlaps' if kernel == 'overlaps_kernel' else 'count'}",
        kernel=kernel,
        types={
            "masks": "*u8",
            "stride": "i64",
            "tasks": "i32",
            "least": "i32",
            "out": out,
            "start": "i64",
            "stop": "i64",
        },
        constants={"BLOCKS": blocks, "BLOCK": BLOCK, "WORD": word, **constants},
        odd=("tasks", "least", "start", "stop"),
    )


CASES = [
    case("uses_kernel", 2, "tl.uint16", "*u8", PLACES=5),
    case("at_least_kernel", 16, "tl.uint32", "*u8"),
    case("histogram_kernel", 16, "tl.uint32", "*i64"),
    case("overlaps_kernel", 32, "tl.uint32", "*i64"),
]


@pytest.fixture(scope="module")
def compiled() -> list[list[Compiled]]:
    return compile_cases(CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_for_every_architecture(compiled: list[list[Compiled]], number: int) -> None:
    kernel = CASES[number].kernel
    for built in compiled[number]:
        assert built.spills == 0, built.target
        if kernel == "uses_kernel":
            # A thread takes two bytes of each mask: eight masks under way, one store of 16 bytes.
            assert built.count(r"ld\.global\.b16") == 8, built.target
        elif kernel == "overlaps_kernel":
            # Two loads of the one task, two of the other.
            assert built.count(r"ld\.global\.v4\.b32") == 4, built.target
        else:
            assert built.count(r"ld\.global\.v4\.b32") == 8, built.target
        if kernel in ("uses_kernel", "at_least_kernel"):
            assert built.count(r"st\.global\.v4\.b32") == 1, built.target
            assert not built.count(r"[a-z]+\.shared"), built.target
        else:
            assert built.count(r"popc\.b32"), built.target
            assert built.count(r"(atom|red)\.global.*\.add"), built.target
    assert [built.target for built in compiled[number]] == list(CUDA)
