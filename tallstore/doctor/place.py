"""Where a store is, or would be: its directory's file system, and the room there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tallstore.doctor.diagnosis import Problem, Section
from tallstore.engine.filesystem import file_system, free_room

__all__ = ["place"]

#: So little that the next write is likely to fail.
_LITTLE: Final = 1 << 30


def place(directory: Path, *, needed: int = 0) -> Section:
    """What a directory is good for.

    Parameters
    ----------
    needed
        Bytes of the store there: rewriting it takes as much again.
    """
    found, free = file_system(directory), free_room(directory)
    writable = not found.read_only and os.access(directory, os.W_OK)
    problems = []
    if not directory.is_dir():
        problems.append(Problem(f"{directory}: no such directory", "make it, or name another"))
    elif found.network:
        what = (
            f"{directory} is on a file system that other machines may share ({found.kind}, "
            f"{found.source}); LMDB's locks and its map hold within one machine"
        )
        cure = "use it from one machine at a time, or keep stores on a local disk"
        problems.append(Problem(what, cure, serious=False))
    if directory.is_dir() and not writable:
        what = f"{directory} cannot be written, so stores there can be read alone"
        problems.append(Problem(what, "change its permissions, or copy the store", serious=False))
    if writable and free is not None and free < max(_LITTLE, needed):
        what = f"{directory}: {free} bytes are free"
        cure = f"free some; a write may fail, and compact takes {needed} bytes for a while"
        problems.append(Problem(what, cure if needed else "free some", serious=False))
    facts = {
        "directory": str(directory),
        "file_system": found.kind,
        "mounted_from": found.source,
        "mounted_at": found.mount_point,
        "network": found.network,
        "writable": writable,
        "free_bytes": free,
    }
    return Section(facts, tuple(problems))
