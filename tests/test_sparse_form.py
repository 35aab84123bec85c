"""Codes in the compact form: from planes, and back to planes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arenas import compact, draw_codes, draw_levels, packed
from kernel_helpers import DEVICE, vast
from zoo import run_child

pytest.importorskip("triton")

from tallstore.kernels import common, reference, sparse
from tallstore.kernels import sparse_reference as plain
from tallstore.kernels.sparse import Cut
from tallstore.kernels.sparse_reference import BLOCK, GROUP, UNTOUCHED

CUTS = (Cut(groups=1, chunk=1024), Cut(groups=4, chunk=256, warps=2), Cut(groups=8, chunk=512))


@pytest.mark.parametrize("density", [0, 0.001, 0.02, 0.5, 1])
@pytest.mark.parametrize("count", range(1, 5))
def test_planes_become_entries_and_come_back(count: int, density: float) -> None:
    n = 3 * GROUP + 77
    codes = draw_codes(n, density, count)
    code = compact(codes, count)
    assert code.bits == count and code.weights == n and code.groups == 4
    (where,) = codes.nonzero(as_tuple=True)
    word = code.entries.cpu().long() & 0xFFFF
    assert torch.equal(word >> 12, codes[where])
    assert torch.equal(word & 0xFFF, where % GROUP)
    bounds = torch.arange(5) * GROUP
    assert torch.equal(code.starts.cpu(), torch.searchsorted(where, bounds))
    assert torch.equal(plain.expand(code), packed(codes, count))


@pytest.mark.parametrize("n", [0, 1, 7, 31, 33, 4095, 4096, 4097])
def test_bits_past_the_last_weight_are_no_entries(n: int) -> None:
    planes = torch.full((2, (n + 7) // 8 + 5), 0xFF, dtype=torch.uint8, device=DEVICE)
    code = plain.compress(planes, n, table=draw_levels(1, 2, UNTOUCHED))
    assert code.entries.numel() == n and code.starts[-1] == n
    assert torch.equal(reference.codes(plain.expand(code), n).cpu(), torch.full((n,), 3))


def test_compressing_goes_span_by_span(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = draw_codes(5 * GROUP + 9, 0.02, 2)
    whole = compact(codes, 2)
    monkeypatch.setattr(plain, "_SPAN", 2 * GROUP)
    pieces = compact(codes, 2)
    assert torch.equal(whole.entries, pieces.entries) and torch.equal(whole.starts, pieces.starts)


@pytest.mark.parametrize("density", [0, 0.001, 0.02, 1])
def test_expanding_overwrites_its_planes_and_nothing_else(density: float) -> None:
    n, width = 5 * GROUP + 45, plain.plane_bytes(5 * GROUP + 45)
    for count, shape in zip((1, 2, 3, 4), (None, *CUTS), strict=True):
        code = compact(draw_codes(n, density, count), count)
        whole = torch.full((count + 2, width + 64), 0xAA, dtype=torch.uint8, device=DEVICE)
        sparse.expand(code, whole[1:-1, 16:-48], shape=shape)
        assert torch.equal(whole[1:-1, 16 : 16 + width], plain.expand(code))
        whole[1:-1, 16 : 16 + width] = 0xAA
        assert (whole == 0xAA).all()


def test_expanding_entries_past_the_31st_bit(tmp_path: Path) -> None:
    code, low = compact(draw_codes(2 * GROUP, 0.02, 2), 2), (1 << 31) + 5
    entries = vast(tmp_path / "entries", low + code.entries.numel(), torch.int16)
    entries[low:] = code.entries
    planes = torch.zeros_like(plain.expand(code))
    sparse.expand(replace(code, entries=entries, starts=code.starts + low), planes)
    assert torch.equal(planes, plain.expand(code))


def test_blocks_are_the_same_everywhere() -> None:
    assert BLOCK == common.BLOCK and GROUP % BLOCK == 0


def test_the_plain_forms_need_no_triton() -> None:
    run_child(
        "import sys; sys.modules['triton'] = None\n"
        "import tallstore.kernels.sparse_reference, tallstore.kernels.seeded_reference"
    )
