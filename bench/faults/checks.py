"""What must hold in a place after an operation was cut off."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

import tallstore
from bench.faults.operations import OPERATIONS, Content, Wanted
from bench.faults.states import State, base, tuned
from tallstore.errors import StoreNotFoundError

__all__ = ["check", "content", "demand", "same"]


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


def same(found: Content | None, wanted: Content | None) -> bool:
    """Whether two stores hold the same, bit for bit."""
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
    demand(not strange, f"{strange} left behind")
    found = content(path)
    is_new = same(found, _resolved(template, operation.after))
    if found is None:
        demand(operation.before is None, "the store is gone")
    was = _resolved(template, operation.before)
    demand(is_new or same(found, was), f"holds {found and list(found)}")
    if operation.makes:
        is_new = _check_made(place, template, name)
    demand(is_new or not finished, "it had returned, and is not there")
    _go_on(place, template, name, found)
    return is_new


def _resolved(template: Path, content: Wanted | None) -> Content | None:
    """With what the template holds in place of names."""
    if content is None:
        return None
    return {
        name: load_file(template / "wanted" / f"{state}.safetensors")
        if isinstance(state, str)
        else state
        for name, state in content.items()
    }


def _check_made(place: Path, template: Path, name: str) -> bool:
    """What unpack made is whole, or not there (or, over a file, what was there before)."""
    made = OPERATIONS[name].makes
    out, wanted = place / made, template / "wanted" / made
    if out.exists() and _same_files(out, wanted):
        return True
    if name == "unpack over a file":
        demand(_same_files(out, template / "wanted" / "before"), f"{made} is neither old nor new")
    else:
        demand(not out.exists(), f"{made} looks whole and is not")
    return False


def _go_on(place: Path, template: Path, name: str, found: Content | None) -> None:
    """The next write takes over, and leaves no litter."""
    operation, path = OPERATIONS[name], place / "zoo.tall"
    if found is None:
        tallstore.save(base(), path)
        found = {None: base()}
    tallstore.save(tuned(99), path, task="after")
    wanted = {**found, "after": tuned(99)}
    demand(same(content(path), wanted), "the next write went wrong")
    with tallstore.open(path) as store:
        stray = store.verify().stray
    demand(not stray, f"{stray} chunks of the cut-off write are still there")
    if operation.makes:
        if not (place / operation.makes).exists() or name == "unpack over a file":
            operation.run(place)
        made = template / "wanted" / operation.makes
        demand(_same_files(place / operation.makes, made), "the next unpack went wrong")
    tallstore.compact(path)
    demand(same(content(path), wanted), "compacting after it went wrong")
    left = {p.name for p in place.iterdir()} - {"zoo.tall", "in", operation.makes}
    demand(not left, f"litter: {sorted(left)}")


def demand(condition: bool, otherwise: str) -> None:
    """Raise AssertionError unless it holds."""
    if not condition:
        raise AssertionError(otherwise)
