"""`kernels/unpack.py` against numpy and the plain form, and what compilers make of it."""

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

from tallstore.bits import unpack_bits
from tallstore.kernels import reference
from tallstore.kernels.common import BLOCK, Shape
from tallstore.kernels.unpack import unpack


def expected(planes: torch.Tensor, n: int) -> torch.Tensor:
    return reference.codes(planes, n).to(torch.uint8)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("shape", [Shape(), Shape(blocks=2), Shape(blocks=4, warps=8)])
def test_sizes_around_the_block(n: int, shape: Shape) -> None:
    for count in range(1, 5):
        planes = draw_bytes(count, (n + 7) // 8)
        whole = poison(n + 64)
        unpack(planes, whole[16 : 16 + n], shape=shape)
        assert same(whole[16 : 16 + n], expected(planes, n)), count
        assert poisoned(whole[:16]) and poisoned(whole[16 + n :])


def test_every_byte_of_four_planes() -> None:
    planes = torch.stack([torch.arange(256).roll(37 * k) for k in range(4)]).to(torch.uint8)
    out = poison(2048)
    unpack(planes.to(DEVICE), out)
    rows = np.stack([unpack_bits(plane.numpy(), 2048) for plane in planes])
    assert out.tolist() == (rows << np.arange(4)[:, None]).sum(0).tolist()


def test_bools() -> None:
    plane = draw_bytes(1, 200)
    out = torch.zeros(1597, dtype=torch.bool, device=DEVICE)
    unpack(plane, out)
    assert out.tolist() == unpack_bits(plane[0].cpu().numpy(), 1597).tolist()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 2500), offset=st.integers(0, 9), seed=st.integers(0, 99))
def test_views_at_odd_offsets(n: int, offset: int, seed: int) -> None:
    planes = draw_bytes(2, (n + 7) // 8 + offset, seed=seed)[:, offset:]
    out = poison(n + offset)[offset:]
    unpack(planes, out)
    assert same(out, expected(planes, n))


def test_a_part_only() -> None:
    n, start, stop = 6 * BLOCK, 2 * BLOCK, 4 * BLOCK + 101
    planes, out = draw_bytes(3, n // 8), poison(n)
    unpack(planes, out, start=start, stop=stop)
    assert same(out[start:stop], expected(planes, n)[start:stop])
    assert poisoned(out[:start]) and poisoned(out[stop:])
    unpack(planes, out[:start], start=start)
    assert poisoned(out[:start])


def test_past_the_31st_bit(tmp_path: Path) -> None:
    n = (1 << 31) + 3 * BLOCK + 5
    start = (1 << 31) + BLOCK
    planes = vast(tmp_path / "planes", 2 * ((n + 7) // 8), torch.uint8).view(2, -1)
    out = vast(tmp_path / "out", n, torch.uint8)
    planes[:, start // 8 :] = draw_bytes(2, (n - start + 7) // 8)
    unpack(planes, out, start=start)
    assert same(out[start:], expected(planes[:, start // 8 :], n - start))
    assert not out[: 2 * BLOCK].any() and not out[start - BLOCK : start].any()


def test_planes_far_from_each_other(tmp_path: Path) -> None:
    stride = (1 << 31) + 16
    planes = vast(tmp_path / "far", stride + 256, torch.uint8).as_strided((2, 256), (stride, 1))
    planes[:] = draw_bytes(2, 256)
    out = poison(2048)
    unpack(planes, out)
    assert same(out, expected(planes, 2048))


CASES = [
    Case(
        module="tallstore.kernels.unpack",
        kernel="unpack_kernel",
        types={
            "planes": "*u8",
            "plane_stride": "i64",
            "out": "*u8",
            "start": "i64",
            "stop": "i64",
        },
        constants={"PLANES": count, "TILE": 2 * BLOCK},
        odd=("stop",),
    )
    for count in (1, 4)
]


@pytest.fixture(scope="module")
def compiled() -> list[list[Compiled]]:
    return compile_cases(CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_for_every_architecture(compiled: list[list[Compiled]], number: int) -> None:
    for built in compiled[number]:
        assert built.spills == 0, built.target
        assert built.count(r"st\.global\.v4\.b32") == 1, built.target
        # A thread's two bytes of a plane come at once.
        assert built.count(r"ld\.global\.b16") >= CASES[number].constants["PLANES"], built.target
        assert not built.count(r"[a-z]+\.shared"), built.target
    assert [built.target for built in compiled[number]] == list(CUDA)
