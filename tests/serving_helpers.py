"""A small model whose tensors are a tiny zoo's, and whether it is a task."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from zoo import State, bits, fine_tune, make_base

import tallstore
from tallstore import compiling
from tallstore.store import TallStore

__all__ = ["CPU_BACKENDS", "Net", "address", "assert_is", "loops", "make_store", "tensors"]

#: The CPU's fast paths; numba is optional.
CPU_BACKENDS = ("cpu", "compiled") if importlib.util.find_spec("numba") else ("cpu",)


@pytest.fixture(params=CPU_BACKENDS)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled loops, and as if numba were not installed."""
    if request.param == "cpu":
        monkeypatch.setattr(compiling, "load", lambda: False)
        monkeypatch.setattr(compiling, "loaded", lambda: False)


class Net(torch.nn.Module):
    """Holds the tensors of a state dict under their names."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            owner: torch.nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, torch.nn.Module())
                owner = owner.get_submodule(part)
            blank = torch.zeros_like(tensor)
            if tensor.is_floating_point():
                owner.register_parameter(leaf, torch.nn.Parameter(blank))
            else:
                owner.register_buffer(leaf, blank)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict(keep_vars=True))


def address(model: torch.nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors(model).items()}


def assert_is(model: torch.nn.Module, store: Path, task: str, **options: str) -> None:
    """Fail unless every tensor has the bits that loading the task gives."""
    with TallStore(store) as opened:
        wanted = opened.load(task, **options)
    found = tensors(model)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        assert bits(found[name].cpu()) == bits(tensor), (task, name)


def make_store(path: Path, *, exact: bool = False, dtype: torch.dtype = torch.float32) -> State:
    """Masks of two tasks, an exact difference, changed integers, a frozen tensor; the base."""
    base = make_base(dtype=dtype)
    a, b = fine_tune(base, 1), fine_tune(base, 2)
    a["positions"] = torch.arange(11) + 3
    b["norm.weight"] = base["norm.weight"].clone()
    b["layers.1.weight"] = torch.full_like(b["layers.1.weight"], float("inf"))
    tallstore.pack(path, base, {"a": a, "b": b}, exact=exact)
    added = fine_tune(base, 3)
    added["positions"] = torch.arange(11) * 2
    tallstore.add(path, {"added": added})
    return base
