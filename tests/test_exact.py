"""With the exact tier every task comes back bit for bit, whatever it is."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import State, bits, fine_tune, make_base

import tallstore
from tallstore.coding import add_residual, residual
from tallstore.dtypes import torch_dtype
from tallstore.errors import OptionError


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "z.tall"
    assert [p.name for p in tmp_path.iterdir()] == ["z.tall"], "litter"


def _plain(base: State) -> State:
    return fine_tune(base, 1)


def _not_finite(base: State) -> State:
    state = fine_tune(base, 2)
    state["norm.weight"][2] = float("inf")
    state["scale"] = torch.tensor(struct.unpack("<f", b"\x01\x02\xa0\xff")[0])
    odd = torch.tensor([0x7F800001, -1, 0x7FC12345], dtype=torch.int32).view(torch.float32)
    state["layers.0.bias"][:3] = odd  # signalling and negative NaN, with payloads
    return state


def _wide_head(base: State) -> State:
    state = fine_tune(base, 3)
    state["head.weight"] = torch.linspace(-1, 1, 8 * 65).view(8, 65)
    return state


def _more_rows(base: State) -> State:
    state = fine_tune(base, 4)
    more = torch.linspace(-1, 1, 5 * 16).view(5, 16)
    state["embed.weight"] = torch.cat([state["embed.weight"], more])
    return state


def _fewer_rows(base: State) -> State:
    state = fine_tune(base, 5)
    state["embed.weight"] = state["embed.weight"][:30].clone()
    return state


def _integers(base: State) -> State:
    state = fine_tune(base, 6)
    state["positions"] = state["positions"].flip(0) - (1 << 40)
    return state


def _bfloat16(base: State) -> State:
    return fine_tune(base, 7, dtype=torch.bfloat16)


def _float16(base: State) -> State:
    return fine_tune(base, 8, dtype=torch.float16)


def _two_dtypes(base: State) -> State:
    state = fine_tune(base, 9)
    state["head.weight"] = state["head.weight"].bfloat16()
    state["scale"] = state["scale"].double()
    return state


def _missing_and_extra(base: State) -> State:
    state = fine_tune(base, 10)
    del state["layers.1.weight"]
    state["adapter"] = torch.arange(33.0)
    state["flags"] = torch.tensor([True, False])
    return state


def _reordered(base: State) -> State:
    return dict(sorted(fine_tune(base, 11).items(), reverse=True))


def _equal(base: State) -> State:
    return {name: tensor.clone() for name, tensor in base.items()}


def _zeros(base: State) -> State:
    """Signs of zeros differ from the base's, and nothing else."""
    return {name: -t if t.is_floating_point() else t.clone() for name, t in base.items()}


def _denormal(base: State) -> State:
    state = fine_tune(base, 12)
    state["norm.weight"] = torch.tensor([1e-45, -1e-45, 1e-40, 0.0, -0.0, 3.4e38, -3.4e38])
    return state


ODD: list[Callable[[State], State]] = [
    _plain,
    _not_finite,
    _wide_head,
    _more_rows,
    _fewer_rows,
    _integers,
    _bfloat16,
    _float16,
    _two_dtypes,
    _missing_and_extra,
    _reordered,
    _equal,
    _zeros,
    _denormal,
]


def _zoo(base: State) -> dict[str, State]:
    return {make.__name__.strip("_"): make(base) for make in ODD}


