"""What coded tasks load as: bit for bit what FORMAT.md says, whatever the code and the dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded_zoo import CODES, coded_zoo, name_of
from naive_codes import NaiveTask
from safetensors.torch import load_file
from zoo import State, bits, fine_tune

import tallstore
from tallstore.errors import OptionError
from tallstore.ring import Ring
from tallstore.store import TallStore

#: Codes, and dtypes of the base and of the tasks.
_FEW = [CODES[n] for n in (1, 5, 9, 13, 19)]
_OTHERS = [
    (torch.float16, None),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
_CASES: list[Any] = [
    *((options, dtype, None) for options in CODES for dtype in (torch.float32, torch.bfloat16)),
    *((options, dtype, tuned) for options in _FEW for dtype, tuned in _OTHERS),
]
codes = pytest.mark.parametrize("options", CODES, ids=name_of)
few = pytest.mark.parametrize("options", _FEW, ids=name_of)


def as_bytes(state: State) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in state.items()}


def differing(found: State, wanted: dict[str, bytes]) -> list[str]:
    assert list(found) == list(wanted)
    return [name for name, tensor in found.items() if bits(tensor) != wanted[name]]


@pytest.mark.parametrize(
    ("options", "dtype", "tuned"),
    _CASES,
    ids=[f"{name_of(o)}-{a}-{b or a}".replace("torch.", "") for o, a, b in _CASES],
)
def test_weights_by_the_format(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype, tuned: torch.dtype | None
) -> None:
    base, tasks = coded_zoo(dtype, tuned)
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, exact=True, **options)
    for name, task in tasks.items():
        assert differing(tallstore.load(path, task=name), as_bytes(task)) == []
        found = tallstore.load(path, task=name, fidelity="codes")
        assert differing(found, NaiveTask(path, name).tensors()) == []
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in task.items()}
        moved = [n for n in task if bits(found[n]) != bits(task[n])]
        assert {"a", "d", "other"} <= set(moved), "the code is lossless: nothing is shown"
    with tallstore.open(path) as store:
        assert store.verify().ok
        assert all(task.exact for task in store.tasks.values())
        assert store.format_version == 2


@codes
def test_without_the_exact_tier(tmp_path: Path, options: dict[str, Any]) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, **options)
    with tallstore.open(path) as store:
        for name, task in tasks.items():
            naive = NaiveTask(path, name).tensors()
            found = store.load(name)
            assert differing(found, naive) == []
            kept = {"still", "double", "ids", "head"} | ({"b"} if name == "y" else set())
            assert all(naive[key] == bits(task[key]) for key in kept)
            rows = min(280, len(task["embed"]))
            assert torch.equal(found["embed"][rows:], task["embed"][rows:])
            # Room that is there, one tensor of it, and on the fly to another dtype.
            out = {key: torch.full_like(tensor, 3) for key, tensor in task.items()}
            assert store.load(name, out=out) is out and differing(out, naive) == []
            some = store.load(name, names=["d", "head"])
            assert as_bytes(some) == {key: naive[key] for key in ("d", "head")}
            half = store.load(name, dtype="bfloat16", names=["d"])["d"]
            assert torch.equal(half, found["d"].bfloat16())
            with pytest.raises(OptionError, match="no exact tier"):
                store.load(name, fidelity="exact")
        assert store.verify().ok


_BACKENDS = [
    *((options, "reference") for options in _FEW),
    *((options, "cpu") for options in _FEW),
    (CODES[13], "triton"),
]


@pytest.mark.parametrize(
    ("options", "backend"), _BACKENDS, ids=[f"{name_of(o)}-{b}" for o, b in _BACKENDS]
)
def test_through_the_ring(tmp_path: Path, options: dict[str, Any], backend: str) -> None:
    base, tasks = coded_zoo(torch.bfloat16)
    tallstore.pack(tmp_path / "zoo.tall", base, tasks, **options)
    with TallStore(tmp_path / "zoo.tall") as store:
        for name in tasks:
            loader = store._loader(name)
            segments = loader.contents.segments
            memory = {n: np.empty(s.nbytes, np.uint8) for n, s in enumerate(segments)}
            loader.stream(list(memory), targets=memory)
            targets = {n: torch.zeros(s.nbytes, dtype=torch.uint8) for n, s in enumerate(segments)}
            ring = Ring(loader.decoder, torch.device("cpu"), backend=backend)
            ring.run(list(targets), targets=targets, progress=lambda count: None)
            assert {n: bits(t) for n, t in targets.items()} == {
                n: held.tobytes() for n, held in memory.items()
            }


@codes
def test_many_spans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("tallstore.layout.SPAN", 2048)
    base, tasks = coded_zoo()
    draw = torch.Generator().manual_seed(5)
    base["long"] = torch.randn(9001, generator=draw)
    for name, task in tasks.items():
        task["long"] = fine_tune({"long": base["long"]}, len(name))["long"]
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, exact=True, **options)
    for name, task in tasks.items():
        assert differing(tallstore.load(path, task=name), as_bytes(task)) == []
        found = tallstore.load(path, task=name, fidelity="codes")
        assert differing(found, NaiveTask(path, name).tensors()) == []


@pytest.mark.parametrize(
    "options",
    [CODES[1], {"code": "seeded", "density": 0.01, "bits": 3}, {"code": "levels", "bits": 2}],
    ids=name_of,
)
def test_spans_of_the_real_size(tmp_path: Path, options: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(1_500_003, generator=draw), "v": torch.randn(700_001, generator=draw)}
    task = {n: t + 0.01 * torch.randn(t.shape, generator=draw) for n, t in base.items()}
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"x": task}, **options)
    assert differing(tallstore.load(path, task="x"), NaiveTask(path, "x").tensors()) == []


@few
def test_tied_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    """Of a base that ties two tensors, a task that ties them too, and one that does not."""
    draw = torch.Generator().manual_seed(2)
    wide, rest = torch.randn(40, 33, generator=draw), torch.randn(3000, generator=draw)
    base = {"in": wide, "out": wide, "rest": rest}
    moved = wide + 0.02 * torch.randn(wide.shape, generator=draw)
    other = rest + 0.02 * torch.randn(rest.shape, generator=draw)
    tasks = {
        "tied": {"in": moved, "out": moved, "rest": other},
        "untied": {"in": moved.clone(), "out": moved + 0.01, "rest": other.clone()},
    }
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, **options)
    for name, task in tasks.items():
        found = tallstore.load(path, task=name)
        naive = NaiveTask(path, name).tensors()
        assert {"in", "rest"} <= set(naive)
        assert differing({n: found[n] for n in naive}, naive) == []
        ties = found["in"].data_ptr() == found["out"].data_ptr()
        assert ties == (name == "tied")
        assert name == "tied" or torch.equal(found["out"], task["out"])


@few
def test_a_base_of_one_weight_and_of_none(tmp_path: Path, options: dict[str, Any]) -> None:
    base = {"w": torch.tensor([0.5]), "none": torch.zeros(0), "more": torch.zeros(0, 3)}
    task = {**base, "w": torch.tensor([0.75])}
    budget = {"bits_per_weight": 8} if "bits_per_weight" in options else {}
    tallstore.pack(tmp_path / "zoo.tall", base, {"x": task}, **options | budget)
    found = tallstore.load(tmp_path / "zoo.tall", task="x")
    assert differing(found, NaiveTask(tmp_path / "zoo.tall", "x").tensors()) == []
    assert torch.allclose(found["w"], task["w"])


@few
def test_exported_and_read_as_a_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    base, tasks = coded_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, **options)
    found = tallstore.load(path, task="x")
    with tallstore.open(path) as store:
        store.unpack("x", tmp_path / "x.safetensors")
    assert as_bytes(load_file(tmp_path / "x.safetensors")) == as_bytes(found)
    # As the base of another store, span by span.
    tallstore.pack(tmp_path / "next.tall", f"{path}::x", {"y": tasks["x"]}, code="signs")
    assert differing(tallstore.load(tmp_path / "next.tall"), as_bytes(found)) == []
