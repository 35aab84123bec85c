"""Tasks, names and checkpoints that do not fit are refused; nothing stored is lost by it."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from safetensors.torch import save_file
from stored import Stored, refused
from zoo import fine_tune, make_base

import tallstore
from tallstore.errors import (
    CheckpointError,
    DeviceError,
    EmptyZooError,
    MismatchError,
    NotAStoreError,
    OptionError,
    StoreExistsError,
    TaskExistsError,
    TaskNameError,
    UnknownTaskError,
    UnsafePickleError,
    UnsupportedObjectError,
)


def test_an_unknown_task(stored: Stored) -> None:
    with refused(UnknownTaskError, f"{stored.path}: no task 'three'; there are 'one', 'two'"):
        tallstore.load(stored.path, task="three")
    with tallstore.open(stored.path, "a") as store:
        with refused(UnknownTaskError, "no task 'three'"):
            store.remove("one", "three")
        with refused(UnknownTaskError, "no task 'three'"):
            store.stored_bytes("three")
        with refused(UnknownTaskError, "no task 'three'"):
            store.unpack("three", stored.path.with_name("out.safetensors"))
    stored.check()


def test_a_store_without_tasks(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(make_base(), path)
    with refused(UnknownTaskError, f"{path}: no task 'a'", "the base alone"):
        tallstore.load(path, task="a")


def test_a_task_that_exists(stored: Stored) -> None:
    for use in (
        lambda: tallstore.save(stored.base, stored.path, task="one"),
        lambda: tallstore.add(stored.path, {"new": stored.base, "one": stored.base}),
    ):
        with refused(TaskExistsError, stored.path, "holds a task 'one' already", "overwrite"):
            use()
    stored.check()


BAD_NAMES: list[tuple[Any, str]] = [
    ("", "non-empty text"),
    (".", "no path"),
    ("..", "no path"),
    ("a/b", "no path"),
    ("a\\b", "no path"),
    ("/etc/passwd", "no path"),
    ("a\nb", "no control characters"),
    ("a\0b", "no control characters"),
    (" a", "no blanks around it"),
    ("a ", "no blanks around it"),
    ("-a", "does not begin with '-'"),
    ("a=b", "no '='"),
    ("a::b", "no '::'"),
    ("x" * 256, "at most 255 bytes"),
    ("ä" * 128, "at most 255 bytes"),
    ("\ud800", "no control characters"),
    (3, "non-empty text"),
]


@pytest.mark.parametrize(("name", "message"), BAD_NAMES, ids=lambda v: ascii(v)[:20])
def test_names_that_no_task_can_have(tmp_path: Path, name: Any, message: str) -> None:
    path = tmp_path / "m.tall"
    base = {"w": torch.ones(4)}
    tallstore.save(base, path)
    before = path.read_bytes()
    for use in (
        lambda: tallstore.save(base, path, task=name),
        lambda: tallstore.add(path, {name: base}),
        lambda: tallstore.pack(tmp_path / "z.tall", base, {name: base}),
    ):
        with refused(TaskNameError, message):
            use()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["a", "x" * 255, "mnli-m v2.1", "Ünïcode", "任务", "a:b", "~"])
def test_names_that_a_task_can_have(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.tall"
    base = {"w": torch.ones(4)}
    tallstore.save(base, path)
    tallstore.save({"w": torch.zeros(4)}, path, task=name)
    assert_same(tallstore.load(path, task=name), {"w": torch.zeros(4)})


def test_an_empty_zoo(stored: Stored) -> None:
    with refused(EmptyZooError, stored.path, "no tasks to pack"):
        tallstore.pack(stored.path, stored.base, {}, overwrite=True)
    stored.check()


def test_another_architecture(stored: Stored, tmp_path: Path) -> None:
    other = {"gate.weight": torch.ones(50, 50), "gate.bias": torch.ones(50)}
    message = "only 0 of 2,550 weights match the base; names are absent from the base"
    with refused(MismatchError, message, "'gate.weight'", "Is it a fine-tune of this base?"):
        tallstore.pack(tmp_path / "z.tall", stored.base, {"a": stored.base, "b": other})
    with refused(MismatchError, message):
        tallstore.add(stored.path, {"b": other})
    assert not (tmp_path / "z.tall").exists()
    stored.check()


def test_shapes_that_clash(stored: Stored, tmp_path: Path) -> None:
    other = {name: t.new_ones((*t.shape, 2)) for name, t in stored.base.items()}
    with refused(
        MismatchError, "weights match the base; shapes clash", "'embed.weight' [37, 16, 2] against"
    ):
        tallstore.pack(tmp_path / "z.tall", stored.base, {"b": other})
    with refused(MismatchError, "shapes clash"):
        tallstore.add(stored.path, {"b": other})
    stored.check()


def test_dtypes_and_layouts_that_clash(stored: Stored, tmp_path: Path) -> None:
    for dtype in (torch.int8, torch.float64):
        other = {name: t.to(dtype) for name, t in stored.base.items()}
        said = f"{str(dtype).removeprefix('torch.')} of strides [16, 1] against float32 of"
        with refused(MismatchError, "dtypes or layouts clash", said, "Give both as float32"):
            tallstore.pack(tmp_path / "z.tall", stored.base, {"b": other})
    other = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in stored.base.items()}
    with refused(MismatchError, "dtypes or layouts clash", "of strides [1, 37] against"):
        tallstore.pack(tmp_path / "z.tall", stored.base, {"b": other})
    # Not what another head says, which is few of the weights.
    other["layer.bias"] = torch.ones(3)
    with refused(MismatchError, "dtypes or layouts clash", "of strides [1, 37] against"):
        tallstore.pack(tmp_path / "z.tall", stored.base, {"b": other})
    stored.check()


def test_a_base_without_floats(tmp_path: Path) -> None:
    base = {"w": torch.arange(9)}
    with refused(MismatchError, "no float32, bfloat16 or float16 weights to mask"):
        tallstore.pack(tmp_path / "z.tall", base, {"t": base})
    with refused(MismatchError, "no float32, bfloat16 or float16 weights to mask"):
        tallstore.pack(tmp_path / "z.tall", {}, {"t": base})
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_not_finite_packs(tmp_path: Path) -> None:
    base = make_base()
    base["norm.weight"][0] = float("nan")
    base["scale"] = torch.tensor(float("-inf"))
    tasks = {"a": fine_tune(base, 1), "b": fine_tune(make_base(), 2)}
    path = tmp_path / "z.tall"
    for exact in (True, False):
        tallstore.pack(path, base, tasks, exact=exact, overwrite=True)
        for name, state in tasks.items():
            found = tallstore.load(path, task=name)
            if exact:
                assert_same(found, state)
            kept = {key: found[key] for key in ("norm.weight", "scale")}
            assert_same(kept, {key: state[key] for key in kept})


def test_packing_where_something_is(stored: Stored) -> None:
    with refused(StoreExistsError, f"{stored.path}: there already"):
        tallstore.pack(stored.path, stored.base, stored.tasks)
    stored.check()


def test_a_truncated_safetensors_file(stored: Stored, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file(stored.base, path)
    os.truncate(path, path.stat().st_size - 100)
    with refused(CheckpointError, path):
        tallstore.pack(tmp_path / "z.tall", stored.base, {"t": path})
    with refused(CheckpointError, path):
        tallstore.add(stored.path, {"t": path})
    assert not (tmp_path / "z.tall").exists()
    stored.check()


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_a_pickle_that_would_execute_code(stored: Stored, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    evil = {"w": torch.ones(3), "x": _Evil(marker)}
    torch.save(evil, tmp_path / "zip.pt")
    torch.save(evil, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Evil(marker), protocol=2))
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert marker.exists(), "the bait works"
    marker.unlink()
    for name in ("zip.pt", "legacy.bin", "plain.pt"):
        path = tmp_path / name
        for use in (
            lambda p=path: tallstore.add(stored.path, {"t": p}),
            lambda p=path: tallstore.pack(tmp_path / "z.tall", p, {"t": stored.base}),
            lambda p=path: tallstore.pack(tmp_path / "z.tall", stored.base, {"t": p}),
        ):
            with refused(UnsafePickleError, path):
                use()
        with refused(NotAStoreError, path):
            tallstore.load(path)
    assert not marker.exists(), "the pickle was executed"
    assert not (tmp_path / "z.tall").exists()
    stored.check()


@pytest.mark.parametrize(
    ("obj", "where"),
    [
        ({"a": [1, {"b": object()}]}, "a"),
        ({"model": torch.ones(1), "f": lambda: 0}, "f"),
        ([1, 2, sys], "2"),
    ],
)
def test_an_unsupported_object(stored: Stored, obj: Any, where: str) -> None:
    for use in (
        lambda: tallstore.save(obj, stored.path, overwrite=True),
        lambda: tallstore.save(obj, stored.path, task="t"),
        lambda: tallstore.pack(stored.path, stored.base, {"t": obj}, overwrite=True),
    ):
        with refused(UnsupportedObjectError, where):
            use()
    stored.check()


def test_devices_that_are_not_there(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        with refused(DeviceError, f"device={device!r}: no CUDA device", "device='cpu'"):
            tallstore.load(stored.path, task="one", device=device)
    with refused(OptionError, "device='gpu'"):
        tallstore.load(stored.path, device="gpu")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_device_that_is_too_small(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert kwargs["device"] == torch.device("cuda", 0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "mem_get_info": (7 << 20, 9 << 20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch, "empty", empty)
    with refused(DeviceError, "cuda:0: out of memory while loading", "7 of 9 MiB are free"):
        tallstore.load(stored.path, device="cuda", dtype=dtype)
    with refused(DeviceError, "device='cuda:1': there are 1 CUDA devices"):
        tallstore.load(stored.path, device="cuda:1")


@pytest.mark.parametrize("fidelity", ["lossy", "", 1])
def test_a_fidelity_that_does_not_exist(stored: Stored, fidelity: Any) -> None:
    with refused(OptionError, f"fidelity={fidelity!r}", "'exact' or 'codes'"):
        tallstore.load(stored.path, task="one", fidelity=fidelity)
