"""What a command line names: a store, and checkpoints with their tasks' names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import click

from tallstore.catalog import check_task_name
from tallstore.errors import OptionError

__all__ = ["read_tasks", "split_store"]

_MODEL_MARKS: Final = ("config.json", "*.index.json")
#: What a model's weights are called in its own directory: no names of tasks.
_USUAL: Final = ("model", "pytorch_model")


def _named(item: str) -> tuple[str, str] | None:
    """The name and path of ``NAME=PATH``; a path with a '=' has a '/' before it, as in ./a=b."""
    name, sign, path = item.partition("=")
    return (name, path) if sign and "/" not in name else None


def split_store(items: Sequence[str]) -> tuple[str, list[str]]:
    """The store's path among arguments that came in any order, and the others.

    It is the only one called ``*.tall`` that is no ``NAME=PATH``; failing that, the first that
    is none.
    """
    bare = [n for n, item in enumerate(items) if _named(item) is None]
    tall = [n for n in bare if items[n].endswith(".tall")]
    if not bare:
        raise click.UsageError("No store is named; give its path, such as zoo.tall.")
    chosen = tall[0] if len(tall) == 1 else bare[0]
    return items[chosen], [item for n, item in enumerate(items) if n != chosen]


def read_tasks(items: Sequence[str], *, base: str | None = None) -> dict[str, str]:
    """Checkpoints by task.

    Parameters
    ----------
    items
        ``NAME=PATH``, bare checkpoints (called after their file), directories of checkpoints.
    base
        The base's path; a directory that holds it too does not make a task of it.

    Raises
    ------
    OptionError
        Two have one name.
    TaskNameError
        A name that cannot be a task's.
    EmptyZooError, CheckpointError
        A directory holds no checkpoint, or cannot be read.
    """
    found: dict[str, str] = {}
    for item in items:
        for name, path in _each(item, base):
            check_task_name(name)
            if name in found:
                raise OptionError(
                    f"two checkpoints for task {name!r}: {found[name]} and {path}; "
                    "name them apart with NAME=PATH"
                )
            found[name] = path
    return found


def _each(item: str, base: str | None) -> Iterator[tuple[str, str]]:
    named = _named(item)
    if named is not None:
        name, path = named
        if not path:
            raise click.UsageError(f"{item!r}: a path is missing after the '='.")
        yield name, os.path.expanduser(path)  # shells leave a ~ after the '=' alone
        return
    store, sign, task = item.rpartition("::")
    if sign and store and not Path(item).exists():
        yield task, item
        return
    place = Path(item)
    if place.is_dir():
        yield from _from_directory(place, base)
    else:
        yield place.stem, item


def _from_directory(directory: Path, base: str | None) -> Iterator[tuple[str, str]]:
    from tallstore.sources.discover import discover_zoo
    from tallstore.sources.model_files import has_weights

    marked = any(any(directory.glob(mark)) for mark in _MODEL_MARKS)
    found = {} if marked and has_weights(directory) else discover_zoo(directory)
    if not found or (len(found) == 1 and set(found) <= set(_USUAL)):
        yield directory.resolve().name, str(directory)
        return
    for name, path in found.items():
        if base is None or not (os.path.exists(base) and path.samefile(base)):
            yield name, str(path)
