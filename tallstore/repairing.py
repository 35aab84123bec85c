"""What is left of a damaged store, moved into a whole one. Nothing is guessed, nothing is deleted.

Chunks are copied as they are, each under its checksum, from wherever in the file a whole copy of
one is found (`tallstore.engine.salvage`). Then it is seen who can do without what is missing:

- a task of which everything is there is kept, bit for bit;
- a task of codes whose exact tier has a hole becomes what it was without that tier: lossy, and said
  to be;
- a task whose codes have a hole, but whose exact tier does without them, loses its codes: it loads
  bit for bit, but no more from codes alone, and that is said;
- a stored file that cannot be read is left out of its task, or base, and said to be;
- any other task with a hole is left out, with the names of the tensors that are gone;
- without a whole base there is no store: everything hangs on it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tallstore.catalog import Catalog
from tallstore.checking import verify_snapshot
from tallstore.damage import RESIDUAL, Damage
from tallstore.describing import read_base
from tallstore.engine.environment import lmdb_errors
from tallstore.engine.manifest import Manifest
from tallstore.engine.newfile import NewFile
from tallstore.engine.salvage import Salvage
from tallstore.engine.session import WriteSession
from tallstore.engine.snapshot import Snapshot
from tallstore.engine.writerlock import WriterLock
from tallstore.errors import CorruptStoreError, OptionError, StoreExistsError
from tallstore.externalbase import open_external, place_of, with_base_at
from tallstore.mending import base_without, codes_hit, has_codes, task_without
from tallstore.progress import Meter, Report
from tallstore.version import WRITTEN_BY

__all__ = ["Repair", "repair_store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What became of a store."""

    out: Path
    """Where the repaired store is."""
    kept: Path
    """Where the damaged file is."""
    generation: int
    """The commit whose manifest was gone by."""
    in_force: bool
    """Whether that is the last commit for certain. Where the last one's manifest is damaged, an
    older copy is gone by: tasks may be as they were before the last write, and removed ones back.
    """
    whole: tuple[str, ...]
    """Tasks that are there as they were."""
    lossy: Mapping[str, Damage]
    """Tasks whose exact tier is gone: their codes alone are left."""
    bare: tuple[str, ...]
    """Tasks whose codes are gone: their exact tier alone is left, and gives them bit for bit."""
    lost: Mapping[str, Damage]
    """Tasks that are not there any more, and what of them is damaged."""
    files: Mapping[str | None, tuple[str, ...]]
    """Stored files that are gone, by task; None: of the base."""
    missing: int
    """Chunks that could not be found again."""

    @property
    def ok(self) -> bool:
        """Whether nothing was lost."""
        return self.in_force and not (self.lossy or self.bare or self.lost or self.files)


