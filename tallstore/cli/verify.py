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
    timeout_option,
)
from tallstore.cli.printing import emit_json, printable, size, styled
from tallstore.cli.progressbar import Progress
from tallstore.errors import CorruptStoreError, NotAStoreError, OptionError

if TYPE_CHECKING:
    from tallstore.checking import Verification
    from tallstore.damage import Damage
    from tallstore.repairing import Repair

__all__ = ["verify"]

_SHOWN = 5


@click.command(
    epilog=examples(
        "tallstore verify zoo.tall",
        "tallstore verify zoo.tall --repair",
        "tallstore verify zoo.tall --repair --out saved.tall",
    )
)
@store_argument
@click.option(
    "--repair",
    is_flag=True,
    help="If it is damaged, make a whole store of what is left, in its place. The damaged file is "
    "kept beside it as STORE.damaged.",
)
@click.option("--out", metavar="PATH", help="With --repair: where the repaired store goes instead.")
@external_base_option
@timeout_option
@json_option
@quiet_option
def verify(
    *,
    store: str,
    repair: bool,
    out: str | None,
    external_base: str | None,
    timeout: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check every byte of a store against its checksums.

    A base in another store is checked as well, and that it is the base meant.
    Lists what is damaged, and the tasks that do not load because of it. Exits with status 1 if
    anything is damaged; with --repair, if anything of it could not be recovered.
    """
    if out is not None and not repair:
        raise OptionError("--out is where the repaired store goes; give --repair too")
    facts = {
        "store": os.path.abspath(store),
        **_check(store, external_base, repair=repair, quiet=quiet),
    }
    if repair and not facts["ok"]:
        facts["repair"] = _repair(store, out, timeout=timeout, quiet=quiet)
    if as_json:
        emit_json(facts)
    else:
        _say(facts)
    if not facts.get("repair", facts)["ok"]:
        raise click.exceptions.Exit(1)


def _check(place: str, external_base: str | None, *, repair: bool, quiet: bool) -> dict[str, Any]:
    from tallstore.store import TallStore

    try:
        with (
            TallStore(place, external_base=external_base) as opened,
            Progress(quiet=quiet) as progress,
        ):
            found = opened.verify(report=progress.report)
    except (CorruptStoreError, NotAStoreError) as exc:
        # So damaged that nothing in it can be found, or that it is not known for a store.
        if isinstance(exc, NotAStoreError) and not repair:
            raise
        problem = {"message": str(exc), "concerns": ["the whole store"]}
        return {
            "ok": False,
            "chunks": 0,
            "bytes": 0,
            "stray_chunks": 0,
            "problems": [problem],
            "tasks": {},
        }
    return {
        "ok": found.ok,
        "chunks": found.chunks,
        "bytes": found.nbytes,
        "stray_chunks": found.stray,
        "problems": [
            {"message": problem.message, "concerns": list(problem.owners)}
            for problem in found.problems
        ],
        "tasks": {name: _damage(damage) for name, damage in found.tasks.items()},
        **_external(found),
    }


def _damage(damage: Damage) -> dict[str, Any]:
    return {
        "damaged": sorted(damage.roles),
        "tensors": list(damage.tensors),
        "files": list(damage.files),
    }


def _repair(place: str, out: str | None, *, timeout: float, quiet: bool) -> dict[str, Any]:
    from tallstore.repairing import repair_store
    from tallstore.store import store_path

    with Progress(quiet=quiet) as progress:
        done: Repair = repair_store(
            store_path(place),
            out=None if out is None else store_path(out),
            timeout=timeout,
            report=progress.report,
        )
    return {
        "ok": done.ok,
        "out": str(done.out),
        "damaged_file": str(done.kept),
        "generation": done.generation,
        "last_commit": done.in_force,
        "chunks_missing": done.missing,
        "whole": list(done.whole),
        "lossy": {name: _damage(damage) for name, damage in done.lossy.items()},
        "without_codes": list(done.bare),
        "lost": {name: _damage(damage) for name, damage in done.lost.items()},
        "files_lost": [{"task": name, "files": list(files)} for name, files in done.files.items()],
    }


def _external(found: Verification) -> dict[str, Any]:
    """What was checked of a base in another store, if it is in one."""
    if found.external is None:
        return {}
    path, chunks, nbytes = found.external.path, found.external.chunks, found.external.nbytes
    return {"external_base": {"store": str(path), "chunks": chunks, "bytes": nbytes}}


def _say(facts: dict[str, Any]) -> None:
    for problem in facts["problems"]:
        whom = ", ".join(problem["concerns"]) or "writing alone"
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
        for name, damage in facts["tasks"].items():
            click.echo(f"  task {printable(repr(name))} does not load: {_what(damage)}")
        if "repair" in facts:
            _say_repair(facts["repair"])
        else:
            click.echo(
                "Tasks that are not named here load bit for bit. Restore the store from a copy, or "
                "save\nwhat is left: tallstore verify --repair."
            )
    if facts["stray_chunks"]:
        click.echo(
            f"{facts['stray_chunks']} chunks are left of an interrupted write; the next write "
            "removes them."
        )


def _what(damage: dict[str, Any]) -> str:
    names = [printable(name) for name in damage["tensors"]]
    parts = [f"damaged {', '.join(damage['damaged'])}"] if damage["damaged"] else []
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"tensors {', '.join(names[:_SHOWN])}{more}")
    if damage["files"]:
        parts.append(f"files {', '.join(map(printable, damage['files']))}")
    return "; ".join(parts)


def _say_repair(done: dict[str, Any]) -> None:
    click.echo(
        f"repaired: {printable(done['out'])}; damaged file: {printable(done['damaged_file'])}"
    )
    if not done["last_commit"]:
        click.echo(
            f"  The last commit's manifest is damaged; that of generation {done['generation']} was "
            "gone by. What was\n  written after it is not there, and what was removed after it is."
        )
    click.echo(f"  {len(done['whole'])} tasks as they were, bit for bit")
    for name, damage in done["lossy"].items():
        click.echo(f"  task {printable(repr(name))} is lossy now, codes alone: {_what(damage)}")
    for name in done["without_codes"]:
        click.echo(f"  task {printable(repr(name))} has lost its codes, and loads bit for bit")
    for name, damage in done["lost"].items():
        click.echo(f"  task {printable(repr(name))} is lost: {_what(damage)}")
    for row in done["files_lost"]:
        whose = "the base" if row["task"] is None else f"task {row['task']!r}"
        click.echo(f"  files of {printable(whose)} are lost: {printable(', '.join(row['files']))}")
