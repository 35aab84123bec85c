"""Looking at everything."""

from __future__ import annotations

import os
from pathlib import Path

from tallstore.doctor.diagnosis import Diagnosis
from tallstore.doctor.machine import machine
from tallstore.doctor.place import place
from tallstore.doctor.probing import probe
from tallstore.doctor.programs import PACKAGES, gpu, programs
from tallstore.doctor.storefile import storefile

__all__ = ["examine"]

#: What looking into a store takes.
_READING = ("lmdb", "numpy", "xxhash", "zstandard")


def examine(store: str | os.PathLike[str] | None = None) -> Diagnosis:
    """Look at programs, GPU, machine and place; and at a store, where one is named.

    Nothing is changed but reader slots of killed processes, which are cleared. A store's chunks
    are not verified: that is what `tallstore.TallStore.verify` is for.

    Parameters
    ----------
    store
        Path of a store; without it the working directory is looked at.
    """
    found = probe(PACKAGES)
    sections = {"programs": programs(found), "gpu": gpu(found), "machine": machine()}
    if store is None:
        return Diagnosis({**sections, "place": place(Path.cwd())})
    path = Path(os.path.realpath(store))
    size = path.stat().st_size if path.is_file() else 0
    sections["place"] = place(path.parent, needed=size)
    readable = not any("error" in found[name] for name in _READING)
    return Diagnosis({**sections, "store": storefile(path, readable=readable)})
