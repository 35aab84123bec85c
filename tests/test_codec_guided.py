"""The codec of differences from known words: round trips, what it saves, and payloads that harm."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore import compiling, load, loading, pack
from tallstore.codecs import GUIDED, PLANES, Bytes
from tallstore.codecs.guided import DTYPES
from tallstore.coding import add_residual, from_float32, residual
from tallstore.dtypes import itemsize
from tallstore.errors import CorruptStoreError

#: Whether decoding is done by compiled loops.
WAYS = (False, True) if compiling.load() else (False,)
HEAD = struct.Struct("<IfhHI")
dtypes = pytest.mark.parametrize("dtype", DTYPES)
Floats = npt.NDArray[np.float32]


def finetune(count: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Weights, and the same moved: rows by amounts of their own, some not at all."""
    draw = np.random.default_rng(seed)
    base = draw.standard_normal(count).astype(np.float32) * np.float32(0.05)
    amount = np.repeat(np.exp2(draw.uniform(-14, -8, -(-count // 384))), 384)[:count]
    amount[: count // 5] = 0
    moved = base + (draw.standard_normal(count) * amount).astype(np.float32)
    return base, moved


def decode(payload: bytes, side: Bytes, dtype: str) -> Bytes:
    """With numpy, and with the compiled loops where numba is: the same bytes, or one refusal."""
    outs, refusals = [], []
    for way in WAYS:
        outs.append(np.full(side.size, 0xA5, np.uint8))
        with mock.patch.object(compiling, "loaded", return_value=way):
            try:
                GUIDED.decode(memoryview(payload), outs[-1], parameter=DTYPES[dtype], side=side)
            except CorruptStoreError as exc:
                refusals.append(exc)
    if refusals:
        assert [str(exc) for exc in refusals] == [str(refusals[0])] * len(WAYS)
        raise refusals[0]
    assert all(np.array_equal(out, outs[0]) for out in outs)
    return outs[0]


def check(data: Bytes, side: Bytes, dtype: str, min_gain: float = 0.05) -> bytes | None:
    before, known = data.copy(), side.copy()
    payload = GUIDED.encode(data, parameter=DTYPES[dtype], min_gain=min_gain, side=side)
    assert np.array_equal(data, before) and np.array_equal(side, known)
    if payload is not None:
        assert len(payload) <= (1 - min_gain) * data.size
        assert np.array_equal(decode(payload, side, dtype), data)
        again = GUIDED.encode(data, parameter=DTYPES[dtype], min_gain=min_gain, side=side)
        assert again == payload
    return payload


def differences(count: int, dtype: str, seed: int = 0) -> tuple[Bytes, Bytes]:
    base, moved = finetune(count, seed)
    side = from_float32(base, dtype)
    return residual(from_float32(moved, dtype), side, dtype), side


@dtypes
@pytest.mark.parametrize("count", [1, 127, 128, 129, 4096, (1 << 17) + 321])
def test_round_trip_of_a_finetune(dtype: str, count: int) -> None:
    data, side = differences(count, dtype)
    payload = check(data, side, dtype, min_gain=-500)
    assert payload is not None


@dtypes
def test_much_less_than_byte_planes(dtype: str) -> None:
    data, side = differences(1 << 18, dtype)
    payload = check(data, side, dtype)
    planes = PLANES.encode(data, parameter=itemsize(dtype), min_gain=0.05)
    assert payload is not None and planes is not None
    # In float32 most of it is noise that nothing makes smaller.
    assert len(payload) < (0.96 if dtype == "float32" else 0.85) * len(planes)


def test_what_decayed_alone_costs_little() -> None:
    base, _ = finetune(1 << 17)
    moved = base.copy()
    for _ in range(50):
        moved *= np.float32(1 - 3e-6)
    side = base.view(np.uint8)
    data = residual(moved.view(np.uint8), side, "float32")
    payload = check(data, side, "float32")
    assert payload is not None
    factor = HEAD.unpack_from(payload)[1]
    assert abs(factor - (1 - 50 * 3e-6)) < 1e-5
    planes = PLANES.encode(data, parameter=4, min_gain=0.05)
    assert planes is not None and len(payload) < 0.7 * len(planes)


@dtypes
def test_no_difference_costs_nothing(dtype: str) -> None:
    base, _ = finetune(1 << 16)
    side = from_float32(base, dtype)
    payload = check(np.zeros_like(side), side, dtype)
    assert payload is not None and len(payload) < 100


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    count=st.integers(1, 700),
    scale=st.sampled_from([0.05, 0.4, 3.0, 40.0, 500.0, 1e5, 1e9]),
    seed=st.integers(0, 999),
)
def test_any_words(dtype: str, count: int, scale: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    word = np.uint32 if dtype == "float32" else np.uint16
    # NaN, infinities, subnormals and both zeros in `side`.
    side = draw.integers(0, 256, count * itemsize(dtype), np.uint8)
    most = float(np.iinfo(word).max)
    data = np.minimum(draw.exponential(scale, count), most).astype(word)
    data[draw.random(count) < 0.01] = np.iinfo(word).max
    data[: seed % 300] = 0
    check(data.view(np.uint8), side, dtype, min_gain=-500)


def test_where_special_values_are_not_scaled() -> None:
    base, _ = finetune(1 << 14)
    base[::1000] = np.nan
    base[1::1000] = np.inf
    base[2::1000] = 1e-42
    side = base.view(np.uint8)
    moved = (base * np.float32(0.999)).view(np.uint32)
    moved[::1000] = base.view(np.uint32)[::1000] + 5
    data = residual(moved.view(np.uint8), side, "float32")
    payload = check(data, side, "float32")
    assert payload is not None and HEAD.unpack_from(payload)[1] != 1


def test_nothing_without_side() -> None:
    data, side = differences(1 << 14, "bfloat16")
    for wrong in (None, side[:-2]):
        assert GUIDED.encode(data, parameter=1, min_gain=0.05, side=wrong) is None
        payload = check(data, side, "bfloat16")
        assert payload is not None
        with pytest.raises(CorruptStoreError, match="without the words"):
            GUIDED.decode(memoryview(payload), np.empty_like(data), parameter=1, side=wrong)
    with pytest.raises(CorruptStoreError, match="dtype 7"):
        GUIDED.decode(memoryview(payload), np.empty_like(data), parameter=7, side=side)


def test_other_words_are_found_out_or_give_other_bytes() -> None:
    data, side = differences(1 << 14, "bfloat16")
    _, other = differences(1 << 14, "bfloat16", seed=1)
    payload = check(data, side, "bfloat16")
    assert payload is not None
    try:
        assert not np.array_equal(decode(payload, other, "bfloat16"), data)
    except CorruptStoreError as exc:
        assert "differences" in str(exc)


@dtypes
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_raises_only_corrupt_store_error(dtype: str, data: st.DataObject) -> None:
    raw, side = differences(3000, dtype)
    payload = bytearray(check(raw, side, dtype) or b"")
    assert payload
    for _ in range(data.draw(st.integers(1, 3))):
        # Mostly in the heads, where lengths and counts are.
        end = data.draw(st.sampled_from([40, 200, len(payload)]))
        payload[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    try:
        decode(bytes(payload), side, dtype)
    except CorruptStoreError as exc:
        assert str(exc)
    with pytest.raises(CorruptStoreError):
        decode(bytes(payload[:cut]) + b"\0" * (cut == len(payload)), side, dtype)


def test_torch_agrees_on_the_exponents() -> None:
    # The contexts rest on where a dtype has its exponent.
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        ones = torch.full((1 << 12,), 1.5).to(dtype)
        moved = (ones.float() + torch.linspace(0, 0.1, 1 << 12)).to(dtype)
        side = ones.view(torch.uint8).numpy()
        check(residual(moved.view(torch.uint8).numpy(), side, name), side, name)


# -- payloads that `encode` does not write, but may be read ------------------------------------


def contexts_of(side: Bytes, dtype: str, classes: Bytes, first: int) -> npt.NDArray[np.int64]:
    """As FORMAT.md says."""
    word, mantissa, bits, unit = {
        "bfloat16": (np.uint16, 7, 8, 134),
        "float16": (np.uint16, 10, 5, 25),
        "float32": (np.uint32, 23, 8, 150),
    }[dtype]
    exponents = side.view(word).astype(np.int64) >> mantissa & (1 << bits) - 1
    kinds = np.repeat(classes.astype(np.int64), 128)[: exponents.size]
    ratio = kinds + first + 2 * unit + 10 - 2 * np.maximum(exponents, 1)
    return np.where(kinds == 0, 0, np.clip(ratio, 1, 63))


def body(data: bytes) -> bytes:
    return struct.pack("<I", len(data) | 1 << 31) + data


def any_payload(
    draw: np.random.Generator, side: Bytes, dtype: str, factor: float, change: int = 0
) -> bytes:
    """Groups of any shift and width, some with large values; `change`: words too many of one."""
    count, bits = side.size // itemsize(dtype), 8 * itemsize(dtype)
    classes = draw.integers(0, 12, -(-count // 128)).astype(np.uint8)
    classes[0] += 1
    first = int(draw.integers(-60, 20))
    sizes = np.bincount(contexts_of(side, dtype, classes, first), minlength=64)[1:]
    if change:
        at = draw.choice(np.flatnonzero(sizes))
        sizes[at] = max(sizes[at] + change, 0)
    heads, bodies, many = b"", body(classes.tobytes()), 0
    for context in np.flatnonzero(sizes) + 1:
        size = int(sizes[context - 1])
        width, shift = int(draw.choice([1, 2, 4, 8])), 2 * int(draw.integers(0, bits // 2))
        heads += struct.pack("<BBBBI", context, shift, width, 0, size)
        symbols = draw.integers(0, 256, -(-size * width // 8)).astype(np.uint8)
        if width == 8 and draw.random() < 0.5:
            symbols |= np.uint8(0xF0)
        per = np.unpackbits(symbols, bitorder="little").reshape(-1, width)[:size]
        many += int(per.all(axis=1).sum())
        bodies += body(symbols.tobytes())
        while shift:
            part = 8 if shift >= 8 else 4 if shift >= 4 else 2
            bodies += body(draw.bytes(-(-size * part // 8)))
            shift -= part
    bodies += body(draw.bytes(4 * many))
    groups = np.count_nonzero(sizes)
    return HEAD.pack(count, factor, first, groups, many) + heads + bodies


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    count=st.integers(1, 20000),
    factor=st.sampled_from([1.0, 0.999, -2.5, 0.0, 1e30, np.inf, -np.inf, np.nan]),
    change=st.sampled_from([0, 0, 0, 1, -1, -9000, 9000]),
    seed=st.integers(0, 9999),
)
def test_any_groups(dtype: str, count: int, factor: float, change: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    side = draw.integers(0, 256, count * itemsize(dtype), np.uint8)
    if seed % 2:
        side = from_float32(finetune(count, seed)[0], dtype)
    payload = any_payload(draw, side, dtype, factor if dtype == "float32" else 1.0)
    decode(payload, side, dtype)
    if change:
        payload = any_payload(draw, side, dtype, 1.0, change)
        with pytest.raises(CorruptStoreError, match=r"too (long|short)|cannot be|are expected"):
            decode(payload, side, dtype)


def test_words_that_are_not_where_words_are() -> None:
    """Numpy reads and writes them; what is compiled would have to be compiled for them."""
    data, side = differences(5000, "float32")
    payload = GUIDED.encode(data, parameter=3, min_gain=-500, side=side)
    assert payload is not None
    for place in (0, 1):
        out = np.zeros(side.size + 1, np.uint8)[place : place + side.size]
        there = np.concatenate([np.zeros(1 - place, np.uint8), side])[1 - place :]
        GUIDED.decode(memoryview(payload), out, parameter=3, side=there)
        assert np.array_equal(out, data)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([*sorted(DTYPES), "float64", "int32"]),
    count=st.integers(0, 3000),
    where=st.sampled_from(["new", "other", "same"]),
    seed=st.integers(0, 999),
)
def test_differences_added_to_words(dtype: str, count: int, where: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    size = count * itemsize(dtype)
    actual, known = (draw.integers(0, 256, size, np.uint8) for _ in range(2))
    folded = residual(actual, known, dtype)
    for way in WAYS:
        with mock.patch.object(compiling, "loaded", return_value=way):
            start = known.copy()
            out = {"new": None, "other": np.zeros_like(known), "same": start}[where]
            found = add_residual(start, folded, dtype, out)
        assert np.array_equal(found, actual) and (out is None or found is out)
        assert where == "same" or np.array_equal(start, known)


def test_a_load_of_many_weights_takes_the_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, moved = (torch.from_numpy(w) for w in finetune(1 << 14))
    pack(tmp_path / "z.tall", {"w": base}, {"t": {"w": moved}}, exact=True)
    asked: list[bool] = []
    monkeypatch.setattr(loading, "compiling", SimpleNamespace(load=lambda: asked.append(True)))
    for least, fidelity, loads in ((1 << 14, None, 1), (1 << 14, "codes", 0), (1 << 15, None, 0)):
        monkeypatch.setattr(loading, "_MANY_EXACT", least)
        asked.clear()
        found = load(tmp_path / "z.tall", task="t", fidelity=fidelity)["w"]
        assert len(asked) == loads
        assert fidelity or torch.equal(found, moved)
