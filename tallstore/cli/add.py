"""``tallstore add``."""

from __future__ import annotations

import os

import click

from tallstore.cli.options import (
    examples,
    json_option,
    overwrite_option,
    quiet_option,
    timeout_option,
    yes_option,
)
from tallstore.cli.printing import Table, ask, emit_json, notes, number, size
from tallstore.cli.progressbar import Progress
from tallstore.cli.zoo import read_tasks, split_store

__all__ = ["add"]

_WHY = (
    "Stored as exact differences from the base, without masks: a mask only serves tasks\n"
    "that the shared vector was merged from. Pack all originals again for masks."
)


@click.command(
    epilog=examples(
        "tallstore add zoo.tall law=law/ chemistry=chemistry.safetensors",
    )
)
@click.argument("items", metavar="STORE NAME=PATH...", nargs=-1, required=True, type=click.Path())
@overwrite_option
@yes_option
@timeout_option
@json_option
@quiet_option
def add(
    *,
    items: tuple[str, ...],
    overwrite: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Add tasks to a store, as exact differences from its base.

    No masks are made: a mask only serves tasks that the shared vector was merged from. No
    other task is touched.
    """
    place, rest = split_store(items)
    if not rest:
        raise click.UsageError("No tasks are named; give NAME=PATH.")
    tasks = read_tasks(rest)
    if overwrite:
        _may_replace(place, tasks, yes=yes)
    from tallstore import api

    with Progress(quiet=quiet) as progress:
        remarks = api.add(
            place, tasks, overwrite=overwrite, timeout=timeout, report=progress.report
        )
    _report(place, list(tasks), remarks, as_json=as_json, quiet=quiet)


def _may_replace(place: str, tasks: dict[str, str], *, yes: bool) -> None:
    from tallstore.store import TallStore

    with TallStore(place) as store:
        taken = [name for name in tasks if name in store.tasks]
    if taken:
        ask(f"Replace {', '.join(taken)} in {place}?", yes=yes)


def _report(
    place: str, names: list[str], remarks: list[str], *, as_json: bool, quiet: bool
) -> None:
    from tallstore.cli.facts import tasks_facts
    from tallstore.store import TallStore

    with TallStore(place) as store:
        found = tasks_facts(store, names)
        file_bytes = store.file_bytes()[1]
    notes(remarks, quiet=quiet)
    if as_json:
        emit_json(
            {
                "store": os.path.abspath(place),
                "file_bytes": file_bytes,
                "tasks": found,
                "notes": remarks,
            }
        )
        return
    table = Table("task", "stored", "bits/weight", "original")
    for task in found:
        original = size(task["original_bytes"])
        table.add(
            task["task"], size(task["stored_bytes"]), number(task["bits_per_weight"]), original
        )
    table.echo()
    click.echo(_WHY)