@pytest.mark.parametrize("merge", ["ta", "ties"])
@pytest.mark.parametrize("vector_dtype", ["float32", "bfloat16", "float16"])
def test_a_zoo_of_oddities(path: Path, merge: str, vector_dtype: str) -> None:
    base = make_base()
    tasks = _zoo(base)
    tallstore.pack(path, base, tasks, merge=merge, vector_dtype=vector_dtype, exact=True)
    with tallstore.open(path) as store:
        assert list(store.tasks) == list(tasks)
        for name, state in tasks.items():
            assert store.tasks[name].exact
            assert_same(store.load(name), state)
            assert_same(store.load(name, fidelity="exact"), state)
        assert_same(store.load(), base)
        assert store.verify().ok
        # the residual is what makes it so
        codes = store.load("plain", fidelity="codes")
        assert bits(codes["embed.weight"]) != bits(tasks["plain"]["embed.weight"])


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_zoo_of_oddities_over_other_bases(path: Path, base_dtype: torch.dtype) -> None:
    base = make_base(1, base_dtype)
    if base_dtype == torch.float64:
        base["embed.weight"] = base["embed.weight"].float()  # something to mask
        base["layers.0.weight"] = base["layers.0.weight"].float()
    tasks = _zoo(base)
    if base_dtype == torch.float64:
        for name in ("bfloat16", "float16", "not_finite"):
            tasks.pop(name)
    tallstore.pack(path, base, tasks, exact=True)
    for name, state in tasks.items():
        assert_same(tallstore.load(path, task=name), state)


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__.strip("_"))
def test_each_oddity_as_a_saved_and_an_added_task(
    path: Path, make: Callable[[State], State]
) -> None:
    base = make_base()
    tallstore.save(base, path)
    state = make(base)
    tallstore.save(state, path, task="saved")
    tallstore.add(path, {"added": state})
    assert_same(tallstore.load(path, task="saved"), state)
    assert_same(tallstore.load(path, task="added"), state)


def test_without_the_exact_tier_only_the_codes_are_lossy(path: Path) -> None:
    base = make_base()
    tasks = {name: state for name, state in _zoo(base).items() if name != "equal"}
    tallstore.pack(path, base, tasks)
    with tallstore.open(path) as store:
        found = store.load("not_finite")
        for name in ("norm.weight", "scale", "layers.0.bias"):
            assert bits(found[name]) == bits(tasks["not_finite"][name])
        assert bits(store.load("wide_head")["head.weight"]) == bits(
            tasks["wide_head"]["head.weight"]
        )
        tail = store.load("more_rows")["embed.weight"][37:]
        assert bits(tail) == bits(tasks["more_rows"]["embed.weight"][37:])
        assert bits(store.load("integers")["positions"]) == bits(tasks["integers"]["positions"])
        for name in ("adapter", "flags"):
            extra = store.load("missing_and_extra")[name]
            assert bits(extra) == bits(tasks["missing_and_extra"][name])
        for name, task in store.tasks.items():
            assert not task.exact
            loaded = store.load(name)
            shapes = {n: (t.shape, t.dtype) for n, t in tasks[name].items()}
            assert {n: (t.shape, t.dtype) for n, t in loaded.items()} == shapes
        with pytest.raises(OptionError, match=r"task 'plain': it has masks alone, no exact tier"):
            store.load("plain", fidelity="exact")


def test_a_resized_embedding_shares_its_rows_and_a_head_does_not(path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, 64, generator=draw), "head": torch.randn(9, 64, generator=draw)}
    more, fewer = fine_tune(base, 1), fine_tune(base, 2)
    more["w"] = torch.cat([more["w"], torch.ones(5, 64)])
    fewer["w"] = fewer["w"][:290].clone()
    more["head"] = torch.randn(10, 64, generator=draw)
    tasks = {"more": more, "fewer": fewer, "third": fine_tune(base, 3)}
    tallstore.pack(path, base, tasks)
    with tallstore.open(path) as store:
        assert store.tasks["more"].own == 5 * 64 + 10 * 64
        assert store.tasks["fewer"].own == 0
        assert store.tasks["fewer"].coded == 290 * 64 + 9 * 64
        for name in ("more", "fewer"):
            found = store.load(name)["w"]
            assert bits(found[300:]) == bits(tasks[name]["w"][300:])
            error = float((found - tasks[name]["w"]).norm())
            moved = float((tasks[name]["w"][:290] - base["w"][:290]).norm())
            assert 0 < error < moved
        assert bits(store.load("more")["head"]) == bits(more["head"])
        assert store.verify().ok


