"""``tallstore rm``."""

from __future__ import annotations

import os

import click

from tallstore.cli.options import (
    complete_task,
    examples,
    json_option,
    store_argument,
    timeout_option,
    yes_option,
)
from tallstore.cli.printing import ask, emit_json, printable, size

__all__ = ["rm"]


@click.command(
    epilog=examples(
        "tallstore rm zoo.tall law chemistry",
    )
)
@store_argument
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_task)
@yes_option
@timeout_option
@json_option
def rm(*, store: str, tasks: tuple[str, ...], yes: bool, timeout: float, as_json: bool) -> None:
    """Remove tasks from a store, for good.

    All are removed or none. Later writes use the space again; compact gives it back.
    """
    from tallstore.store import TallStore

    names = list(dict.fromkeys(tasks))
    with TallStore(store, "a", timeout=timeout) as opened:
        # Unknown names are refused before anybody is asked.
        freed = sum(opened.stored_bytes(name) for name in names)
        ask(f"Remove {', '.join(names)} from {store} for good?", yes=yes)
        opened.remove(*names)
        left = len(opened.tasks)
    if as_json:
        emit_json(
            {
                "store": os.path.abspath(store),
                "removed": names,
                "freed_bytes": freed,
                "tasks_left": left,
            }
        )
        return
    click.echo(
        printable(f"removed {', '.join(names)}: {size(freed)}; {left} tasks are left. ")
        + "compact gives the space back."
    )
