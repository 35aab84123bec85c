"""Every writing operation on a small zoo, and what must hold after one was cut off.

Each works in a *place*: a directory with ``in/`` (checkpoints to read) and, for most, ``zoo.tall``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

import tallstore
from tallstore.errors import StoreNotFoundError

__all__ = ["OPERATIONS", "Operation", "check", "content", "make_template", "prepare", "problems"]

_MERGED: Final = "merged"

State = dict[str, torch.Tensor]
Content = dict[str | None, State]

_SHAPES: Final = {
    "embed": (300, 41),
    "layer.0": (130, 64),
    "bias": (130,),
    "scale": (),
    "head": (9, 7),
}


def _base(seed: int = 0) -> State:
    draw = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=draw) for name, shape in _SHAPES.items()}
    state["half"] = torch.randn(5000, generator=draw).bfloat16()
    state["positions"] = torch.arange(seed, seed + 11)
    return state


def _tuned(seed: int) -> State:
    draw = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (t.float() + 0.01 * torch.randn(t.shape, generator=draw)).to(t.dtype)
        if t.is_floating_point()
        else t.clone()
        for name, t in _base().items()
    }


def _other(seed: int) -> State:
    """Nothing like the base, and large enough for several transactions and kinds of pages."""
    draw = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(40_000, generator=draw), "b": torch.arange(seed, seed + 50)}


def _save_new(place: Path) -> None:
    tallstore.save(_other(1), place / "zoo.tall")


def _save_over(place: Path) -> None:
    tallstore.save(_other(1), place / "zoo.tall", overwrite=True)


def _save_over_in_use(place: Path) -> None:
    with tallstore.open(place / "zoo.tall"):
        tallstore.save(_other(1), place / "zoo.tall", overwrite=True)


def _save_task(place: Path) -> None:
    tallstore.save(_other(1), place / "zoo.tall", task="new")


def _save_task_over(place: Path) -> None:
    tallstore.save(_tuned(77), place / "zoo.tall", task="t1", overwrite=True)


def _pack(place: Path) -> None:
    tasks = {"x": str(place / "in" / "x.safetensors"), "y": _tuned(9)}
    base = str(place / "in" / "base")
    tallstore.pack(place / "zoo.tall", base, tasks, exact=True, overwrite=True)


def _add(place: Path) -> None:
    tasks = {name: str(place / "in" / f"{name}.safetensors") for name in ("x", "z")}
    tallstore.add(place / "zoo.tall", tasks)


def _remove(place: Path) -> None:
    with tallstore.open(place / "zoo.tall", "a") as store:
        store.remove("t0", "t2")


def _compact(place: Path) -> None:
    tallstore.compact(place / "zoo.tall")


def _unpack_file(place: Path) -> None:
    with tallstore.open(place / "zoo.tall") as store:
        store.unpack("t1", place / "out.safetensors", overwrite=True)


def _unpack_directory(place: Path) -> None:
    with tallstore.open(place / "zoo.tall") as store:
        store.unpack(None, place / "out", max_shard_size=20_000)


def _merge_as_task(place: Path) -> None:
    tallstore.merge(place / "zoo.tall", tasks=["t0", "t2"], as_task=_MERGED)


def _merge_to_a_file(place: Path) -> None:
    tallstore.merge(place / "zoo.tall", place / "merged.safetensors", tasks=["t0", "t2"])


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of write."""

    run: Callable[[Path], None]
    before: Content | None
    """What the store holds before; None where there is none."""
    after: Content
    """What it holds afterwards, but for a merged task."""
    makes: str = ""
    """What it makes beside the store."""
    steps: tuple[str, ...] = ()
    """Which named steps of `WriteSession.step` it comes to."""


_OLD: Final[Content] = {None: _base(), **{f"t{n}": _tuned(n) for n in range(3)}}
_PACKED: Final[Content] = {None: _base(), "x": _tuned(8), "y": _tuned(9)}
_IN_PLACE: Final = ("chunks", "synced", "manifest", "committed")

