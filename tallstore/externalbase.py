"""A base that is in another store: where that is, whether it is the right one, its elements.

The store that refers to it holds everything about the base but its elements: names, shapes, files,
its identity. So the other store is opened only when weights are wanted, and what it gives is known
to be the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tallstore.catalog import BaseRecord, Catalog
from tallstore.describing import read_base
from tallstore.documents import BaseDocument, ExternalReference
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError, OptionError, TallstoreError, WrongBaseError
from tallstore.store import open_snapshot

__all__ = [
    "OUTSIDE",
    "ExternalStore",
    "base_elements",
    "open_external",
    "place_of",
    "recorded_path",
    "refer",
    "with_base_at",
]

#: What a base in another store is called where damage is listed.
OUTSIDE: Final = "external base"


def recorded_path(store: Path, base: Path) -> str:
    """How `store` refers to the file `base`.

    Relative, so that both can be moved together, unless they have no directory in common but the
    root. Links are kept: they may be meant to lead to another copy later.
    """
    there = Path(os.path.abspath(base))
    common = Path(os.path.commonpath([store.parent, there]))
    if common == Path(common.anchor):
        return str(there)
    return os.path.relpath(there, store.parent)


def place_of(store: Path, recorded: str) -> Path:
    """The file that `store` refers to."""
    return Path(os.path.normpath(store.parent / recorded))


def refer(store: Path, base: Path, identity: str) -> ExternalReference:
    """A reference from the store at `store` to the base of the store at `base`."""
    return ExternalReference(recorded_path(store, base), identity)


def with_base_at(store: Path, catalog: Catalog, base: Path) -> Catalog:
    """The catalog of `store`, its base looked for in another place than it says.

    Raises
    ------
    OptionError
        Its base is not in another store.
    """
    record = catalog.base
    if record is None or record.external is None:
        raise OptionError(f"{store}: it holds its base itself, no other store is needed")
    if os.path.realpath(base) == str(store):
        raise OptionError(f"{store}: its base is in another store; name that, not itself")
    return replace(catalog, base=replace(record, external=recorded_path(store, base)))


@dataclass(frozen=True, slots=True)
class ExternalStore:
    """The store that has a base's elements, checked to hold the base that is meant."""

    snapshot: Snapshot
    record: BaseRecord
    document: BaseDocument

    def close(self) -> None:
        """Close it."""
        self.snapshot.close()


def base_elements(snapshot: Snapshot, base: BaseDocument) -> tuple[Snapshot, Sequence[int]]:
    """Where the elements of a store's base are read: a snapshot, and its stream for each arena.

    Another store stays open for as long as `snapshot` does, at the generation that it was found in.

    Raises
    ------
    WrongBaseError, StoreNotFoundError, NotAStoreError, CorruptStoreError
        The base is in another store, which is not there, or holds another base.
    """
    reference = base.external
    if reference is None:
        return snapshot, base.streams
    found = snapshot.beside(reference, lambda: open_external(snapshot.path, reference, base))
    return found.snapshot, found.document.streams


def open_external(store: Path, reference: ExternalReference, base: BaseDocument) -> ExternalStore:
    """Open the store that `store` refers to; raises as `base_elements` does."""
    place = place_of(store, reference.path)
    needed = f"{store}: needs base {reference.identity}, which is in another store, {place}"
    cure = (
        f"put that base back, or say where it is: tallstore relink {store} BASE.tall, or "
        "external_base= (--external-base) for once"
    )
    try:
        # Through links: other handles on the file know it by its own name.
        snapshot = open_snapshot(Path(os.path.realpath(place)))
    except TallstoreError as exc:
        raise type(exc)(f"{needed}. That cannot be opened: {exc}; {cure}") from exc
    try:
        catalog = Catalog.from_json(snapshot.manifest.body, what=str(place))
        if catalog.base is None or catalog.base.identity != reference.identity:
            held = "none" if catalog.base is None else catalog.base.identity
            raise WrongBaseError(f"{needed}. The base there is {held}; {cure}")
        if catalog.base.external is not None:
            other = place_of(snapshot.path, catalog.base.external)
            raise WrongBaseError(
                f"{needed}. That one has it from a third, {other}; refer to that one: "
                f"tallstore relink {store} {other}"
            )
        document = read_base(snapshot, catalog)
        if document.contents.segments != base.contents.segments:
            raise CorruptStoreError(f"{needed}. The base there is laid out otherwise; {cure}")
        return ExternalStore(snapshot, catalog.base, document)
    except BaseException:
        snapshot.close()
        raise
