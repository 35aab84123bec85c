"""Callers may have set another default device, or dtype, of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_zoo import CODES, coded_zoo, name_of
from torch import Tensor, nn
from zoo import bits

import tallstore
from tallstore.serving import TaskSwitcher
from tallstore.serving.results import Residency

State = dict[str, Tensor]
KINDS = ("meta", "float64")


@contextmanager
def default(kind: str) -> Iterator[None]:
    """Of a device where there are no numbers: what is made there by mistake fails."""
    if kind == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.fixture(params=KINDS)
def other(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another default."""
    with default(request.param):
        yield


def net() -> nn.Module:
    with torch.device("cpu"):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).float()


def zoo() -> tuple[nn.Module, State, dict[str, State]]:
    module, draw = net(), torch.Generator().manual_seed(1)
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tasks = {}
    for task in "xy":
        tasks[task] = {
            name: t + 0.05 * torch.randn(t.shape, generator=draw, device="cpu", dtype=t.dtype)
            for name, t in base.items()
        }
    return module, base, tasks


def alike(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(bits(one[n]) == bits(other[n]) for n in one)


# Made before a default is set.
BASE, TASKS = coded_zoo()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", CODES, ids=name_of)
def test_every_code(tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    found = []
    for n, around in enumerate((nullcontext(), default(kind))):
        path = tmp_path / f"{n}.tall"
        with around:
            tallstore.pack(path, BASE, TASKS, **options, exact=True)
            with tallstore.open(path) as store:
                assert all(alike(store.load(name), task) for name, task in TASKS.items())
                found.append({name: store.load(name, fidelity="codes") for name in TASKS})
    assert all(alike(found[0][name], found[1][name]) for name in TASKS)


@pytest.mark.usefixtures("other")
def test_saving(tmp_path: Path) -> None:
    tallstore.save(BASE, tmp_path / "one.tall")
    tallstore.save(TASKS["x"], tmp_path / "one.tall", task="x")
    assert alike(tallstore.load(tmp_path / "one.tall"), BASE)
    assert alike(tallstore.load(tmp_path / "one.tall", task="x"), TASKS["x"])


@pytest.mark.parametrize("kind", KINDS)
def test_counting_and_merging(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "zoo.tall"
    _, base, tasks = zoo()
    tallstore.pack(path, base, tasks)
    found = []
    for around in (nullcontext(), default(kind)):
        with around, tallstore.open(path) as store:
            merged = []
            for rule in ("ta", "ties", "consensus-ta", "dare"):
                tallstore.merge(path, tmp_path / "m.safetensors", rule=rule, overwrite=True)
                merged.append((tmp_path / "m.safetensors").read_bytes())
            found.append((merged, store.statistics().to_json()))
    assert found[0] == found[1]


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("options", CODES[::4], ids=name_of)
@pytest.mark.parametrize("resident", ["all", "stream"])
def test_switching(tmp_path: Path, options: dict[str, Any], resident: Residency) -> None:
    module, base, tasks = zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, **options)
    with TaskSwitcher(module, path, resident=resident) as switcher:
        for name in (*tasks, *tasks):
            switcher.switch(name)
            assert alike(dict(module.state_dict()), tallstore.load(path, task=name))


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("options", [{"code": "auto", "bits_per_weight": 2.0}, {"code": "signs"}])
def test_distilling(tmp_path: Path, options: dict[str, Any]) -> None:
    module, base, tasks = zoo()
    inputs = torch.rand(24, 16, generator=torch.Generator().manual_seed(2), device="cpu").float()
    tallstore.pack(
        tmp_path / "zoo.tall", base, tasks, **options,
        calibrate=lambda _: (module, list(inputs.split(8))), distil=8,
    )  # fmt: skip
    with tallstore.open(tmp_path / "zoo.tall") as store:
        assert (store.tasks["x"].parameters or {})["distil"] == 8