OPERATIONS: Final[dict[str, Operation]] = {
    "save new": Operation(_save_new, None, {None: _other(1)}, "", _IN_PLACE),
    "save over": Operation(_save_over, _OLD, {None: _other(1)}, "", _IN_PLACE),
    "save over in use": Operation(
        _save_over_in_use, _OLD, {None: _other(1)}, "", (*_IN_PLACE, "reclaim")
    ),
    "save task": Operation(_save_task, _OLD, {**_OLD, "new": _other(1)}, "", _IN_PLACE),
    "save task over": Operation(
        _save_task_over, _OLD, {**_OLD, "t1": _tuned(77)}, "", (*_IN_PLACE, "reclaim")
    ),
    "pack new": Operation(_pack, None, _PACKED, "", _IN_PLACE),
    "pack over": Operation(_pack, _OLD, _PACKED, "", _IN_PLACE),
    "add": Operation(_add, _OLD, {**_OLD, "x": _tuned(8), "z": _tuned(10)}, "", _IN_PLACE),
    "rm": Operation(
        _remove, _OLD, {None: _base(), "t1": _tuned(1)}, "", (*_IN_PLACE[1:], "reclaim")
    ),
    "compact": Operation(_compact, _OLD, _OLD),
    "unpack to a file": Operation(_unpack_file, _OLD, _OLD, "out.safetensors"),
    "unpack over a file": Operation(_unpack_file, _OLD, _OLD, "out.safetensors"),
    "unpack to a directory": Operation(_unpack_directory, _OLD, _OLD, "out"),
    "merge as a task": Operation(_merge_as_task, _OLD, _OLD, "", _IN_PLACE),
    "merge to a file": Operation(_merge_to_a_file, _OLD, _OLD, "merged.safetensors"),
}


def _write_inputs(folder: Path) -> None:
    (folder / "base").mkdir(parents=True)
    save_file(_base(), folder / "base" / "model.safetensors", metadata={"format": "pt"})
    (folder / "base" / "config.json").write_text('{"model_type": "small"}\n')
    (folder / "base" / "words").mkdir()
    (folder / "base" / "words" / "vocab.txt").write_text("a\nb\n")
    for name, seed in (("x", 8), ("z", 10)):
        save_file(_tuned(seed), folder / f"{name}.safetensors")


def make_template(folder: Path) -> None:
    """A place to copy: a store of the base and three tasks, with space that removed ones left."""
    _write_inputs(folder / "in")
    path = folder / "zoo.tall"
    gone = {"gone": _tuned(50)}
    old = {name: state for name, state in _OLD.items() if name is not None}
    tallstore.pack(path, str(folder / "in" / "base"), {**old, **gone}, exact=True)
    tallstore.save(_other(9), path, task="gone too")
    with tallstore.open(path, "a") as store:
        store.remove("gone", "gone too")
    # What `unpack` must make, to the byte.
    (folder / "wanted").mkdir()
    with tallstore.open(path) as store:
        store.unpack("t1", folder / "wanted" / "out.safetensors")
        store.unpack(None, folder / "wanted" / "out", max_shard_size=20_000)
    tallstore.merge(path, folder / "wanted" / "merged.safetensors", tasks=["t0", "t2"])
    (folder / "wanted" / "before").write_bytes(b"what was there before")
    _demand(_same(content(path), _OLD), "the template is not what it should be")


