"""The checkpoints of a directory, one a task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tallstore.errors import CheckpointError, EmptyZooError, OptionError
from tallstore.sources.model_files import has_weights
from tallstore.sources.reading import read_error

__all__ = ["CHECKPOINT_SUFFIXES", "discover_zoo"]

#: Files of these names are taken for checkpoints.
CHECKPOINT_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def discover_zoo(directory: str | Path) -> dict[str, Path]:
    """Find the checkpoints in `directory`, by the names of their tasks.

    A subdirectory with weights is a task of its name; a checkpoint file is one of its name
    without the suffix. Hidden names and all else are passed over. Nothing is opened.

    Parameters
    ----------
    directory
        A directory of checkpoints, one per task.

    Returns
    -------
    dict
        Path by name, sorted by name.

    Raises
    ------
    EmptyZooError
        There is none.
    OptionError
        Two have one name, or `directory` is itself a model.
    CheckpointError
        It is not a directory, or cannot be read.
    """
    root = Path(directory)
    if root.exists() and not root.is_dir():
        raise CheckpointError(
            f"{root} is a file, not a directory of checkpoints; give it as NAME={root}"
        )
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as exc:
        raise read_error(root, exc) from exc
    _refuse_model(root, {entry.name for entry in entries})
    found: dict[str, Path] = {}
    for entry in entries:
        path = root / entry.name
        name = _task_name(path)
        if name is None:
            continue
        if name in found:
            raise OptionError(
                f"{root} has two checkpoints for task {name!r}: {found[name].name} and "
                f"{path.name}; rename or move one"
            )
        found[name] = path
    if not found:
        raise EmptyZooError(
            f"{root} holds no checkpoint: no model directory and no file ending in "
            f"{', '.join(CHECKPOINT_SUFFIXES)}; check the path"
        )
    return dict(sorted(found.items()))


def _task_name(path: Path) -> str | None:
    if path.name.startswith("."):
        return None
    if path.is_dir():
        return path.name if has_weights(path) else None
    return path.stem if path.suffix.lower() in CHECKPOINT_SUFFIXES else None


def _refuse_model(root: Path, names: set[str]) -> None:
    """A model directory is one task, and its shards are no tasks."""
    if not has_weights(root):
        return
    marks = sorted(
        name
        for name in names
        if name == "config.json"
        or name.endswith(".bin.index.json")
        or name.endswith(".safetensors.index.json")
    )
    if marks:
        raise OptionError(
            f"{root} is itself a model directory (it has {marks[0]}), not a directory of "
            f"checkpoints; give it as NAME={root}, or give the directory around it"
        )
