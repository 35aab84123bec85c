"""``tallstore add``."""

from __future__ import annotations

import os
from typing import Any

import click

from tallstore.cli.coding import coding_options, coding_values
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

_EXACT = (
    "Exact differences from the base, without masks: a mask only serves tasks that the\n"
    "shared vector was merged from. --code tall merges and masks the whole store anew;\n"
    "--code signs, seeded, levels or auto code a newcomer by itself."
)


@click.command(
    epilog=examples(
        "tallstore add zoo.tall law=law/ chemistry=chemistry.safetensors",
        "tallstore add zoo.tall law=law/ --code signs --density 5%",
        "tallstore add zoo.tall law=law/ --exact",
    )
)
@click.argument("items", metavar="STORE NAME=PATH...", nargs=-1, required=True, type=click.Path())
@coding_options(extra=("exact",))
@click.option(
    "--exact",
    is_flag=True,
    help="Keep the exact tier too; of a task that is there as codes, restore it.",
)
@click.option(
    "--original",
    "originals",
    metavar="NAME=PATH",
    multiple=True,
    help="With --code tall: the original of a task that has no exact tier.",
)
@overwrite_option
@yes_option
@timeout_option
@json_option
@quiet_option
def add(
    *,
    items: tuple[str, ...],
    code: str | None,
    exact: bool,
    originals: tuple[str, ...],
    overwrite: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
    **coding: Any,
) -> None:
    """Add tasks to a store, coded as its own are.

    Or as --code says. Where the store's tasks have masks, newcomers are kept as exact
    differences from the base. No other task is touched, but by --code tall, which merges and
    masks all of them anew: from their exact tiers, or from --original.
    """
    place, rest = split_store(items)
    if not rest:
        raise click.UsageError("No tasks are named; give NAME=PATH.")
    tasks = read_tasks(rest)
    if overwrite:
        _may_replace(place, tasks, yes=yes)
    from tallstore import recoding

    given = read_tasks(list(originals)) if originals else None
    with Progress(quiet=quiet) as progress:
        remarks = recoding.add(
            place,
            tasks,
            code=code,
            exact=True if exact else None,
            originals=given,
            overwrite=overwrite,
            timeout=timeout,
            report=progress.report,
            **coding_values(coding),
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
    table = Table("task", "stored", "bits/weight", "kept as", "original")
    for task in found:
        table.add(
            task["task"],
            size(task["stored_bytes"]),
            number(task["bits_per_weight"]),
            task["kept_as"],
            size(task["original_bytes"]),
        )
    table.echo()
    if any(task["code"] == "none" for task in found):
        click.echo(_EXACT)