def prepare(template: Path, place: Path, name: str) -> None:
    """Make `place` ready for an operation."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copytree(template / "in", place / "in")
    if OPERATIONS[name].before is not None:
        shutil.copyfile(template / "zoo.tall", place / "zoo.tall")
    if name == "unpack over a file":
        shutil.copyfile(template / "wanted" / "before", place / "out.safetensors")


# -- what must hold -----------------------------------------------------------------------


def content(path: Path) -> Content | None:
    """Everything in the store, verified; None where there is none."""
    try:
        with tallstore.open(path) as store:
            result = store.verify()
            if not result.ok:
                raise AssertionError(f"verify: {result.problems[0].message}")
            return {name: store.load(name) for name in (None, *store.tasks)}
    except StoreNotFoundError:
        return None


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _same(found: Content | None, wanted: Content | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    if found.keys() != wanted.keys():
        return False
    return all(_same_state(found[name], wanted[name]) for name in found)


def _same_state(found: Any, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and _bits(found[n]) == _bits(t)
        for n, t in wanted.items()
    )


def _same_files(found: Path, wanted: Path) -> bool:
    if wanted.is_file():
        return found.is_file() and found.read_bytes() == wanted.read_bytes()
    names = {p.relative_to(wanted) for p in wanted.rglob("*")}
    return {p.relative_to(found) for p in found.rglob("*")} == names and all(
        (wanted / n).is_dir() or (found / n).read_bytes() == (wanted / n).read_bytes()
        for n in names
    )


#: Names that a cut-off write may leave behind; the next write, or unpack, removes them.
_LITTER: Final = re.compile(
    r"zoo\.tall-(lock|writer)|\.zoo\.tall\.[0-9a-f]{12}\.tmp(-lock)?"
    r"|\.tallstore-[0-9a-f]{16}\.tmp|\.out\.[0-9a-f]{12}\.tmp"
)


def problems(place: Path, template: Path, name: str, *, finished: bool) -> list[str]:
    """What `check` finds wrong, as a list of at most one."""
    try:
        check(place, template, name, finished=finished)
    except Exception as exc:
        return [f"{type(exc).__name__}: {exc}"]
    return []


def check(place: Path, template: Path, name: str, *, finished: bool) -> bool:
    """Check a place after an operation was cut off, and again after the next write.

    Parameters
    ----------
    finished
        The operation had returned: all of it must be there.

    Returns
    -------
    bool
        Whether the new is there.
    """
    operation, path = OPERATIONS[name], place / "zoo.tall"
    litter = {p.name for p in place.iterdir()} - {"zoo.tall", "in", operation.makes}
    strange = sorted(n for n in litter if not _LITTER.fullmatch(n))
    _demand(not strange, f"{strange} left behind")
    found = content(path)
    is_new = _same(found, _after(template, name))
    if found is None:
        _demand(operation.before is None, "the store is gone")
    _demand(is_new or _same(found, operation.before), f"holds {found and list(found)}")
    if operation.makes:
        is_new = _check_made(place, template, name)
    _demand(is_new or not finished, "it had returned, and is not there")
    _go_on(place, template, name, found)
    return is_new


def _after(template: Path, name: str) -> Content:
    after = OPERATIONS[name].after
    if name != "merge as a task":
        return after
    return {**after, _MERGED: load_file(template / "wanted" / "merged.safetensors")}


def _check_made(place: Path, template: Path, name: str) -> bool:
    """What unpack made is whole, or not there (or, over a file, what was there before)."""
    made = OPERATIONS[name].makes
    out, wanted = place / made, template / "wanted" / made
    if out.exists() and _same_files(out, wanted):
        return True
    if name == "unpack over a file":
        _demand(_same_files(out, template / "wanted" / "before"), f"{made} is neither old nor new")
    else:
        _demand(not out.exists(), f"{made} looks whole and is not")
    return False


def _go_on(place: Path, template: Path, name: str, found: Content | None) -> None:
    """The next write takes over, and leaves no litter."""
    operation, path = OPERATIONS[name], place / "zoo.tall"
    if found is None:
        tallstore.save(_base(), path)
        found = {None: _base()}
    tallstore.save(_tuned(99), path, task="after")
    wanted = {**found, "after": _tuned(99)}
    _demand(_same(content(path), wanted), "the next write went wrong")
    with tallstore.open(path) as store:
        stray = store.verify().stray
    _demand(not stray, f"{stray} chunks of the cut-off write are still there")
    if operation.makes:
        if not (place / operation.makes).exists() or name == "unpack over a file":
            operation.run(place)
        made = template / "wanted" / operation.makes
        _demand(_same_files(place / operation.makes, made), "the next unpack went wrong")
    tallstore.compact(path)
    _demand(_same(content(path), wanted), "compacting after it went wrong")
    left = {p.name for p in place.iterdir()} - {"zoo.tall", "in", operation.makes}
    _demand(not left, f"litter: {sorted(left)}")


def _demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)
