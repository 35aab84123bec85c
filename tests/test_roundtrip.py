"""What is saved comes back, bit for bit; and what is asked for is all that is read."""

from __future__ import annotations

import copy
import gc
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same
from torch import nn
from zoo import State, bits, fine_tune, make_base

import tallstore
from tallstore.engine.keys import Stream
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import (
    MismatchError,
    OptionError,
    StoreClosedError,
    UnknownTensorError,
)
from tallstore.layout import SPAN


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "m.tall"
    left = {name for name in os.listdir(tmp_path) if not name.endswith((".tall", ".pt"))}
    assert not left, "litter"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(stream, chunk) of every chunk read."""
    seen: list[tuple[int, int]] = []
    real = Snapshot._checked

    def checked(self: Snapshot, stream: Stream, chunk: int, what: str) -> Any:
        seen.append((stream.number, chunk))
        return real(self, stream, chunk, what)

    monkeypatch.setattr(Snapshot, "_checked", checked)
    return seen


def three_spans() -> State:
    """A tensor over three spans between two small ones, and one in an arena of its own."""
    ramp = torch.arange(2 * SPAN + 77, dtype=torch.int32).view(torch.float32)
    return {
        "first": torch.ones(5),
        "big": ramp,
        "last": torch.full((9,), 3.0),
        "half": torch.arange(40, dtype=torch.float16),
    }


# -- save and load ------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
def test_a_state_dict(path: Path, compress: bool) -> None:
    state = make_base()
    tallstore.save(state, path, compress=compress)
    assert_same(tallstore.load(path), state)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("obj", [{}, OrderedDict(), [], (), None, 7, "text", {"a": {}}])
def test_nothing_much(path: Path, obj: Any) -> None:
    tallstore.save(obj, path)
    assert_same(tallstore.load(path), obj)
    assert tallstore.load(path, names=[]) == {}


def test_an_empty_state_dict_and_tasks_of_it(path: Path) -> None:
    tallstore.save({}, path)
    tallstore.save({}, path, task="empty")
    tallstore.save({"w": torch.ones(3)}, path, task="full")
    assert_same(tallstore.load(path, task="empty"), {})
    assert_same(tallstore.load(path, task="full"), {"w": torch.ones(3)})
    with tallstore.open(path) as store:
        assert store.verify().ok and store.tensors() == ()


def test_a_whole_training_checkpoint(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 17), nn.BatchNorm1d(17), nn.Tanh(), nn.Linear(17, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(3):
        model(torch.randn(8, 9)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    checkpoint: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "step": 3,
        "rng": torch.get_rng_state(),
        "numpy": np.random.default_rng(0).standard_normal((3, 4)),
        "best": float("inf"),
    }
    kept = copy.deepcopy(checkpoint)
    tallstore.save(checkpoint, path)
    found = tallstore.load(path)
    assert_same(found, checkpoint)
    optimizer.load_state_dict(found["optimizer"])
    # and a later step as a task of it
    model(torch.randn(8, 9)).sum().backward()
    optimizer.step()
    later = {**checkpoint, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    tallstore.save(later, path, task="later")
    assert_same(tallstore.load(path, task="later"), later)
    assert_same(tallstore.load(path), kept)


def test_a_module_stands_for_its_state_dict(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 17), nn.BatchNorm1d(17))
    tallstore.save(model, path)
    found = tallstore.load(path)
    assert_same(found, model.state_dict())
    other = nn.Sequential(nn.Linear(9, 17), nn.BatchNorm1d(17))
    other.load_state_dict(found)
    third = nn.Sequential(nn.Linear(9, 17), nn.BatchNorm1d(17))
    addresses = [p.data_ptr() for p in third.parameters()]
    assert tallstore.load(path, out=third) is third
    assert addresses == [p.data_ptr() for p in third.parameters()]
    assert_same(third.state_dict(), model.state_dict())


def test_tensors_over_several_spans(path: Path) -> None:
    state = three_spans()
    tallstore.save(state, path)
    assert_same(tallstore.load(path), state)
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["big"][SPAN - 1] = -1.0
    changed["big"][-1] = 2.0
    tallstore.save(changed, path, task="t")
    assert_same(tallstore.load(path, task="t"), changed)
    assert_same(tallstore.load(path), state)


def test_many_small_tensors(path: Path) -> None:
    state = {f"layer.{i}.w": torch.full((i % 7,), float(i)) for i in range(3000)}
    tallstore.save(state, path)
    assert_same(tallstore.load(path), state)
    # Each starts at a block of 1024 weights: the padding is not what fills the file.
    assert path.stat().st_size < 2 << 20


def test_aliasing(path: Path) -> None:
    storage = torch.arange(24.0)
    tied = nn.Parameter(torch.ones(3, 4))
    state = {
        "a": tied,
        "b": tied,
        "rows": storage.view(4, 6),
        "columns": storage.view(4, 6).t(),
        "middle": storage[3:9],
    }
    tallstore.save(state, path)
    found = tallstore.load(path)
    assert_same(found, state)
    assert found["a"] is found["b"]
    found["rows"][0, 3] = 99
    assert found["middle"][0] == 99
    tallstore.save({**state, "rows": state["rows"] + 1}, path, task="untied")
    assert_same(
        {k: v.clone() for k, v in tallstore.load(path, task="untied").items()},
        {k: v.clone() for k, v in {**state, "rows": state["rows"] + 1}.items()},
    )


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.int64,
        torch.uint16,
        torch.float64,
        torch.bool,
        torch.complex64,
        torch.complex128,
        torch.bfloat16,
        torch.float8_e4m3fn,
    ],
    ids=str,
)
def test_a_task_of_any_dtype(path: Path, dtype: torch.dtype) -> None:
    base = {"w": torch.arange(300).reshape(20, 15).to(dtype), "kept": torch.zeros(9).to(dtype)}
    task = {"w": base["w"].flip(0).contiguous(), "kept": base["kept"].clone()}
    tallstore.save(base, path)
    tallstore.save(task, path, task="t")
    assert_same(tallstore.load(path, task="t"), task)
    assert_same(tallstore.load(path), base)


def test_a_task_with_other_names_shapes_and_types(path: Path) -> None:
    tallstore.save(make_base(), path)
    odd = {"layers.0.weight": torch.ones(2, 2), "new": [torch.zeros(3), 4, "x"], "scale": 1.5}
    tallstore.save(odd, path, task="odd")
    assert_same(tallstore.load(path, task="odd"), odd)


def test_nothing_loaded_is_a_view_into_the_store(path: Path) -> None:
    state = make_base()
    tallstore.save(state, path)
    found = tallstore.load(path)
    for tensor in found.values():
        tensor.zero_()
    assert_same(tallstore.load(path), state)


# -- names= -------------------------------------------------------------------------------


def test_exact_names_and_patterns(path: Path) -> None:
    state = make_base()
    tallstore.save(state, path)
    for names, wanted in [
        (["scale"], ["scale"]),
        ("scale", ["scale"]),
        (["head.weight", "embed.weight"], ["embed.weight", "head.weight"]),
        (["layers.*"], ["layers.0.weight", "layers.0.bias", "layers.1.weight"]),
        (["layers.?.weight", "scale"], ["layers.0.weight", "layers.1.weight", "scale"]),
        (["*"], list(state)),
    ]:
        found = tallstore.load(path, names=names)
        assert list(found) == wanted
        assert_same(found, {name: state[name] for name in wanted})


def test_an_exact_name_beats_the_pattern_it_looks_like(path: Path) -> None:
    state = {"w[0]": torch.ones(1), "w0": torch.zeros(1)}
    tallstore.save(state, path)
    assert list(tallstore.load(path, names=["w[0]"])) == ["w[0]"]


def test_unknown_names(path: Path) -> None:
    tallstore.save(make_base(), path)
    with pytest.raises(UnknownTensorError) as caught:
        tallstore.load(path, names=["head.weigth"])
    assert str(caught.value) == (
        f"{path}: base: no tensor is called 'head.weigth'; "
        "did you mean 'head.weight', 'embed.weight'?"
    )
    with pytest.raises(UnknownTensorError, match=r"no tensor is called 'decoder\.\*'"):
        tallstore.load(path, names=["head.*", "decoder.*"])


def test_only_the_chunks_of_the_names_are_read(path: Path, reads: list[tuple[int, int]]) -> None:
    state = three_spans()
    tallstore.save(state, path)
    with tallstore.open(path) as store:
        document = store.base.document
        floats, halves = store.base.streams
        for names, chunks in [
            (["first"], {(floats, 0)}),
            (["last"], {(floats, 2)}),
            (["big"], {(floats, 0), (floats, 1), (floats, 2)}),
            (["half"], {(halves, 0)}),
            (["first", "half"], {(floats, 0), (halves, 0)}),
            ([], set()),
        ]:
            reads.clear()
            found = store.load(names=names)
            assert_same(found, {name: state[name] for name in names})
            rest = [item for item in reads if item[0] != document]
            assert set(rest) == chunks and len(rest) == len(chunks)
        reads.clear()
        assert_same(store.load(), state)
        assert len([item for item in reads if item[0] != document]) == 4


def test_names_of_a_task_read_only_its_own_chunks(path: Path, reads: list[tuple[int, int]]) -> None:
    state = three_spans()
    changed = {**state, "last": state["last"] + 1, "half": state["half"] + 1}
    tallstore.save(state, path)
    tallstore.save(changed, path, task="t")
    with tallstore.open(path) as store:
        documents = {store.base.document, store.tasks["t"].document}
        reads.clear()
        assert_same(store.load("t", names=["last"]), {"last": changed["last"]})
        rest = [item for item in reads if item[0] not in documents]
        # one chunk of the base, one of the residual
        assert len(rest) == 2 and {chunk for _, chunk in rest} == {2}
        reads.clear()
        # what equals the base reads the base alone
        assert_same(store.load("t", names=["first"]), {"first": state["first"]})
        rest = [item for item in reads if item[0] not in documents]
        assert rest == [(store.base.streams[0], 0)]


# -- out= ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "t"])
def test_out_is_filled_in_place(path: Path, task: str | None) -> None:
    base = make_base()
    state = base if task is None else fine_tune(base, 1)
    tallstore.save(base, path)
    if task is not None:
        tallstore.save(state, path, task=task)
    out = {name: torch.full_like(tensor, 9) for name, tensor in state.items()}
    # A transposed and a strided target are filled through their strides.
    out["layers.1.weight"] = torch.zeros(33, 65).t()
    out["norm.weight"] = torch.zeros(14)[::2]
    addresses = {name: tensor.data_ptr() for name, tensor in out.items()}
    tensors = dict(out)
    assert tallstore.load(path, task=task, out=out) is out
    assert {name: tensor.data_ptr() for name, tensor in out.items()} == addresses
    for name, tensor in out.items():
        assert tensor is tensors[name] and bits(tensor) == bits(state[name]), name
    assert out["norm.weight"].stride() == (2,)


def test_out_with_names_touches_nothing_else(path: Path) -> None:
    state = make_base()
    tallstore.save(state, path)
    out = {name: torch.full_like(tensor, 9) for name, tensor in state.items()}
    tallstore.load(path, out=out, names=["layers.0.*"])
    for name, tensor in out.items():
        inside = name.startswith("layers.0.")
        assert bits(tensor) == bits(state[name] if inside else torch.full_like(tensor, 9))


def test_out_that_does_not_fit_is_refused_before_a_byte_is_written(path: Path) -> None:
    state = make_base()
    tallstore.save(state, path)
    out = {name: torch.full_like(tensor, 9) for name, tensor in state.items()}
    del out["scale"]
    out["head.weight"] = torch.full((8, 65), 9.0)
    out["norm.weight"] = out["norm.weight"].half()
    out["extra"] = torch.full((1,), 9.0)
    before = {name: bits(tensor) for name, tensor in out.items()}
    with pytest.raises(MismatchError) as caught:
        tallstore.load(path, out=out)
    message = str(caught.value)
    assert message.startswith(f"{path}: base: out= does not fit: ")
    for problem in (
        "'extra' is not in the store",
        "'scale' is missing from out",
        "'head.weight' has shape [8, 65], not [2, 65]",
        "'norm.weight' is torch.float16, stored as float32",
    ):
        assert problem in message
    assert {name: bits(tensor) for name, tensor in out.items()} == before


def test_out_takes_its_own_device_and_dtype(path: Path) -> None:
    tallstore.save(make_base(), path)
    out = make_base(1)
    with pytest.raises(OptionError, match="out= has its own device and dtype"):
        tallstore.load(path, out=out, dtype="float16")
    with pytest.raises(OptionError, match="out=int: a dict of tensors, or a module, is needed"):
        tallstore.load(path, out=3)


def test_out_keeps_requires_grad_and_shared_memory(path: Path) -> None:
    tied = torch.arange(12.0)
    tallstore.save({"a": tied, "b": tied.view(12), "c": tied[2:5]}, path)
    out = {"a": nn.Parameter(torch.zeros(12)), "b": torch.zeros(12), "c": torch.zeros(3)}
    tallstore.load(path, out=out)
    assert out["a"].requires_grad and out["a"].is_leaf
    assert torch.equal(out["a"].detach(), tied) and torch.equal(out["b"], tied)
    assert torch.equal(out["c"], tied[2:5])


def test_both_names_of_one_tensor_are_known(path: Path) -> None:
    tied = torch.arange(12.0)
    tallstore.save({"a": tied, "b": tied}, path)
    out = {"a": torch.zeros(12), "b": torch.zeros(12)}
    tallstore.load(path, out=out)
    assert torch.equal(out["a"], tied) and torch.equal(out["b"], tied)
    assert list(tallstore.load(path, names=["b"])) == ["b"]


# -- dtype= -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64", "float32"])
def test_dtype_converts_floats_alone(path: Path, dtype: Any) -> None:
    tied = torch.linspace(-3, 3, 50)
    state = {
        "tied": [tied, tied[5:9]],
        "bf16": torch.linspace(0, 1, 33).bfloat16(),
        "ints": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "z": torch.ones(2, dtype=torch.complex64),
        "array": np.arange(6.0, dtype=np.float32),
        "parameter": nn.Parameter(torch.ones(2, 2).t()),
    }
    tallstore.save(state, path)
    found = tallstore.load(path, dtype=dtype)
    target = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    whole = tied.to(target)
    assert_same(
        found,
        {
            **state,
            "tied": [whole, whole[5:9]],
            "bf16": state["bf16"].to(target),
            "parameter": nn.Parameter(torch.ones(2, 2).t().to(target)),
        },
    )
    assert_same(tallstore.load(path, names=["bf16"], dtype=dtype), {"bf16": found["bf16"]})


@pytest.mark.parametrize("dtype", ["int8", torch.complex64, "flat32", 5])
def test_other_dtypes_are_refused(path: Path, dtype: Any) -> None:
    tallstore.save(make_base(), path)
    with pytest.raises(OptionError, match="float32, bfloat16, float16 or float64 is possible"):
        tallstore.load(path, dtype=dtype)


# -- the handle ---------------------------------------------------------------------------


def test_a_closed_handle_refuses(path: Path) -> None:
    tallstore.save(make_base(), path)
    store = tallstore.open(path)
    found = store.load()
    store.close()
    store.close()
    for use in (store.load, store.verify, store.refresh, store.file_bytes, store.tensors):
        with pytest.raises(StoreClosedError, match="this handle was closed; open"):
            use()
    assert_same(found, make_base())
    assert repr(store) == f"<TallStore {str(path)!r}, closed>"


def test_a_reading_handle_does_not_write(path: Path) -> None:
    base = make_base()
    tallstore.save(base, path)
    with tallstore.open(path) as store:
        for use in (lambda: store.add({"t": base}), lambda: store.remove("t")):
            with pytest.raises(OptionError, match="opened to read; open it with mode 'a'"):
                use()
    with pytest.raises(OptionError, match=r"mode='w': 'r' to read, 'a' to read and write"):
        tallstore.open(path, "w")


def test_a_handle_that_is_forgotten_can_be_collected(path: Path) -> None:
    tallstore.save(make_base(), path)
    store = tallstore.open(path)
    del store
    gc.collect()
    assert_same(tallstore.load(path), make_base())
    for litter in path.parent.glob("*-lock"):
        litter.unlink()  # the handle was never closed


def test_progress_is_reported(path: Path) -> None:
    state = make_base()
    total = sum(t.numel() * t.element_size() for t in state.values())
    calls: list[tuple[str, int, int]] = []
    tallstore.save(state, path, report=lambda *call: calls.append(call))
    assert calls[0][:2] == ("save", 0) and calls[-1][1] == calls[-1][2]
    calls.clear()
    tallstore.load(path, report=lambda *call: calls.append(call))
    assert calls[0] == ("load", 0, total) and calls[-1] == ("load", total, total)