def test_what_equals_the_base_costs_nothing(path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(300_000, generator=draw), "b": torch.randn(100, generator=draw)}
    changed = {"a": base["a"].clone(), "b": base["b"] + 1}
    tallstore.save(base, path)
    tallstore.save(base, path, task="same")
    tallstore.save(changed, path, task="changed")
    tallstore.add(path, {"added": changed})
    with tallstore.open(path) as store:
        assert store.tasks["same"].streams == ()
        assert store.stored_bytes("same") < 1000
        for name in ("changed", "added"):
            assert store.stored_bytes(name) < 5000, "the unchanged tensor is stored again"
            assert_same(store.load(name), changed)
        assert_same(store.load("same"), base)
        assert store.stored_bytes() > 900_000


def test_a_packed_task_that_equals_the_base_costs_nothing(path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(300_000, generator=draw)}
    tasks = {"same": dict(base), "other": fine_tune(base, 1)}
    tallstore.pack(path, base, tasks, exact=True)
    with tallstore.open(path) as store:
        assert store.tasks["same"].streams == () and store.tasks["same"].exact
        assert store.stored_bytes("same") < 1000 < store.stored_bytes("other")
        assert_same(store.load("same"), tasks["same"])


def test_the_residual_of_a_small_step_is_small(path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(200_000, generator=draw)}
    tuned = {"w": base["w"] * (1 + 1e-5 * torch.randn(200_000, generator=draw))}
    tallstore.save(base, path)
    tallstore.save(tuned, path, task="t", compress=True)
    with tallstore.open(path) as store:
        assert store.stored_bytes("t") < 0.5 * store.stored_bytes()
    assert_same(tallstore.load(path, task="t"), tuned)


# -- the arithmetic -----------------------------------------------------------------------

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "uint8": 1}


@settings(max_examples=120)
@given(st.sampled_from(sorted(WIDTHS)), st.data())
def test_residual_and_back_over_any_bits(dtype: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 33)) * WIDTHS[dtype]
    actual, predicted = (
        np.frombuffer(data.draw(st.binary(min_size=count, max_size=count)), np.uint8)
        for _ in range(2)
    )
    zigzag = residual(actual, predicted, dtype)
    assert zigzag.size == count
    assert np.array_equal(add_residual(predicted, zigzag, dtype), actual)
    assert not residual(actual, actual, dtype).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_residual_counts_floats_between(dtype: str) -> None:
    kind = torch_dtype(dtype)
    one = torch.tensor([1.0, 0.0, -0.0, -1.0], dtype=kind)
    infinity = torch.tensor(float("inf"), dtype=kind)
    up = torch.nextafter(one, infinity)
    word = {2: np.uint16, 4: np.uint32, 8: np.uint64}[WIDTHS[dtype]]
    raw = [t.view(torch.uint8).numpy() for t in (up, one)]
    # from -0.0 up is +0.0, then the smallest denormal
    assert residual(*raw, dtype).view(word).tolist() == [2, 2, 4, 2]
    assert residual(*reversed(raw), dtype).view(word).tolist() == [1, 1, 3, 1]


def test_packing_in_many_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pack has written and reads again must outlive all its later transactions."""
    monkeypatch.setattr("tallstore.engine.session._BATCH", 1)
    monkeypatch.setattr("tallstore.layout.SPAN", 1 << 12)  # enough chunks for LMDB's tree to grow
    weights = torch.arange(3 << 17, dtype=torch.float32).reshape(3, 1 << 17) / 1000
    base = {f"w{n}": weights[n] + n for n in range(3)}
    tasks = {
        f"t{k}": {name: w + torch.sin(w * k) / 100 for name, w in base.items()} for k in range(1, 9)
    }
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, exact=True)
    with tallstore.open(path) as store:
        assert store.verify().ok
        for name, state in tasks.items():
            assert_same(store.load(name), state)
