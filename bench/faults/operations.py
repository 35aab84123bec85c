"""Every writing operation on a small zoo.

Each works in a *place*: a directory with ``in/`` (checkpoints to read) and, for most, ``zoo.tall``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tallstore
from bench.faults.states import OLD, State, base, other, tuned

__all__ = ["OPERATIONS", "Content", "Operation", "Wanted"]

Content = Mapping[str | None, State]
#: With, for some tasks, the name of a file of the template's.
Wanted = Mapping[str | None, State | str]


def _save_new(place: Path) -> None:
    tallstore.save(other(1), place / "zoo.tall")


def _save_over(place: Path) -> None:
    tallstore.save(other(1), place / "zoo.tall", overwrite=True)


def _save_over_in_use(place: Path) -> None:
    with tallstore.open(place / "zoo.tall"):
        tallstore.save(other(1), place / "zoo.tall", overwrite=True)


def _save_task(place: Path) -> None:
    tallstore.save(other(1), place / "zoo.tall", task="new")


def _save_task_over(place: Path) -> None:
    tallstore.save(tuned(77), place / "zoo.tall", task="t1", overwrite=True)


def _pack(place: Path) -> None:
    tasks = {"x": str(place / "in" / "x.safetensors"), "y": tuned(9)}
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
    tallstore.merge(place / "zoo.tall", tasks=["t0", "t2"], as_task="merged")


def _merge_to_a_file(place: Path) -> None:
    tallstore.merge(place / "zoo.tall", place / "merged.safetensors", tasks=["t0", "t2"])


def _add_codes(place: Path) -> None:
    tasks = {name: str(place / "in" / f"{name}.safetensors") for name in ("x", "z")}
    tallstore.add(place / "zoo.tall", tasks, code="seeded")


def _add_masks(place: Path) -> None:
    tasks = {"x": str(place / "in" / "x.safetensors")}
    tallstore.add(place / "zoo.tall", tasks, code="tall", exact=True)


def _add_exact(place: Path) -> None:
    tallstore.add(place / "zoo.tall", {"t1": tuned(1)}, exact=True)


def _strip(place: Path) -> None:
    tallstore.strip(place / "zoo.tall", ["t1"])


def _repack(place: Path) -> None:
    tallstore.repack(place / "zoo.tall", code="levels", over="shared", bits=3, exact=False)


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of write."""

    run: Callable[[Path], None]
    before: Wanted | None
    """What the store holds before; None where there is none."""
    after: Wanted
    """What it holds afterwards."""
    makes: str = ""
    """What it makes beside the store."""
    steps: tuple[str, ...] = ()
    """Which named steps of `WriteSession.step` and `NewFile.publish` it comes to."""
    start: str = "zoo.tall"
    """The store of the template that it begins with."""


_PACKED: Final[Content] = {None: base(), "x": tuned(8), "y": tuned(9)}
_MASKED: Final[Content] = {**OLD, "x": tuned(8)}
_SEEDED: Final[Wanted] = {**OLD, "x": "x-seeded", "z": "z-seeded"}
_STRIPPED: Final[Wanted] = {**OLD, "t1": "t1-stripped"}
_REPACKED: Final[Wanted] = {None: base(), **{f"t{n}": f"t{n}-repacked" for n in range(3)}}
_MERGED: Final[Wanted] = {**OLD, "merged": "merged"}
_IN_PLACE: Final = ("chunks", "synced", "manifest", "committed")
_MOVED: Final = ("publish", "published")
_NEW: Final = (*_IN_PLACE, *_MOVED)

OPERATIONS: Final[dict[str, Operation]] = {
    "save new": Operation(_save_new, None, {None: other(1)}, "", _NEW),
    "save over": Operation(_save_over, OLD, {None: other(1)}, "", _NEW),
    "save over in use": Operation(
        _save_over_in_use, OLD, {None: other(1)}, "", (*_IN_PLACE, "reclaim")
    ),
    "save task": Operation(_save_task, OLD, {**OLD, "new": other(1)}, "", _IN_PLACE),
    "save task over": Operation(
        _save_task_over, OLD, {**OLD, "t1": tuned(77)}, "", (*_IN_PLACE, "reclaim")
    ),
    "pack new": Operation(_pack, None, _PACKED, "", _NEW),
    "pack over": Operation(_pack, OLD, _PACKED, "", _NEW),
    "add": Operation(_add, OLD, {**OLD, "x": tuned(8), "z": tuned(10)}, "", _IN_PLACE),
    "add codes": Operation(_add_codes, OLD, _SEEDED, "", _IN_PLACE),
    "add masks": Operation(_add_masks, OLD, _MASKED, "", _NEW),
    "strip": Operation(_strip, OLD, _STRIPPED, "", (*_IN_PLACE, "reclaim")),
    "add the exact tier": Operation(
        _add_exact, _STRIPPED, OLD, "", (*_IN_PLACE, "reclaim"), "stripped.tall"
    ),
    "repack": Operation(_repack, OLD, _REPACKED, "", _NEW),
    "rm": Operation(_remove, OLD, {None: base(), "t1": tuned(1)}, "", (*_IN_PLACE[1:], "reclaim")),
    "compact": Operation(_compact, OLD, OLD, "", _MOVED),
    "unpack to a file": Operation(_unpack_file, OLD, OLD, "out.safetensors"),
    "unpack over a file": Operation(_unpack_file, OLD, OLD, "out.safetensors"),
    "unpack to a directory": Operation(_unpack_directory, OLD, OLD, "out"),
    "merge as a task": Operation(_merge_as_task, OLD, _MERGED, "", _IN_PLACE),
    "merge to a file": Operation(_merge_to_a_file, OLD, OLD, "merged.safetensors"),
}
