"""``tallstore ls``."""

from __future__ import annotations

import os

import click

from tallstore.cli.options import examples, json_option, store_argument
from tallstore.cli.printing import Table, emit_json, number, size

__all__ = ["ls"]


@click.command(
    epilog=examples(
        "tallstore ls zoo.tall",
    )
)
@store_argument
@json_option
def ls(*, store: str, as_json: bool) -> None:
    """List the tasks of a store, one a line.

    Name, size in the store, bits per weight, and whether masks, an exact difference or both
    are kept.
    """
    from tallstore.cli.facts import tasks_facts
    from tallstore.store import TallStore

    with TallStore(store) as opened:
        tasks = tasks_facts(opened)
    if as_json:
        emit_json({"store": os.path.abspath(store), "tasks": tasks})
        return
    if not tasks:
        click.echo(f"{store} holds no tasks, the base alone", err=True)
    table = Table("task", "stored", "bits/weight", "kept as", "error")
    for task in tasks:
        table.add(
            task["task"],
            size(task["stored_bytes"]),
            f"{number(task['bits_per_weight'])} bits/weight",
            task["kept_as"],
            "lossless" if task["exact"] else f"error {number(task['relative_error'])}",
        )
    table.echo(header=False)
