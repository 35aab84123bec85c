"""A store of an external base, made once and copied for each test."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from zoo import State, fine_tune, make_base

import tallstore
from tallstore.errors import (
    StoreNotFoundError,
    TallstoreError,
    WrongBaseError,
)


@dataclass(frozen=True)
class Stores:
    """``base.tall`` with a base and the task ``first``; ``zoo.tall`` refers to that base."""

    base_path: Path
    path: Path
    base: State
    first: State
    tasks: Mapping[str, State]

    def check(self, **options: Any) -> None:
        for name, state in self.tasks.items():
            assert_same(tallstore.load(self.path, task=name, **options), state)
        assert_same(tallstore.load(self.path, **options), self.base)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = make_base()
    tasks = {name: fine_tune(base, seed) for seed, name in enumerate(("one", "two"))}
    tasks["two"]["head.weight"] = torch.ones(5, 65)  # of its own
    tallstore.pack(folder / "base.tall", base, {"first": fine_tune(base, 9)}, exact=True)
    tallstore.pack(folder / "zoo.tall", None, tasks, exact=True, external_base=folder / "base.tall")
    return folder


@pytest.fixture
def stores(made: Path, tmp_path: Path) -> Stores:
    for name in ("base.tall", "zoo.tall"):
        shutil.copyfile(made / name, tmp_path / name)
    base = make_base()
    tasks = {name: fine_tune(base, seed) for seed, name in enumerate(("one", "two"))}
    tasks["two"]["head.weight"] = torch.ones(5, 65)
    return Stores(tmp_path / "base.tall", tmp_path / "zoo.tall", base, fine_tune(base, 9), tasks)


def identity(path: Path) -> str:
    with tallstore.open(path) as store:
        return store.base.identity


@contextmanager
def refusing(kind: type[TallstoreError], *parts: object) -> Any:
    with pytest.raises(TallstoreError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {message}"
    for part in (*parts, "tallstore relink", "--external-base"):
        assert str(part) in message, message


def wrong(path: Path, place: Path) -> Any:
    """Refused, with both identities and the cure."""
    with tallstore.open(path) as store:
        wanted = store.base.identity
    found = identity(place)
    assert found != wanted
    return refusing(WrongBaseError, f"{path}: needs base {wanted}", place, f"is {found}")


def absent(path: Path, place: Path) -> Any:
    with tallstore.open(path) as store:
        wanted = store.base.identity
    return refusing(StoreNotFoundError, f"{path}: needs base {wanted}", f"{place}: no such store")
