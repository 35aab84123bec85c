"""`kernels/dequantize.py` against the plain form, to the bit, and what compilers make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, draw, draw_bytes, nans, same, vast
from ptx import CUDA, Case, Compiled, compile_cases

pytest.importorskip("triton")

from tallstore import ops
from tallstore.codecs import quantized
from tallstore.kernels import reference
from tallstore.kernels.common import BLOCK, Shape
from tallstore.kernels.dequantize import dequantize

FORMS = [(8, True), (8, False), (4, True), (4, False)]
forms = pytest.mark.parametrize(("bits", "signed"), FORMS)


def scales_of(n: int, seed: int = 3) -> torch.Tensor:
    return draw(-(-n // 256), torch.bfloat16, seed=seed, scale=1e-3)


def test_a_scale_serves_as_many_weights_everywhere() -> None:
    assert reference.SCALED == quantized.BLOCK


@forms
@pytest.mark.parametrize("n", [1, 2, 3, 4, 255, 256, 257, 1023, 1024, 1025, 2048, 2049, 5003])
@pytest.mark.parametrize("shape", [Shape(), Shape(blocks=2), Shape(blocks=4, warps=8)])
def test_sizes_around_the_block(bits: int, signed: bool, n: int, shape: Shape) -> None:
    values, scales = draw_bytes((n * bits + 7) // 8), scales_of(n)
    whole = nans(n + 32, torch.float32)
    dequantize(values, scales, whole[16 : 16 + n], bits=bits, signed=signed, shape=shape)
    expected = reference.dequantize(values, scales, n, bits=bits, signed=signed)
    assert same(whole[16 : 16 + n], expected)
    assert whole[:16].isnan().all() and whole[16 + n :].isnan().all()


@forms
def test_every_byte(bits: int, signed: bool) -> None:
    values = torch.arange(256, dtype=torch.uint8).to(DEVICE)
    n = 256 * 8 // bits
    scales, out = scales_of(n), nans(n, torch.float32)
    dequantize(values, scales, out, bits=bits, signed=signed)
    assert same(out, reference.dequantize(values, scales, n, bits=bits, signed=signed))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2500),
    offset=st.integers(0, 9),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_views_at_odd_offsets(n: int, offset: int, form: tuple[int, bool], seed: int) -> None:
    bits, signed = form
    values = draw_bytes((n * bits + 7) // 8 + offset, seed=seed)[offset:]
    scales = scales_of(n + 256 * offset)[offset:]
    out = nans(n + offset, torch.float32)[offset:]
    dequantize(values, scales, out, bits=bits, signed=signed)
    assert same(out, reference.dequantize(values, scales, n, bits=bits, signed=signed))


@forms
def test_a_part_only(bits: int, signed: bool) -> None:
    n, start, stop = 6 * BLOCK, 2 * BLOCK, 4 * BLOCK + 101
    values, scales = draw_bytes(n * bits // 8), scales_of(n)
    out = nans(n, torch.float32)
    dequantize(values, scales, out, bits=bits, signed=signed, start=start, stop=stop)
    expected = reference.dequantize(values, scales, n, bits=bits, signed=signed)
    assert same(out[start:stop], expected[start:stop])
    assert out[:start].isnan().all() and out[stop:].isnan().all()
    dequantize(values, scales, out[:start], bits=bits, signed=signed, start=start)
    assert out[:start].isnan().all()


def test_past_the_31st_bit(tmp_path: Path) -> None:
    n = (1 << 31) + 3 * BLOCK + 5
    start = (1 << 31) + BLOCK
    values = vast(tmp_path / "values", (n + 1) // 2, torch.uint8)
    scales = vast(tmp_path / "scales", -(-n // 256), torch.bfloat16)
    out = vast(tmp_path / "out", n, torch.float32)
    values[start // 2 :] = draw_bytes((n - start + 1) // 2)
    scales[start // 256 :] = scales_of(n - start)
    dequantize(values, scales, out, bits=4, signed=True, start=start)
    expected = reference.dequantize(
        values[start // 2 :], scales[start // 256 :], n - start, bits=4, signed=True
    )
    assert same(out[start:], expected)
    assert not out[: 2 * BLOCK].any() and not out[start - BLOCK : start].any()


@pytest.mark.parametrize("name", quantized.FORMS)
def test_ops_launch_it(name: str) -> None:
    size = quantized.quantized_size(5003, quantized.FORMS[name])
    values = draw(5003, torch.float32).abs().cpu().numpy()
    raw = torch.from_numpy(quantized.quantize(values, quantized.FORMS[name])).to(DEVICE)
    assert raw.numel() == size
    out, plain = nans(5003, torch.float32), nans(5003, torch.float32)
    ops.dequantize(raw, out, form=name, backend="triton")
    ops.dequantize(raw, plain, form=name, backend="reference")
    assert same(out, plain)


CASES = [
    Case(
        module="tallstore.kernels.dequantize",
        kernel="dequantize_kernel",
        types={
            "values": "*i8",
            "scales": "*bf16",
            "out": "*fp32",
            "start": "i64",
            "stop": "i64",
        },
        constants={"BITS": bits, "SIGNED": signed, "SCALED": 256, "TILE": 2 * BLOCK},
        odd=("stop",),
    )
    for bits, signed in FORMS
]


@pytest.fixture(scope="module")
def compiled() -> list[list[Compiled]]:
    return compile_cases(CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_for_every_architecture(compiled: list[list[Compiled]], number: int) -> None:
    rounds = 2 * BLOCK // (4 * 32 * CASES[number].warps)
    for built in compiled[number]:
        assert built.spills == 0, built.target
        assert built.count(r"st\.global\.v4\.b32") == rounds, built.target
        assert not built.count(r"st\.global\.v2"), built.target
        assert not built.count("fma"), built.target
        assert not built.count(r"[a-z]+\.shared"), built.target
    assert [built.target for built in compiled[number]] == list(CUDA)
