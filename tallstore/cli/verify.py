"""``tallstore verify``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from tallstore.cli.options import (
    examples,
    external_base_option,
    json_option,
    quiet_option,
    store_argument,
)
from tallstore.cli.printing import emit_json, printable, size, styled
from tallstore.cli.progressbar import Progress
from tallstore.errors import CorruptStoreError

if TYPE_CHECKING:
    from tallstore.checking import Verification

__all__ = ["verify"]


@click.command(
    epilog=examples(
        "tallstore verify zoo.tall",
    )
)
@store_argument
@external_base_option
@json_option
@quiet_option
def verify(*, store: str, external_base: str | None, as_json: bool, quiet: bool) -> None:
    """Check every byte of a store against its checksums.

    A base in another store is checked as well, and that it is the base meant. Exits with
    status 1 if anything is damaged, after listing it and whom it concerns.
    """
    facts = {"store": os.path.abspath(store), **_check(store, external_base, quiet=quiet)}
    if as_json:
        emit_json(facts)
    else:
        _say(facts)
    if not facts["ok"]:
        raise click.exceptions.Exit(1)


def _check(place: str, external_base: str | None, *, quiet: bool) -> dict[str, Any]:
    from tallstore.store import TallStore

    try:
        with (
            TallStore(place, external_base=external_base) as opened,
            Progress(quiet=quiet) as progress,
        ):
            found = opened.verify(report=progress.report)
    except CorruptStoreError as exc:
        # So damaged that nothing in it can be found.
        problem = {"message": str(exc), "concerns": ["the whole store"]}
        return {"ok": False, "chunks": 0, "bytes": 0, "stray_chunks": 0, "problems": [problem]}
    return {
        "ok": found.ok,
        "chunks": found.chunks,
        "bytes": found.nbytes,
        "stray_chunks": found.stray,
        "problems": [
            {"message": problem.message, "concerns": list(problem.owners)}
            for problem in found.problems
        ],
        **_external(found),
    }


def _external(found: Verification) -> dict[str, Any]:
    """What was checked of a base in another store, if it is in one."""
    if found.external is None:
        return {}
    path, chunks, nbytes = found.external.path, found.external.chunks, found.external.nbytes
    return {"external_base": {"store": str(path), "chunks": chunks, "bytes": nbytes}}


def _say(facts: dict[str, Any]) -> None:
    for problem in facts["problems"]:
        whom = ", ".join(problem["concerns"]) or "nobody"
        head = styled("damaged:", fg="red")
        click.echo(f"{head} {printable(problem['message'])} (concerns {printable(whom)})")
    checked = f"{facts['chunks']} chunks, {size(facts['bytes'])}"
    if "external_base" in facts:
        there = facts["external_base"]
        checked += f"; of its base in {printable(there['store'])} "
        checked += f"{there['chunks']} chunks, {size(there['bytes'])}"
    if facts["ok"]:
        click.echo(f"{printable(facts['store'])}: whole; {checked} verified")
    else:
        count = len(facts["problems"])
        click.echo(f"{printable(facts['store'])}: {count} problem{'s' * (count != 1)} in {checked}")
        click.echo(
            "Tasks need their part of a damaged base or shared vector; all else is whole. Restore\n"
            "the store from a copy, or unpack what still loads."
        )
    if facts["stray_chunks"]:
        click.echo(
            f"{facts['stray_chunks']} chunks are left of an interrupted write; the next write "
            "removes them."
        )
