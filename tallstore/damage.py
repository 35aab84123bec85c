"""From damaged chunks to what they take with them: tasks, tensors, files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tallstore.catalog import Catalog
from tallstore.documents import StoredFile
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import TallstoreError
from tallstore.externalbase import OUTSIDE
from tallstore.loading import Loader

__all__ = ["RESIDUAL", "BadChunks", "Damage", "damage_of"]

#: (stream, chunk) of what is damaged.
BadChunks = Collection[tuple[int, int]]
#: The role of the exact tier's chunks; the others are named in `Decoder.needs`.
RESIDUAL = "residual"


@dataclass(frozen=True, slots=True)
class Damage:
    """What a task, or the base, cannot do without and has not."""

    roles: frozenset[str]
    """What is damaged of it: ``"base"``, ``"external base"``, ``"own"``, ``"planes"``,
    ``"vector"``, ``"residual"``, ``"document"``."""
    tensors: tuple[str, ...]
    """The tensors that do not load."""
    files: tuple[str, ...]
    """The stored files that cannot be read."""


def damage_of(
    snapshot: Snapshot,
    catalog: Catalog,
    task: str | None,
    bad: BadChunks,
    *,
    outside: BadChunks = (),
) -> Damage | None:
    """What damaged chunks do to a task (None: to the base); None where it is whole.

    Parameters
    ----------
    outside
        Damaged chunks of the store that has the base, where that is another one.
    """
    try:
        loader = Loader(snapshot, catalog, task=task)
    except TallstoreError:
        return Damage(frozenset({"document"}), (), ())
    roles: set[str] = set()
    segments: set[int] = set()
    decoder = loader.decoder
    for key in decoder.spans(range(len(loader.contents.segments))):
        hit = {
            role
            for role, stream in decoder.needs(key)
            if (stream, key[2]) in (outside if role == OUTSIDE else bad)
        }
        for run in decoder.runs(key) if hit else ():
            concerned = hit if run.coded else hit & {"base", OUTSIDE, "own"}
            if concerned:
                roles |= concerned
                segments.add(run.segment)
    contents = loader.contents
    names = tuple(
        name
        for name, number in contents.names().items()
        if contents.tensors[number].segment in segments
    )
    files = tuple(file.path for file in contents.files if _lost(snapshot, file, bad))
    return Damage(frozenset(roles), names, files) if roles or files else None


def _lost(snapshot: Snapshot, file: StoredFile, bad: BadChunks) -> bool:
    if not file.nbytes:
        return False
    size = snapshot.stream(file.stream).chunk_size
    chunks = range(file.offset // size, (file.offset + file.nbytes - 1) // size + 1)
    return any((file.stream, chunk) in bad for chunk in chunks)
