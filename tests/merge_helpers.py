"""Small zoos to merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from naive_merging import NAIVE
from safetensors.torch import save_file
from zoo import State, fine_tune, make_base

import tallstore
from tallstore import layout as layout_module
from tallstore.layout import lay_out
from tallstore.specs import SegmentSpec

Floats = npt.NDArray[np.float32]
LAMBDA = 0.4


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of 1024 weights, so that a small model has several, and rows that they cut."""
    monkeypatch.setattr(layout_module, "SPAN", 1024)


def zoo(dtype: torch.dtype = torch.float32, tasks: int = 3) -> tuple[State, dict[str, State]]:
    base = make_base(3, dtype)
    return base, {f"t{n}": fine_tune(base, n, step=0.02 * (n + 1)) for n in range(tasks)}


def packed(path: Path, base: Any, tasks: Any, **options: Any) -> Path:
    tallstore.pack(path, base, tasks, tall_lambda=LAMBDA, **{"exact": True, **options})
    return path


class Flat:
    """A model's floating weights as one vector, and what rules take beside it."""

    def __init__(self, base: State, tasks: Mapping[str, State]) -> None:
        self.names = [name for name, tensor in base.items() if tensor.is_floating_point()]
        self.base = self._flat(base)
        self.vectors = np.stack([self._flat(state) - self.base for state in tasks.values()])
        self.tuned = np.stack([self._flat(state) for state in tasks.values()])
        places, stop = [], 0
        layout = lay_out([SegmentSpec("float32", base[name].numel()) for name in self.names])
        self.tensors = []
        for name, place in zip(self.names, layout.places, strict=True):
            count = base[name].numel()
            places.append(np.arange(place.offset, place.offset + count))
            self.tensors.append((slice(stop, stop + count), tuple(base[name].shape)))
            stop += count
        self.places = np.concatenate(places)

    def _flat(self, state: State) -> Floats:
        found = torch.cat([state[name].reshape(-1).float() for name in self.names])
        return found.numpy()

    def masks(self, vector: str) -> Any:
        """TALL masks for the vector as it is stored, in bfloat16."""
        merged = NAIVE[vector](self.vectors)
        rounded = torch.from_numpy(merged).bfloat16().float().numpy()
        away = np.abs((self.base + rounded) - self.tuned) * np.float32(LAMBDA)
        return np.abs(self.base - self.tuned) > away

    def merge(self, base: State, rule: str, names: list[str], alpha: float, **more: Any) -> State:
        """base + alpha * v in float32, rounded once."""
        merged = NAIVE[rule](
            self.vectors, tensors=self.tensors, names=names, places=self.places, **more
        )
        step = merged * np.float32(alpha)
        whole = torch.from_numpy(self.base + step)
        found = dict(base)
        for name, (place, shape) in zip(self.names, self.tensors, strict=True):
            rounded = whole[place].reshape(shape).to(base[name].dtype)
            still = torch.from_numpy(step[place] == 0).reshape(shape)
            found[name] = torch.where(still, base[name], rounded)
        return found


def headed(tmp_path: Path) -> tuple[Path, State, dict[str, State]]:
    """Tasks with heads that the base lacks, of shapes of their own; as model directories."""
    base, tasks = zoo()
    for n, state in enumerate(tasks.values()):
        state["classifier.weight"] = torch.full((n + 2, 5), float(n))
        state["classifier.bias"] = torch.zeros(2)
    for name, state in {"base": base, **tasks}.items():
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"name": name}))
        (folder / "tokenizer.json").write_text("{}")
    paths = {name: tmp_path / "in" / name for name in tasks}
    return packed(tmp_path / "z.tall", tmp_path / "in" / "base", paths), base, tasks
