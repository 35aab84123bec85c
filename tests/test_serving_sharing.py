"""Tensors of a model that share memory are served only if the task has them share it as well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_helpers import DEVICE
from serving_helpers import loops
from zoo import State, bits

import tallstore
from tallstore.errors import MismatchError
from tallstore.serving import TaskSwitcher
from tallstore.serving.results import Residency
from tallstore.serving.sharing import overlaps_itself, sharing

__all__ = ["loops"]  # a fixture

pytestmark = pytest.mark.usefixtures("loops")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, device=DEVICE, dtype=dtype)


def make(path: Path, base: State, *tasks: State, together: bool = False) -> None:
    """A store whose tensors are apart, or share memory as they are given."""
    held = [state if together else apart(state) for state in (base, *tasks)]
    tallstore.save(held[0], path)
    for number, state in enumerate(held[1:]):
        tallstore.save(state, path, task=f"t{number}")


def apart(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_served(model: State, path: Path) -> None:
    for resident in ("all", "masks-on-host", "stream"):
        check(model, path, resident, None)
    check(model, path, "stream", 0)


def check(model: State, path: Path, resident: Residency, budget: int | None) -> None:
    with TaskSwitcher(model, path, resident=resident, budget=budget) as switcher:
        for task in (*switcher.tasks, *switcher.tasks):
            switcher.switch(task)
            for name, wanted in tallstore.load(path, task=task).items():
                assert bits(model[name].cpu()) == bits(wanted), (resident, task, name)


def halves(buffer: torch.Tensor) -> State:
    return {"a": buffer[:100], "b": buffer[50:150]}


def test_overlapping_tensors_that_the_store_has_apart(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    make(path, halves(torch.randn(150)), halves(torch.randn(150)))
    with pytest.raises(MismatchError, match=r"task 't0'.*'a' and 'b' share elements in the model"):
        TaskSwitcher(halves(zeros(150)), path)
    assert_served({"a": zeros(100), "b": zeros(100)}, path)
    with TaskSwitcher(halves(zeros(150)), path, ignore="b") as switcher:
        switcher.switch("t0")


def test_overlapping_tensors_that_overlap_so_in_the_store(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    make(path, *(halves(torch.randn(150)) for _ in range(3)), together=True)
    assert_served(halves(zeros(150)), path)
    # Views of the same segment, but of other elements of it.
    buffer = zeros(150)
    with pytest.raises(MismatchError, match="'a' and 'b' share elements"):
        TaskSwitcher({"a": buffer[:100], "b": buffer[49:149]}, path)
    # A buffer, and a part of it.
    path = tmp_path / "part.tall"
    states = [{"all": buffer, "part": buffer[20:]} for buffer in torch.randn(3, 60).unbind()]
    make(path, *states, together=True)
    buffer = zeros(60)
    assert_served({"all": buffer, "part": buffer[20:]}, path)


def test_views_that_lie_between_each_other(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    shapes = {"even": (40,), "odd": (40,), "q": (30, 20), "k": (30, 7), "v": (30, 13)}
    states = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    make(path, *states)
    rows, fused = zeros(80), zeros(30, 40)
    model = {"even": rows[::2], "odd": rows[1::2]}
    model |= dict(zip("qkv", fused.split([20, 7, 13], dim=1), strict=True))
    assert_served(model, path)
    with pytest.raises(MismatchError, match="'q' and 'k' share elements"):
        TaskSwitcher(model | {"k": fused[:, 19:26]}, path)


def test_tied_tensors_at_two_places_of_a_segment(tmp_path: Path) -> None:
    """Of one shape, in one segment: still not the same."""
    path = tmp_path / "zoo.tall"
    two, same = torch.randn(2, 50), torch.randn(50).expand(2, 50).clone()
    make(path, *({"a": t[0], "b": t[1]} for t in (two, two + 1, same)), together=True)
    tied = zeros(50)
    with pytest.raises(MismatchError, match="ties 'a' and 'b', which differ"):
        TaskSwitcher({"a": tied, "b": tied}, path)
    with TaskSwitcher({"a": tied, "b": tied}, path, tasks=["t1"]) as switcher:
        switcher.switch("t1")
    assert torch.equal(tied.cpu(), same[0])


def test_two_dtypes_on_one_storage(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"

    def views(memory: torch.Tensor) -> State:
        return {"floats": memory, "halves": memory.view(torch.float16)[:20]}

    states = [views(torch.arange(20.0) + n) for n in range(3)]
    make(path, *states)
    with pytest.raises(MismatchError, match="'floats' and 'halves' share elements"):
        TaskSwitcher(views(zeros(20)), path)
    together = tmp_path / "together.tall"
    make(together, *states, together=True)
    assert_served(views(zeros(20)), together)


def test_a_tensor_that_overlaps_itself(tmp_path: Path) -> None:
    path = tmp_path / "zoo.tall"
    state = {"w": torch.randn(10, 6)}
    make(path, state, state)
    for stride, held in (((3, 1), 40), ((0, 1), 6), ((1, 1), 20), ((4, 2), 60)):
        model = {"w": zeros(held).as_strided((10, 6), stride)}
        with pytest.raises(MismatchError, match=r"'w' (overlaps itself|is expanded) in the model"):
            TaskSwitcher(model, path)
    assert_served({"w": zeros(200).as_strided((10, 6), (1, 11))}, path)


def test_what_shares_what() -> None:
    buffer = torch.zeros(120)
    grid = buffer.view(10, 12)
    tensors = {
        "buffer": buffer,
        "again": buffer,
        "columns": grid[:, 3:6],
        "others": grid[:, 6:],
        "third": buffer[1::3],
        "empty": buffer[:0],
        "one": buffer[7],
        "bytes": buffer.view(torch.uint8)[28:29],
        "elsewhere": torch.zeros(5),
    }
    found = {frozenset(pair) for pair in sharing(tensors)}
    memory = {
        name: {t.data_ptr() + b + 4 * n for n in places(t) for b in range(t.element_size())}
        for name, t in tensors.items()
        if name != "bytes"
    }
    memory["bytes"] = {tensors["bytes"].data_ptr()}
    wanted = {frozenset({a, b}) for a in memory for b in memory if a != b and memory[a] & memory[b]}
    assert found == wanted - {frozenset({"buffer", "again"})}


def test_what_takes_too_long_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares_memory(*arrays: object, max_work: int) -> bool:
        raise np.exceptions.TooHardError

    buffer = torch.zeros(10)
    tensors = {"a": buffer[::2], "b": buffer[1::2], "c": torch.zeros(3)}
    assert not list(sharing(tensors))
    monkeypatch.setattr(np, "shares_memory", shares_memory)
    assert list(sharing(tensors)) == [("a", "b")]


def places(tensor: torch.Tensor) -> list[int]:
    numbers = torch.arange(tensor.untyped_storage().nbytes() // 4)
    there = numbers.as_strided(tensor.shape, tensor.stride())
    return there.reshape(-1).tolist()


def test_what_overlaps_itself() -> None:
    draw = torch.Generator().manual_seed(0)
    memory = torch.arange(1000)
    seen = set()
    for _ in range(300):
        shape = torch.randint(1, 5, (3,), generator=draw).tolist()
        stride = torch.randint(0, 14, (3,), generator=draw).tolist()
        tensor = memory.as_strided(shape, stride)
        wanted = tensor.unique().numel() < tensor.numel()
        assert overlaps_itself(tensor) == wanted, (shape, stride)
        seen.add(wanted)
    assert seen == {True, False}
    assert overlaps_itself(torch.zeros(4).as_strided((1 << 20, 1 << 20), (0, 0)))
    assert not overlaps_itself(torch.zeros(0, 5).expand(3, 0, 5))
