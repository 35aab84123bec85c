"""Shared vectors in 8 and 4 bits: what they stand for, how far off, and who refuses what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore import ops
from tallstore.codecs.quantized import (
    BLOCK,
    FORMS,
    Floats,
    dequantize,
    quantize,
    quantized_size,
)
from tallstore.errors import CorruptStoreError, MismatchError, OptionError

forms = pytest.mark.parametrize("name", FORMS)


def draw(count: int, name: str, seed: int = 0) -> Floats:
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32) * 1e-3
    return values if FORMS[name].signed else np.abs(values)


@forms
@pytest.mark.parametrize("count", [0, 1, 2, 255, 256, 257, 511, 4096, 5001])
def test_every_size(name: str, count: int) -> None:
    form, values = FORMS[name], draw(count, name)
    raw = quantize(values, form)
    assert raw.dtype == np.uint8 and raw.size == quantized_size(count, form)
    assert np.array_equal(raw, quantize(values, form))
    found = dequantize(raw, count, form)
    assert found.dtype == np.float32 and found.shape == (count,)
    into = np.full(count, np.nan, np.float32)
    assert dequantize(raw, count, form, out=into) is into
    assert np.array_equal(found, into)


@forms
def test_bytes_are_the_documented_ones(name: str) -> None:
    form, count = FORMS[name], 2 * BLOCK + 3
    raw = quantize(draw(count, name), form)
    scales = torch.from_numpy(raw[:6].copy()).view(torch.bfloat16).float().tolist()
    found = dequantize(raw, count, form)
    for i in (0, 1, 255, 256, 511, 512, 513, 514):
        first, place = divmod(i * form.bits, 8)
        value = int(raw[6 + first]) >> place & (1 << form.bits) - 1
        if form.signed and value >= 1 << form.bits - 1:
            value -= 1 << form.bits
        assert float(found[i]) == value * scales[i // BLOCK]
    assert form.bits == 8 or raw[-1] >> 4 == 0


@forms
@pytest.mark.parametrize("seed", range(3))
def test_how_far_off(name: str, seed: int) -> None:
    form, values = FORMS[name], draw(1 << 16, name, seed)
    values[BLOCK : 2 * BLOCK] *= 1e6
    found = dequantize(quantize(values, form), values.size, form)
    blocks = values.reshape(-1, BLOCK)
    error = np.linalg.norm(blocks - found.reshape(-1, BLOCK), axis=1)
    share = error / np.linalg.norm(blocks, axis=1)
    limit = {"int8": 0.008, "uint8": 0.004, "int4": 0.12, "uint4": 0.06}[name]
    assert share.mean() < limit and share.max() < 2 * limit


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMS)),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40),
)
def test_within_half_a_step_or_cut_off(name: str, values: list[float]) -> None:
    form = FORMS[name]
    given_ = np.array(values, np.float32)
    given_ = given_ if form.signed else np.abs(given_)
    found = dequantize(quantize(given_, form), given_.size, form)
    assert np.isfinite(found).all()
    if given_.size:
        # No more than leaving everything zero would.
        exact = given_.astype(np.float64)
        assert np.square(exact - found).sum() <= np.square(exact).sum()


@forms
def test_zeros_and_the_ends_of_the_range(name: str) -> None:
    form = FORMS[name]
    zeros = dequantize(quantize(np.zeros(700, np.float32), form), 700, form)
    assert not zeros.any() and not np.signbit(zeros).any()
    most = np.full(300, np.finfo(np.float32).max, np.float32)
    found = dequantize(quantize(most, form), 300, form)
    assert np.isfinite(found).all() and (found > 0.97 * most).all()
    least = np.full(300, 1e-45, np.float32)
    assert np.isfinite(dequantize(quantize(least, form), 300, form)).all()


@forms
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    values = draw(300, name)
    values[7] = bad
    with pytest.raises(OptionError, match="not finite"):
        quantize(values, FORMS[name])


@pytest.mark.parametrize("name", ["uint8", "uint4"])
def test_negative_values_need_a_sign(name: str) -> None:
    with pytest.raises(OptionError, match="int8 or int4"):
        quantize(np.array([1.0, -1.0], np.float32), FORMS[name])


@forms
def test_another_size_is_refused(name: str) -> None:
    form = FORMS[name]
    raw = quantize(draw(1000, name), form)
    for wrong in (raw[:-1], np.append(raw, np.uint8(0))):
        with pytest.raises(CorruptStoreError, match="quantized vector"):
            dequantize(wrong, 1000, form)


@forms
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ops_give_the_same_bits(name: str, backend: str) -> None:
    for count in (1, 256, 5003):
        # Any bytes: scales that are not finite or negative, values that are not written.
        size = quantized_size(count, FORMS[name])
        raw = np.random.default_rng(1).integers(0, 256, size, np.uint8)
        out = torch.zeros(count)
        ops.dequantize(torch.from_numpy(raw), out, form=name, backend=backend)
        expected = torch.from_numpy(dequantize(raw, count, FORMS[name]))
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())
        assert torch.equal(out.signbit()[~out.isnan()], expected.signbit()[~out.isnan()])


def test_ops_refuse_what_does_not_fit() -> None:
    raw, out = torch.zeros(258 + 4, dtype=torch.uint8), torch.zeros(258)
    ops.dequantize(raw, out, form="int8")
    with pytest.raises(OptionError, match="int3"):
        ops.dequantize(raw, out, form="int3")
    wide = torch.zeros(300, dtype=torch.uint8)
    for wrong, into in (
        (raw[:-1], out),
        (raw.to(torch.int8), out),
        (raw.view(2, -1), out),
        (torch.zeros(2 * 262, dtype=torch.uint8)[::2], out),
        (wide[1 : 1 + 262], out),
        (raw, torch.zeros(258, dtype=torch.bfloat16)),
        (raw, torch.zeros(258, 1)),
    ):
        with pytest.raises(MismatchError):
            ops.dequantize(wrong, into, form="int8")