def repair_store(
    path: Path,
    *,
    out: Path | None = None,
    timeout: float = 60.0,
    report: Report | None = None,
) -> Repair:
    """Make a whole store of what a damaged one still holds.

    Parameters
    ----------
    path
        The damaged store; its file is only read.
    out
        Where the repaired store goes, which must be free; None: in the damaged one's place, which
        is kept beside it as ``NAME.damaged``.
    timeout
        Seconds to wait for writers and readers.

    Raises
    ------
    CorruptStoreError
        Nothing can be saved: no manifest is whole, or the base is not. Nothing was changed.
    WrongBaseError, StoreNotFoundError, NotAStoreError
        The base is in another store, which is not there. Nothing was changed.
    StoreExistsError
        Something is at `out`.
    StoreLockedError
        Others have the store open; nothing was changed.
    """
    if out == path:
        raise OptionError(f"{out}: the damaged store itself; leave out= away to replace it")
    if out is not None and os.path.lexists(out):
        raise StoreExistsError(f"{out}: there already; name another place (--out)")
    place = path if out is None else out
    with WriterLock(path, timeout=timeout), lmdb_errors(path, doing="repair"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            salvage = Salvage(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        try:
            new = NewFile(place)
            try:
                repair = _rebuild(new, salvage, path, place, report)
                if out is None:
                    kept = new.publish_beside(timeout=timeout)
                    return replace(repair, kept=kept)
                new.publish(timeout=timeout)
                return repair
            finally:
                new.discard()
        finally:
            os.close(descriptor)


def _rebuild(
    new: NewFile, salvage: Salvage, path: Path, place: Path, report: Report | None
) -> Repair:
    before, in_force = salvage.manifest()
    missing = _copy(new, salvage, before, report)
    new.environment.handles += 1
    snapshot = _snapshot(new)
    try:
        catalog = Catalog.from_json(before.body, what=str(path))
        _reach_base(path, snapshot, catalog)
        catalog = _from(path, place, catalog)
        found = verify_snapshot(snapshot, catalog, outside=False)
        _check_base(path, catalog, found.base)
        lost: dict[str, Damage] = {}
        lossy: dict[str, Damage] = {}
        files: dict[str | None, tuple[str, ...]] = {}
        for name, damage in found.tasks.items():
            if damage.roles == {RESIDUAL} and has_codes(snapshot, catalog, name):
                lossy[name] = damage
            elif damage.roles:
                lost[name] = damage
            if damage.files and name not in lost:
                files[name] = damage.files
        bad = {problem.chunk[0] for problem in found.problems if problem.chunk is not None}
        bare = []
        for name in catalog.tasks.keys() - lost.keys() if bad else ():
            hit = codes_hit(snapshot, catalog, name, bad)
            if hit and name in lossy:
                damage = lossy.pop(name)
                lost[name] = replace(damage, roles=damage.roles | {"planes"})
                files.pop(name, None)
            elif hit:
                bare.append(name)
        kept = {name: task for name, task in catalog.tasks.items() if name not in lost}
        with WriteSession(new.environment, snapshot.manifest) as session:
            base = catalog.base
            if base is not None and found.base is not None:
                files[None] = found.base.files
                base = base_without(session, snapshot, catalog, base, found.base.files)
            tasks = {
                name: task_without(
                    session,
                    snapshot,
                    catalog,
                    name,
                    exact=name not in lossy,
                    codes=name not in bare,
                    files=files.get(name, ()),
                )
                if name in lossy or name in bare or name in files
                else record
                for name, record in kept.items()
            }
            after = replace(catalog, base=base, tasks=tasks)
            after = replace(after, vector=after.used_vector())
            session.commit(after.to_json(), live=after.live_streams(), written_by=WRITTEN_BY)
    finally:
        snapshot.close()
    changed = {*lossy, *bare, *files}
    whole = tuple(name for name in kept if name not in changed)
    return Repair(
        out=place,
        kept=path,
        generation=before.generation,
        in_force=in_force,
        whole=whole,
        lossy=lossy,
        bare=tuple(name for name in kept if name in bare),
        lost=lost,
        files=files,
        missing=missing,
    )


def _from(path: Path, place: Path, catalog: Catalog) -> Catalog:
    """The catalog of the store at `path` as it is to stand in one at `place`."""
    recorded = None if catalog.base is None else catalog.base.external
    if recorded is None or path.parent == place.parent:
        return catalog
    return with_base_at(place, catalog, place_of(path, recorded))


def _reach_base(path: Path, snapshot: Snapshot, catalog: Catalog) -> None:
    """A base in another store has to be there: without it nobody can tell what is whole."""
    try:
        base = read_base(snapshot, catalog)
    except CorruptStoreError:
        return  # `verify_snapshot` will tell
    if base.external is not None:
        open_external(path, base.external, base).close()


def _snapshot(new: NewFile) -> Snapshot:
    try:
        return Snapshot(new.environment)
    except BaseException:
        new.environment.close()
        raise


def _copy(new: NewFile, salvage: Salvage, before: Manifest, report: Report | None) -> int:
    """Move every chunk that is whole into the new file; returns how many are not."""
    missing = 0
    total = sum(stream.stored for stream in before.streams.values())
    progress = Meter(report).stage("repair", total)
    with WriteSession(new.environment, before) as session:
        for stream in before.streams.values():
            for chunk in range(stream.chunks):
                value = salvage.chunk(before.store, stream, chunk)
                if value is None:
                    missing += 1
                else:
                    session.copy(stream, chunk, value)
                    progress(len(value))
        session.commit(before.body, live=frozenset(before.streams), written_by=WRITTEN_BY)
    return missing


def _check_base(path: Path, catalog: Catalog, damage: Damage | None) -> None:
    if catalog.base is None or damage is None or not damage.roles:
        return
    if "document" in damage.roles:
        gone = "its document, without which nothing in the store can be told apart"
        left = ""
    else:
        gone = f"{len(damage.tensors)} of its tensors ({_some(damage.tensors)})"
        left = "; the tensors that are not named here still load (names=)"
    raise CorruptStoreError(
        f"{path}: the base is damaged: {gone}. Every task hangs on it, so no store can be made of "
        f"what is left{left}. Restore the store from a copy"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
