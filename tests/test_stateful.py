"""A store against a dict, under any order of saving, adding, removing, compacting, reopening."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

import tallstore
from tallstore.errors import (
    StoreExistsError,
    StoreLockedError,
    TaskExistsError,
    UnknownTaskError,
)

tasks = st.sampled_from(["a", "b", "c", "d d"])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64])
names = st.sampled_from(["w", "v", "head", "layer.0"])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.sampled_from([(), (0,), (3,), (7, 5), (1030,), (2, 3, 4)]))
    start = draw(st.integers(0, 3))
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count).reshape(shape).to(draw(dtypes))


leaves = tensors() | st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats()
objects = st.dictionaries(names, tensors(), max_size=4) | st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(names, inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=6,
)


class StoreMachine(RuleBasedStateMachine):
    """The model is `held`: what each task, and None for the base, is to give back."""

    readers: Bundle[Any] = Bundle("readers")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tallstore-"))
        self.path = self.directory / "m.tall"
        self.held: dict[str | None, Any] = {}
        self.open: list[tuple[tallstore.TallStore, dict[str | None, Any]]] = []

    @initialize(obj=objects)
    def save_first(self, obj: Any) -> None:
        tallstore.save(obj, self.path)
        self.held = {None: obj}

    # -- writing --------------------------------------------------------------------------

    @rule(obj=objects, overwrite=st.booleans(), compress=st.booleans())
    def save(self, obj: Any, overwrite: bool, compress: bool) -> None:
        if len(self.held) > 1 and not overwrite:
            with pytest.raises(StoreExistsError):
                tallstore.save(obj, self.path)
            return
        tallstore.save(obj, self.path, overwrite=overwrite, compress=compress)
        self.held = {None: obj}

    @rule(task=tasks, obj=objects, overwrite=st.booleans(), compress=st.booleans())
    def save_task(self, task: str, obj: Any, overwrite: bool, compress: bool) -> None:
        if task in self.held and not overwrite:
            with pytest.raises(TaskExistsError):
                tallstore.save(obj, self.path, task=task)
            return
        tallstore.save(obj, self.path, task=task, overwrite=overwrite, compress=compress)
        self.held[task] = obj

    @rule(task=tasks, other=tasks)
    def copy_task(self, task: str, other: str) -> None:
        """A task of the store, read from it, saved under another name."""
        if task in self.held:
            copied = tallstore.load(self.path, task=task)
            tallstore.save(copied, self.path, task=other, overwrite=True)
            self.held[other] = self.held[task]

    @rule(task=tasks)
    def save_the_base_as_task(self, task: str) -> None:
        tallstore.save(self.held[None], self.path, task=task, overwrite=True)
        self.held[task] = self.held[None]

    @rule(chosen=st.sets(tasks, min_size=1))
    def remove(self, chosen: set[str]) -> None:
        with tallstore.open(self.path, "a") as store:
            if chosen <= self.held.keys():
                store.remove(*chosen)
                for task in chosen:
                    del self.held[task]
            else:
                with pytest.raises(UnknownTaskError):
                    store.remove(*chosen)
            assert set(store.tasks) == self.held.keys() - {None}

    @rule()
    def compact(self) -> None:
        if self.open:
            with pytest.raises(StoreLockedError):
                tallstore.compact(self.path, timeout=0)
        else:
            before, after = tallstore.compact(self.path, timeout=0)
            assert after <= before and after == self.path.stat().st_size

    # -- readers that stay open -----------------------------------------------------------

    @rule(target=readers)
    def open_reader(self) -> Any:
        if len(self.open) >= 3:
            return multiple()
        store = tallstore.open(self.path)
        self.open.append((store, dict(self.held)))
        return store

    @rule(store=readers)
    def refresh(self, store: tallstore.TallStore) -> None:
        store.refresh()
        index = self._index(store)
        self.open[index] = (store, dict(self.held))

    @rule(store=consumes(readers))
    def close(self, store: tallstore.TallStore) -> None:
        del self.open[self._index(store)]
        store.close()

    def _index(self, store: tallstore.TallStore) -> int:
        return [held for held, _ in self.open].index(store)

    @invariant()
    def readers_see_their_snapshot(self) -> None:
        for store, held in self.open:
            assert set(store.tasks) == held.keys() - {None}
            for task, obj in held.items():
                assert_same(store.load(task), obj)

    # -- looking --------------------------------------------------------------------------

    @rule(task=st.none() | tasks)
    def load(self, task: str | None) -> None:
        if task in self.held:
            assert_same(tallstore.load(self.path, task=task), self.held[task])
        else:
            with pytest.raises(UnknownTaskError):
                tallstore.load(self.path, task=task)

    @invariant()
    def all_is_whole(self) -> None:
        if not self.held:
            return
        with tallstore.open(self.path) as store:
            result = store.verify()
            assert result.ok and not result.stray
            assert set(store.tasks) == self.held.keys() - {None}
            assert_same(store.load(), self.held[None])

    @invariant()
    def no_litter(self) -> None:
        if self.held:
            expected = {"m.tall", "m.tall-lock"} if self.open else {"m.tall"}
            assert {p.name for p in self.directory.iterdir()} == expected

    def teardown(self) -> None:
        for task, obj in self.held.items():
            assert_same(tallstore.load(self.path, task=task), obj)
        for store, _ in self.open:
            store.close()
        shutil.rmtree(self.directory)


StoreMachine.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestStore = StoreMachine.TestCase
